"""From predicted loss to sizes: the curve, rotary width and ranks, the search for a given loss.

The algebra predicts what a size costs: rotations dropped and axes cut change a block's output,
and the metric of ``sensitivity`` turns that into nats of KL divergence, which add up over layers
to second order. No torch here.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

RANK_STEP = 16
"""Ranks that are chosen here are multiples of this where the source caches 256 numbers or more."""

CLEARLY = 1.1
"""A head's own rotary width is kept where no other loses less by this factor: predictions of
different widths are no more exact than that."""

CURVE_POINTS = 12
SEARCH_ROUNDS = 6
"""Conversions that ``--max-kl`` may take; the last of them is the result."""

FINENESS = 32
"""The search ends when the steps between a size above the limit and one within it are no more
than one in this many of all there are."""


@dataclass(frozen=True)
class Point:
    """One size: ranks per layer, rotary width, share of the source's cache, predicted nats."""

    ranks: tuple[int, ...]
    rope_dim: int
    cache_ratio: float
    predicted_kl: float


@dataclass(frozen=True)
class Losses:
    """What the layers of a model lose at one rotary width and any rank, nats per token.

    Attributes:
        rotations: per layer, of the rotations that are dropped.
        axes: per layer, of each axis that is cut; descending, and at least ``highest`` of them.
        rope_dim: R.
        full: numbers that a source layer caches per token.
    """

    rotations: tuple[float, ...]
    axes: tuple[tuple[float, ...], ...]
    rope_dim: int
    full: int

    @property
    def highest(self) -> int:
        """The largest rank."""
        return self.full - self.rope_dim

    @property
    def step(self) -> int:
        """What chosen ranks are multiples of."""
        return RANK_STEP if self.full >= 256 and self.highest >= RANK_STEP else 1

    def predicted(self, ranks: Sequence[int]) -> float:
        """Nats per token at these ranks, before any refinement."""
        tails = (sum(axes[rank:]) for axes, rank in zip(self.axes, ranks, strict=True))
        return sum(self.rotations) + sum(tails)

    def point(self, ranks: Sequence[int]) -> Point:
        """These ranks with what they keep and cost."""
        width = sum(ranks) + self.rope_dim * len(ranks)
        ratio = width / (self.full * len(ranks))
        return Point(tuple(ranks), self.rope_dim, ratio, self.predicted(ranks))

    def measured(self, total: int) -> tuple[int, ...]:
        """Ranks that sum up to at most ``total`` and lose least in all.

        The next step goes where it saves most. Losses of axes descend, so that is the best of all
        divisions into whole steps, at least one for each layer.
        """
        count, step, most = len(self.axes), self.step, self.highest // self.step
        if total >= count * self.highest:
            return (self.highest,) * count
        ranks = [1] * count
        left = total // step - count

        def entry(layer: int) -> tuple[float, int]:
            start = ranks[layer] * step
            return -sum(self.axes[layer][start : start + step]), layer

        queue = [entry(layer) for layer in range(count) if most > 1]
        heapq.heapify(queue)
        while queue and left > 0:
            _, layer = heapq.heappop(queue)
            ranks[layer] += 1
            left -= 1
            if ranks[layer] < most:
                heapq.heappush(queue, entry(layer))
        return tuple(rank * step for rank in ranks)

    def at(self, width: int, measured: bool) -> Point | None:
        """The best division of so many cached numbers per layer; None where no rank is left."""
        rank, count = width - self.rope_dim, len(self.axes)
        if not 1 <= rank <= self.highest:
            return None
        if measured and rank >= self.step:
            return self.point(self.measured(rank * count))
        return self.point([rank] * count)


def sizes_at(every: Sequence[Losses], width: int, measured: bool, own: int) -> list[Point]:
    """The best size of each rotary width at so many cached numbers per layer; the best one first.

    Args:
        every: of each rotary width to choose from; ``width`` leaves one of them a rank.
        width: C + R, in the mean over layers.
        measured: each layer has a rank of its own, and not all the same one.
        own: what turns in a head of the source.
    """
    found = [point for losses in every if (point := losses.at(width, measured))]

    def order(point: Point) -> tuple[float, int]:
        return point.predicted_kl * (1 if point.rope_dim == own else CLEARLY), point.rope_dim

    return sorted(found, key=order)


def all_sizes(
    every: Sequence[Losses], measured: bool, allowed: Sequence[int] | None, own: int
) -> list[Point]:
    """Every size to choose from, ascending; of each width the best one.

    Args:
        every: of each rotary width to choose from.
        measured: each layer has a rank of its own, and not all the same one.
        allowed: the only ranks that an engine takes, beside its one rotary width; None for any.
        own: what turns in a head of the source.
    """
    if allowed is not None:
        return [every[0].point([rank] * len(every[0].axes)) for rank in allowed]
    widths = {
        losses.rope_dim + rank
        for losses in every
        for rank in (*range(losses.step, losses.highest, losses.step), losses.highest)
    }
    return [sizes_at(every, width, measured, own)[0] for width in sorted(widths)]


def some_of(sizes: Sequence[Point]) -> list[Point]:
    """A dozen of them, from the first to the last."""
    count = min(CURVE_POINTS, len(sizes))
    picked = {round(i * (len(sizes) - 1) / max(count - 1, 1)) for i in range(count)}
    return [sizes[index] for index in sorted(picked)]


def next_size(
    predicted: Sequence[float], tried: Sequence[tuple[int, float]], limit: float
) -> int | None:
    """The size to convert to next in search of the smallest one within ``limit``.

    The prediction says how the loss falls with the size; measurements say how far it is off, and
    between two of them that is interpolated.

    Args:
        predicted: nats of each size, ascending sizes.
        tried: sizes that were converted to, in order, with the nats measured.
        limit: nats allowed.

    Returns:
        Its index, or None when the last one tried is the answer. Where even the largest size is
        above the limit, that one is tried last.
    """
    count = len(predicted)
    low = max((index for index, found in tried if found > limit), default=-1)
    high = min((index for index, found in tried if found <= limit), default=count)
    fine = high < count and high - low <= max(1, count // FINENESS)
    if fine or high - low == 1 or len(tried) >= SEARCH_ROUNDS - 1:
        answer = min(high, count - 1)
        return None if tried and tried[-1][0] == answer else answer
    known = {i: math.log(max(found, 1e-30) / max(predicted[i], 1e-30)) for i, found in tried}
    ends = [known[i] for i in (low, high) if i in known] or [0.0]

    def expected(index: int) -> float:
        share = (index - low) / (high - low)
        return predicted[index] * math.exp(ends[0] + share * (ends[-1] - ends[0]))

    inside = range(low + 1, high)
    return next((index for index in inside if expected(index) <= limit), inside[-1])
