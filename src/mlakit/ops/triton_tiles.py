"""The fixed table of tiles: what one program holds for a target and a problem.

Nothing is tuned at run time. Every entry compiles without a register spill and fits the target's
shared memory, with Triton 3.6 and 3.9 (``benchmarks/compile_kernels.py`` shows it).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

STAGES = {
    "sm_80": (4, 4),
    "sm_90": (5, 5),
    "sm_100": (5, 5),
    "sm_103": (5, 5),
    "hip": (2, 0),
    "other": (2, 2),
}
"""Stages that shared memory holds of 32 tokens of 640 columns, with 16 and with 32 query rows.

0: no tile of more than 16 rows, for want of registers. ``other`` are the cards with 99 KiB (sm_86,
sm_89, sm_120) and what is not known yet.
"""

WIDE = triton.__version__.startswith("3.6.")
"""Whether 64 rows of 512 value columns, for Hopper's wgmma, compile without spills.

They halve how often a row is read, and just fit the registers; with 3.9, 56 of them are missing.
"""


@dataclass(frozen=True)
class Tile:
    """What one program of ``attend`` holds, and how it is compiled.

    Attributes:
        rows: query rows.
        tokens: cache rows per step.
        values: value columns; with ``shared`` all of the latent's.
        keys: key columns beside the latent's, or per step where keys and values are apart.
        shared: the value is the start of the key, and is loaded once.
        warps: warps of the program.
        stages: steps in flight.
    """

    rows: int
    tokens: int
    values: int
    keys: int
    shared: bool
    warps: int
    stages: int


def choose_tile(
    target: str,
    dtype: torch.dtype,
    kind: str,
    rows: int,
    rank: int,
    width: int,
    latent: int,
    row: int,
    aligned: bool,
    caches: int,
    lean: bool,
) -> Tile:
    """The tile for a problem.

    Args:
        target: ``sm_90``, ``hip`` ...
        dtype: of q.
        kind: ``plain`` or how the cache is quantised.
        rows: query rows that want a tile.
        rank: value columns.
        width: score columns W.
        latent: columns of the latent section, C.
        row: columns of a cache row.
        aligned: cache rows start at multiples of 16 bytes; loads of others take registers instead
            of going to shared memory directly.
        caches: that are attended to as one, 1 or 2; each has a loop of its own, for which both
            have fewer registers.
        lean: groups of 16 heads, pages that hold whole blocks, no soft cap: what leaves the most
            registers.
    """
    values, rest = power(latent), row - latent
    if dtype == torch.float32:  # without matrix instructions: small blocks
        return Tile(16, 16, min(power(rank), 256), min(power(width), 64), False, 4, 2)
    if (kind == "plain" and not aligned) or width < row or latent > 512 or rest > 128:
        warps = 8 if power(rank) > 256 else 4
        return Tile(16, 16, min(power(rank), 1024), min(power(width), 128), False, warps, 2)
    keys = power(rest) if rest else 0
    few, many = STAGES.get(target, STAGES["other"])
    if kind != "plain":
        # Shared memory holds the codes of some steps, and the values of one, twice.
        tokens = 32 if target in STAGES and lean and caches == 1 else 16
        return Tile(16, tokens, values, keys, True, 8, min(few, 4))
    if rows <= 16 or not many:
        return Tile(16, 32, values, keys, True, 4, few)
    if values <= 256:
        tall = rows > 32 and (lean or values <= 128)
        warps = 8 if tall and values > 128 else 4
        return Tile(64 if tall else 32, 32, values, keys, True, warps, few)
    if target == "sm_90" and WIDE and lean and rows > 32 and latent == 512 and caches == 1:
        return Tile(64, 32, values, keys, True, 8, 3)
    return Tile(32, 32, values, keys, True, 8, many)


def power(columns: int) -> int:
    """Columns a block needs: a power of two, and at least the 16 of a matrix instruction."""
    return max(16, triton.next_power_of_2(columns))
