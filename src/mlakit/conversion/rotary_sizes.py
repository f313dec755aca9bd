"""Which rotary widths and folds a method can keep, and refusals that name the nearest two.

No torch here.
"""

from __future__ import annotations

from typing import Literal

from mlakit.errors import UsageError
from mlakit.spec import AttentionSpec, RopeSpec

SCALE_FREE_ROPE = ("default", "linear", "llama3")
"""Scaling rules that look at a frequency alone: every c-th one of dimension d is then the schedule
of dimension d/c. YaRN ramps over the index of a frequency, so its schedules do not nest."""


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
