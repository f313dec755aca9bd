"""Trying out which rotations a layer keeps: its output on held-out text, before any rank is cut.

Candidates differ in nothing but queries and keys, so these are computed once, and each candidate
costs one attention and one output projection, of as many queries as tell candidates apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mlakit.conversion.amounts import TRIAL_BLOCK, TRIAL_QUERIES
from mlakit.conversion.calibrate import attend
from mlakit.conversion.closed_form import Rope
from mlakit.conversion.factor import AttentionWeights, heads_of
from mlakit.conversion.observe import HeldOut, Wrong, turn_factor, working_projections
from mlakit.spec import AttentionSpec

QUERY_BLOCKS = 4
"""Parts of a window's queries; those of an early one do not meet the keys after it."""


@dataclass(frozen=True)
class Heads:
    """One held-out window through a layer's projections, float32.

    Attributes:
        rows: positions of the N queries that are looked at, ascending.
        query: ``[H, N, d/2]`` complex, not rotated.
        key: ``[G, T, d/2]`` complex, not rotated.
        value: ``[G, T, d]``.
        output: ``[N, D]``, what the source's block puts out.
        mask: ``[N, T]``; None for a causal one of all queries.
    """

    rows: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    mask: torch.Tensor | None

    def blocks(self) -> Iterator[tuple[slice, int, torch.Tensor | None]]:
        """Queries that are taken together, how many keys the last of them sees, and their mask."""
        if self.mask is None:
            yield slice(None), self.key.shape[1], None
            return
        for some in torch.arange(len(self.rows)).chunk(QUERY_BLOCKS):
            rows = slice(int(some[0]), int(some[-1]) + 1)
            last = int(self.rows[some[-1]]) + 1
            yield rows, last, self.mask[rows, :last]


class Trial:
    """The held-out windows of one layer, ready for candidates.

    Args:
        weights: the source layer.
        spec: the source layer.
        factor: what its rotary embedding multiplies cos and sin with.
        windows: inputs and outputs that no statistic has seen.
        importance: ``[D, D]``, a metric of the output.
    """

    def __init__(
        self,
        weights: AttentionWeights,
        spec: AttentionSpec,
        factor: float,
        windows: Sequence[HeldOut],
        importance: torch.Tensor | None = None,
    ) -> None:
        self.spec, self.factor = spec, factor
        self.output = weights.o.float()
        self.importance = None if importance is None else importance.float()
        parts = working_projections(weights)
        lengths = [len(window.inputs) for window in windows]
        stride = max(1, min(sum(lengths) // TRIAL_QUERIES, *lengths))  # one of each at least
        self.windows = [_heads(weights, parts, window, stride) for window in windows]
        mean = torch.stack([window.output.mean(0) for window in self.windows]).mean(0)
        squares = [(window.output - mean).double().square().sum() for window in self.windows]
        self.variance = max(float(torch.stack(squares).sum()), 1e-30)

    @torch.no_grad()
    def error(self, rope: Rope) -> Wrong:
        """What the block's output misses with this candidate."""
        plain, felt, tokens = 0.0, 0.0, 0
        for window in self.windows:
            heads = self._attend(window, rope)
            change = heads @ self.output[:, :-1].mT + self.output[:, -1] - window.output
            plain += float(change.square().sum(dtype=torch.float64))
            tokens += len(change)
            if self.importance is not None:
                felt += float(((change @ self.importance) * change).sum(dtype=torch.float64))
        share = plain / self.variance
        return Wrong(share, share if self.importance is None else felt / tokens)

    def _attend(self, window: Heads, rope: Rope) -> torch.Tensor:
        """What the heads read, side by side, ``[N, H d]``; some key heads at a time."""
        kept, (groups, length, half) = rope.kept, window.key.shape
        repeats = len(window.query) // groups
        angles = torch.arange(length, device=window.key.device)[:, None] * kept.frequencies
        factor = turn_factor(kept.frequencies, self.factor)
        turn = torch.polar(factor.expand_as(angles), angles).to(window.key)
        turned = torch.einsum("mg,gtm->tm", kept.mix.to(window.key), window.key[..., kept.source])
        turned *= turn
        remainder = kept.remainder(half).to(window.key)
        read = (kept.spread.mT.conj().repeat_interleave(repeats, 0) * rope.gain).to(window.query)
        dropped = rope.dropped.to(window.query)
        out = window.value.new_empty(len(window.rows), len(window.query), window.value.shape[-1])
        at_once = max(1, TRIAL_BLOCK // (repeats * length * 2 * (half + len(kept.source))))
        for some in torch.arange(groups).split(at_once):
            keys = slice(int(some[0]), int(some[-1]) + 1)
            own = slice(keys.start * repeats, keys.stop * repeats)
            query = window.query[own]
            asked = query[..., kept.source] * read[own, None] * turn[window.rows]
            query = _real(torch.cat([query * dropped[own, None], asked], -1))
            rest = torch.einsum("jgk,ktj->gtj", remainder[:, keys], window.key)
            key = _real(torch.cat([rest, turned.expand(len(some), -1, -1)], -1))
            key, value = (x.repeat_interleave(repeats, 0)[None] for x in (key, window.value[keys]))
            for rows, last, mask in window.blocks():
                seen = attend(
                    query[None, :, rows], key[..., :last, :], value[..., :last, :], mask, self.spec
                )
                out[rows, own] = seen[0].transpose(0, 1)
        return out.flatten(1)


def _heads(
    weights: AttentionWeights, parts: Sequence[torch.Tensor], window: HeldOut, stride: int
) -> Heads:
    """The window with the last of every ``stride`` queries."""
    length, device = len(window.inputs), window.inputs.device
    rows, mask = torch.arange(stride - 1, length, stride, device=device), window.mask
    if mask is not None:
        mask = mask[rows]
    elif stride > 1:
        mask = rows[:, None] >= torch.arange(length, device=device)
    ones = window.inputs.new_ones(length, 1)
    inputs = torch.cat([weights.inputs(window.inputs), ones], 1)
    query = weights.queries(window.inputs[rows], parts[0])
    key, value = (heads_of(inputs, part) for part in parts[1:])
    return Heads(rows, _complex(query), _complex(key), value, window.outputs[rows], mask)


def _complex(rows: torch.Tensor) -> torch.Tensor:
    return torch.complex(*rows.chunk(2, -1))


def _real(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows.real, rows.imag], -1)
