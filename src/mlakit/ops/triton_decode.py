"""The Triton path: any GPU that Triton compiles for, any head count, rank and page size.

Nothing here waits for the device or reads a length on the host: how a sequence is cut is computed
by a kernel, and the grid depends on shapes only, so a CUDA graph captures the call. Imported when
it is chosen, because it imports Triton.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from mlakit.ops.call import DenseCall, SparseCall
from mlakit.ops.triton_kernels import attend, combine, plan

WAVES = 2
"""Items per processor to aim for; more even out the load, fewer spare partial results."""

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

PLAN_BLOCK, COMBINE_ITEMS = 256, 32


@dataclass(frozen=True)
class Tile:
    """What one program of ``attend`` holds, and how it is compiled.

    Attributes:
        rows: query rows.
        tokens: cache rows per step.
        values: value columns.
        keys: key columns beside the value's, or per step where keys and values are apart.
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


def why_not(call: DenseCall | SparseCall) -> str:
    """Why these kernels cannot run a call; empty if they can."""
    if isinstance(call, SparseCall):
        return "it has no sparse attention"
    if call.cache_format or call.sliding_window or call.soft_cap or call.batch_invariant:
        return "it has no quantised caches, windows, caps and batch invariance"
    return "it has no ragged queries" if call.cu_seqlens_q is not None else ""


def decode(call: DenseCall) -> tuple[Tensor, Tensor]:
    """``mla_decode`` for tensors of at most 32 bits, summed in float32.

    A length above what the table has room for counts as all of it.
    """
    batch, queries, kv_lora_rank = call.batch_size, call.max_seqlen_q, call.kv_lora_rank
    block_table, cache_seqlens = call.block_table, call.cache_seqlens
    softmax_scale, causal = call.softmax_scale, call.causal
    q, k_cache = call.q.detach().unflatten(0, (batch, queries)), call.k_cache.detach()
    heads, width = q.shape[2:]
    block_size, kv_heads, row = k_cache.shape[1:]
    out = q.new_empty(batch, queries, heads, kv_lora_rank)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    if not batch * queries:
        return out.flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)
    group = heads // kv_heads
    target, processors = _device(q.device)
    aligned = not any(n % 16 for n in (k_cache.data_ptr(), *k_cache.stride()[:3]))
    tile = choose_tile(target, q.dtype, queries * group, kv_lora_rank, width, row, aligned)
    row_tiles = math.ceil(queries * group / tile.rows)
    tiles = row_tiles * math.ceil(kv_lora_rank / tile.values) * kv_heads
    parts = max(1, WAVES * processors // tiles)
    capacity = block_table.shape[1] * block_size
    items = min(batch + parts, batch * math.ceil(capacity / tile.tokens))
    owner = q.new_empty(items, dtype=torch.int32)
    first = q.new_empty(batch + 1, dtype=torch.int32)
    partial_out = q.new_empty(items, heads * queries, kv_lora_rank, dtype=torch.float32)
    partial_lse = q.new_empty(items, heads * queries, dtype=torch.float32)
    with torch.cuda.device_of(q):
        plan[(1,)](
            cache_seqlens, first, owner, batch, parts, capacity, cache_seqlens.stride(0),
            TOKENS=tile.tokens, BLOCK=PLAN_BLOCK,
        )  # fmt: skip
        if items:
            attend[(items * tiles,)](
                q, k_cache, block_table, cache_seqlens, first, owner, out, lse, partial_out,
                partial_lse, softmax_scale / math.log(2.0), batch, queries, group, kv_heads,
                row_tiles, capacity, *q.stride()[:3], *k_cache.stride()[:3], *block_table.stride(),
                cache_seqlens.stride(0), RANK=kv_lora_rank, WIDTH=width, KEY_START=row - width,
                CAUSAL=causal, PAGE=block_size, SHARED=tile.shared, ROWS=tile.rows,
                TOKENS=tile.tokens, VALUES=tile.values, KEYS=tile.keys,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
        combine[(batch * queries * heads,)](
            out, lse, partial_out, partial_lse, first, queries, heads, group,
            RANK=kv_lora_rank, COLUMNS=triton.next_power_of_2(kv_lora_rank), ITEMS=COMBINE_ITEMS,
        )  # fmt: skip
    return out.flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)


def _device(device: torch.device) -> tuple[str, int]:
    """Target of a device as the table of tiles names it, and its processors."""
    if device.type != "cuda":  # Triton's interpreter
        return "sm_80", 4
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return "hip", properties.multi_processor_count
    return f"sm_{properties.major}{properties.minor}", properties.multi_processor_count


def choose_tile(
    target: str, dtype: torch.dtype, rows: int, rank: int, width: int, row: int, aligned: bool
) -> Tile:
    """The tile for a target and a problem, from a fixed table: nothing is tuned at run time.

    Every entry compiles without a register spill (``benchmarks/compile_kernels.py``) and fits the
    target's shared memory.

    Args:
        target: ``sm_90``, ``hip`` ...
        dtype: of q and the cache.
        rows: query rows of a kv head, S H / G.
        rank: value columns C.
        width: score columns W.
        row: columns of a cache row.
        aligned: cache rows start at multiples of 16 bytes and 16 elements; loads of others take
            registers instead of going to shared memory directly.
    """
    values, rest = _power(rank), width - rank
    if dtype == torch.float32:  # without matrix instructions: small blocks
        return Tile(16, 16, min(values, 256), min(_power(width), 64), False, 4, 2)
    if not aligned or width < row or rank > 512 or rest > 128:
        warps = 8 if values > 256 else 4
        return Tile(16, 16, min(values, 1024), min(_power(width), 128), False, warps, 2)
    keys = _power(rest) if rest else 0
    few, many = STAGES.get(target, STAGES["other"])
    if rows <= 16 or not many:
        return Tile(16, 32, values, keys, True, 4, few)
    if values <= 256:
        tall = rows > 32
        return Tile(64 if tall else 32, 32, values, keys, True, 8 if tall else 4, few)
    return Tile(32, 32, values, keys, True, 8, many)


def _power(columns: int) -> int:
    """Columns a block needs: a power of two, and at least the 16 of a matrix instruction."""
    return max(16, triton.next_power_of_2(columns))
