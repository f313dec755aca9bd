"""Which rotary widths and folds a method can keep, and among which calibration chooses.

No torch here.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from mlakit.engines.targets import TARGETS
from mlakit.errors import UsageError
from mlakit.spec import AttentionSpec, RopeSpec

if TYPE_CHECKING:
    from mlakit.conversion.goal import Goal

SCALE_FREE_ROPE = ("default", "linear", "llama3")
"""Scaling rules that look at a frequency alone: every c-th one of dimension d is then the schedule
of dimension d/c. YaRN ramps over the index of a frequency, so its schedules do not nest."""

SIXTEENTHS = (4, 6, 8)
"""Of the cache that is kept, the shares that rotary widths to choose from have. The best one lay
between a quarter and half of it; with half of the whole cache every rotation is kept."""

SIXTEENTHS_OF_FEW_BITS = (4, 6, 8, 10, 12)
"""The same where latents may have few bits: rotary dimensions then are the dear ones, and what
they leave still is many latents."""

SIXTEENTHS_OF_ALL = (1, 2, 4, 8)
"""The same of what the source caches, where the size is what is looked for."""


def open_sizes(source: AttentionSpec, goal: Goal) -> tuple[int, ...]:
    """The rotary widths that calibration chooses from, ascending; none where that is settled.

    They are shares of the cache, rounded down to multiples of half of what turns in a head (of 2
    where that is more), and what turns in a head itself. A layout without a matrix per head for
    its queries gets at most two heads of them: its query projection grows with each.
    """
    settled = goal.qk_rope_head_dim is not None or goal.kv_lora_rank is not None
    engine, full, head = TARGETS[goal.engine], source.cache_width, source.rotary_dim
    if settled or not goal.has("downstream") or source.kv_lora_rank is not None:
        return ()
    if engine.sizes(source) is not None:
        return ()
    ratio = 1.0 if goal.max_kl is not None else goal.cache_ratio or 0.0
    width = math.floor(min(ratio, 1.0) * full + 1e-9)
    most = min(head * (source.num_key_value_heads if engine.query_up else 2), width - 1)
    step, found = max(2, head // 4 * 2), {head}
    few = SIXTEENTHS if goal.cache_bits == 16 else SIXTEENTHS_OF_FEW_BITS
    for share in few if goal.max_kl is None else SIXTEENTHS_OF_ALL:
        size = min(width * share // 16, most)
        found.add(size - size % (step if size >= step else 2))
    return tuple(sorted(size for size in found if 2 <= size <= most)) or (2,) * (width > 2)


def freqfold_choices(head_dim: int, rope_dim: int) -> list[int]:
    """Every fold that keeps exactly the frequencies of dimension ``rope_dim``, ascending."""
    collapse, half = head_dim // rope_dim, head_dim // 2
    return [fold for fold in range(collapse, half + 1, collapse) if half % fold == 0]


def freqfold_candidates(head_dim: int, rope_dim: int) -> list[int]:
    """What ``auto`` tries, as published: from the collapse c = d/R, doubling."""
    choices = freqfold_choices(head_dim, rope_dim)
    folds = [choices[0]]
    while 2 * folds[-1] in choices:
        folds.append(2 * folds[-1])
    return folds


def rope_choices(source: AttentionSpec, method: str) -> list[int]:
    """Every rotary width that a method can keep, ascending."""
    rope = source.rope or RopeSpec(1.0, source.head_dim)
    if source.kv_lora_rank is not None:
        return list(range(2, rope.dim + 1, 2))
    if method == "mlakit":
        return list(range(2, source.num_key_value_heads * source.head_dim + 1, 2))
    if rope.rope_type not in SCALE_FREE_ROPE:
        return [rope.dim]
    return [size for size in range(2, rope.dim + 1, 2) if rope.dim % size == 0]


def check_rope_dim(rope: RopeSpec, rope_dim: int, choices: list[int]) -> None:
    if rope_dim in choices:
        return
    if len(choices) == 1 and rope.dim > 2:
        raise UsageError(
            f"--qk-rope-head-dim {rope_dim}: the frequencies of rope_type {rope.rope_type!r}"
            f" depend on how many there are, so only all {rope.dim} dimensions can be kept",
            remedy=f"use --qk-rope-head-dim {rope.dim}",
        )
    fitting = f"divide the head size {rope.dim}"
    if choices == list(range(2, choices[-1] + 1, 2)):
        fitting = f"at most {choices[-1]}, what the source's keys have in all"
    raise UsageError(
        f"--qk-rope-head-dim {rope_dim} must be even and {fitting}",
        remedy=f"the nearest are {_two_nearest(choices, rope_dim)}",
    )


def check_freqfold(dim: int, rope_dim: int, freqfold: int | Literal["auto"]) -> None:
    choices = freqfold_choices(dim, rope_dim)
    if freqfold == "auto" or freqfold in choices:
        return
    if not isinstance(freqfold, int):
        raise UsageError(f"--freqfold {freqfold!r} is neither a number nor auto")
    raise UsageError(
        f"--freqfold {freqfold} must be a multiple of {dim // rope_dim} (head size {dim} over"
        f" {rope_dim} rotary dimensions) and divide {dim // 2} frequencies",
        remedy=f"the nearest are {_two_nearest(choices, freqfold)}",
    )


def _two_nearest(choices: list[int], wanted: int) -> str:
    nearest = sorted(sorted(choices, key=lambda size: abs(size - wanted))[:2])
    return " and ".join(str(size) for size in nearest)
