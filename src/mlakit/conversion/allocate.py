"""From predicted loss to sizes: the curve, rotary width and ranks, the search for a given loss.

The algebra predicts what a size costs: rotations dropped and axes cut change a block's output,
and the metric of ``sensitivity`` turns that into nats of KL divergence, which add up over layers
to second order. Rounding what is cached adds its own, so bits are chosen with the rank. No torch
here.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlakit.spec import QUANTISED_ROWS, CacheKind, cached_row_bytes

RANK_STEP = 16
"""Ranks that are chosen here are multiples of this where the source caches 256 numbers or more."""

CLEARLY = 1.1
"""A head's own rotary width is kept where no other loses less by this factor: predictions of
different widths are no more exact than that."""

CURVE_POINTS = 12
SEARCH_ROUNDS = 6
"""Conversions that ``--max-kl`` may take; the last of them is the result."""

LARGEST_CODE = {"int8": 127, "int4": 7}
"""Of the formats that are chosen here."""

FINENESS = 32
"""The search ends when the steps between a size above the limit and one within it are no more
than one in this many of all there are."""


@dataclass(frozen=True)
class Storage:
    """How the numbers of a row are cached.

    Attributes:
        kind: of the latent's; None for plain numbers.
        itemsize: bytes of a plain number.
    """

    kind: CacheKind | None = None
    itemsize: int = 2

    def nbytes(self, rank: int, rope_dim: int) -> int:
        """Bytes of a row."""
        return cached_row_bytes(rank, rope_dim, self.kind, self.itemsize)

    def rank_within(self, width: int, rope_dim: int, highest: int) -> int:
        """The largest rank whose row has the bytes of ``width`` plain numbers; 0 for none.

        Of plain numbers it is the one that fills them, which may be above ``highest``.
        """
        if self.kind is None:
            return max(0, width - rope_dim)
        ranks = range(highest, 0, -1)
        return next((c for c in ranks if self.nbytes(c, rope_dim) <= width * self.itemsize), 0)

    def noise(self, rank: int) -> float:
        """Mean square of the rounding error over that of the values.

        The scale of a group follows its largest value; of n Gaussian ones its square is about
        ``2 ln(2 n) - 2.6`` variances.
        """
        if self.kind is None:
            return 0.0
        group = QUANTISED_ROWS[self.kind][1]
        spread = max(1.0, 2 * math.log(2 * min(rank, group)) - 2.6)
        return spread / LARGEST_CODE[self.kind] ** 2 / 12


PLAIN = (Storage(),)


@dataclass(frozen=True)
class Point:
    """One size: ranks per layer, rotary width, share of the source's cache, predicted nats."""

    ranks: tuple[int, ...]
    rope_dim: int
    cache_ratio: float
    predicted_kl: float
    cache_format: CacheKind | None = None


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

    def rounded(self, ranks: Sequence[int], storage: Storage) -> float:
        """Nats per token that rounding the latents costs in the basis that suits it.

        The least over all bases, see ``nn.even_latent``: half the noise's variance, times the
        square of the sum of the axes' lengths, over the rank.
        """
        lengths = (
            sum(math.sqrt(2 * loss) for loss in axes[:rank])
            for axes, rank in zip(self.axes, ranks, strict=True)
        )
        return sum(
            storage.noise(rank) * length**2 / rank / 2
            for length, rank in zip(lengths, ranks, strict=True)
        )

    def point(self, ranks: Sequence[int], storage: Storage = PLAIN[0]) -> Point:
        """These ranks with what they keep and cost."""
        kl = self.predicted(ranks) + self.rounded(ranks, storage)
        ratio = self.nbytes(ranks, storage) / (self.full * storage.itemsize)
        return Point(tuple(ranks), self.rope_dim, ratio, kl, storage.kind)

    def nbytes(self, ranks: Sequence[int], storage: Storage) -> float:
        """Bytes of a row, in the mean over layers."""
        return sum(storage.nbytes(rank, self.rope_dim) for rank in ranks) / len(ranks)

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

    def at(self, width: int, measured: bool, storage: Storage = PLAIN[0]) -> Point | None:
        """The best division of so many plain numbers' bytes; None where no rank is left."""
        rank = storage.rank_within(width, self.rope_dim, self.highest)
        return self.divided(rank, measured, storage) if 1 <= rank <= self.highest else None

    def divided(self, rank: int, measured: bool, storage: Storage = PLAIN[0]) -> Point:
        """The best division of a rank per layer; its bytes are at most those of an even one."""
        count, total = len(self.axes), rank * len(self.axes)
        if not measured or rank < self.step:
            return self.point([rank] * count, storage)
        ranks, most = self.measured(total), storage.nbytes(rank, self.rope_dim)
        while self.nbytes(ranks, storage) > most:  # scales and padding of odd ranks
            total -= self.step
            ranks = self.measured(total)
        return self.point(ranks, storage)


def sizes_at(
    every: Sequence[Losses],
    width: int,
    measured: bool,
    own: int,
    storages: Sequence[Storage] = PLAIN,
) -> list[Point]:
    """The best size of each rotary width and storage at so many bytes; the best one first.

    Args:
        every: of each rotary width to choose from; ``width`` leaves one of them a rank.
        width: C + R plain numbers, in the mean over layers.
        measured: each layer has a rank of its own, and not all the same one.
        own: what turns in a head of the source.
        storages: to choose from.
    """
    found = [
        point
        for losses in every
        for storage in storages
        if (point := losses.at(width, measured, storage))
    ]

    def order(point: Point) -> tuple[float, int]:
        return point.predicted_kl * (1 if point.rope_dim == own else CLEARLY), point.rope_dim

    return sorted(found, key=order)


def all_sizes(
    every: Sequence[Losses],
    measured: bool,
    allowed: Sequence[int] | None,
    own: int,
    storages: Sequence[Storage] = PLAIN,
) -> list[Point]:
    """Every size to choose from, ascending; of each width the best one.

    Args:
        every: of each rotary width to choose from.
        measured: each layer has a rank of its own, and not all the same one.
        allowed: the only ranks that an engine takes, beside its one rotary width; None for any.
        own: what turns in a head of the source.
        storages: to choose from.
    """
    if allowed is not None:
        return [every[0].point([rank] * len(every[0].axes)) for rank in allowed]
    widths = {
        -(-storage.nbytes(rank, losses.rope_dim) // storage.itemsize)
        for losses in every
        for storage in storages
        for rank in (*range(losses.step, losses.highest, losses.step), losses.highest)
    }
    found = [sizes_at(every, width, measured, own, storages)[0] for width in sorted(widths)]
    return [point for i, point in enumerate(found) if not i or point != found[i - 1]]


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
