"""Sizes that an engine's kernels take, and zeros up to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlakit.spec import ModelSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Shape:
    """Sizes of an attention as an engine runs it; what exceeds the model's own is zeros.

    Attributes:
        rank: C, the same in all layers.
        rope: R.
        nope: N.
        value: V.
    """

    rank: int
    rope: int
    nope: int
    value: int


def own_shape(spec: ModelSpec) -> Shape:
    """The model's own sizes, its largest rank where layers differ."""
    rank, first = max(layer.kv_lora_rank or 0 for layer in spec.layers), spec.layers[0]
    rope, nope = first.qk_rope_head_dim or 0, first.qk_nope_head_dim or 0
    return Shape(rank, rope, nope, first.value_dim)


def smallest_shape(
    own: Shape,
    widths: tuple[int, ...] | None,
    heads: tuple[tuple[int, int, int], ...] | None,
    *,
    pad: bool,
    holds: Callable[[int], bool],
) -> Shape | None:
    """The smallest sizes that an engine takes and that hold a model's.

    Args:
        own: the model's.
        widths: C + R that the engine takes; None for any.
        heads: (N, R, V) that it takes; None for any.
        pad: whether rank and rotary width may grow: zeros are cached then.
        holds: whether a rotary part of this width, more than the model's, has its frequencies.

    Returns:
        None where there are no such sizes.
    """
    if widths is None:
        return own
    fitting = [
        Shape(width - wide, wide, high, value)
        for width in widths
        for high, wide, value in heads or ((own.nope, own.rope, own.value),)
        if high >= own.nope
        and value >= own.value
        and (wide == own.rope or (pad and wide > own.rope and holds(wide)))
        and (width - wide == own.rank or (pad and width - wide > own.rank))
    ]
    return min(fitting, key=lambda s: (s.rank + s.rope, s.nope, s.value), default=None)


def sizes_in_words(
    own: Shape, widths: tuple[int, ...] | None, heads: tuple[tuple[int, int, int], ...] | None
) -> str:
    """Which sizes an engine takes, and which a model has."""
    return (
        f"its kernels take rank + rope = {' or '.join(map(str, widths or ()))} and (nope, rope, v)"
        f" of {', '.join(map(str, heads or ()))}, not {own.rank} + {own.rope} and ({own.nope},"
        f" {own.rope}, {own.value})"
    )


def padded(rows: torch.Tensor, count: int, dim: int = 1) -> torch.Tensor:
    """Zeros along a dimension, up to ``count`` entries."""
    missing = count - rows.shape[dim]
    if not missing:
        return rows
    size = list(rows.shape)
    size[dim] = missing
    import torch

    return torch.cat((rows, rows.new_zeros(size)), dim)
