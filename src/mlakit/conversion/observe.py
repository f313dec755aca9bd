"""What the attention of one layer does on calibration text, as sums that do not grow with it.

The error of a compressed layer is judged by what it does to the layer's output, so the statistics
say how much attention each error meets: which distances it looks over, which keys it falls on,
and how strongly the output answers to a change of a score.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from mlakit.conversion.amounts import SCORES
from mlakit.conversion.factor import AttentionWeights, all_finite, heads_of
from mlakit.conversion.stream import multiplies_bfloat16
from mlakit.errors import MlakitError
from mlakit.spec import AttentionSpec


@dataclass(frozen=True)
class Statistics:
    """Means over calibration tokens, float64. E is the mean over queries m or keys n.

    With a = attention of query m on key n of head i, o = the head's output, W_O = its block of the
    output projection:

    Attributes:
        keys: ``E[kappa kappa^H]`` of the complex keys (see ``closed_form``) of each frequency,
            ``[d/2, G, G]`` complex128.
        cached: ``E[z z^T]`` of z, all keys without rotation, all values and a one, with every
            token weighted by the attention it gets, ``sum_im a^2`` (mean weight 1): errors of keys
            that nobody reads do not matter. ``[G (d + V) + 1, G (d + V) + 1]``.
        centre: ``E[x]`` of what keys and values are linear in, a one appended, weighted likewise,
            ``[D+1]``.
        energy: mean square of its numbers.
        queries: ``E[q q^T]`` per head, ``[H, d, d]``.
        sensitive: ``E[w q q^T]`` with ``w = sum_n a^2 |W_O (v_n - o)|^2``: what a small error of
            the keys, independent from token to token, does to the output; ``[H, d, d]``.
        overlap: ``E[sum_n a_i a_i']``, ``[H, H]``: how errors of values add up over heads.
        distances: share of attention at each distance, ``[H, T]``.
        output: ``E|y - E y|^2`` of the block's output.
    """

    keys: torch.Tensor
    cached: torch.Tensor
    centre: torch.Tensor
    energy: float
    queries: torch.Tensor
    sensitive: torch.Tensor
    overlap: torch.Tensor
    distances: torch.Tensor
    output: float

    def phase(self, turns: torch.Tensor) -> torch.Tensor:
        """``E[e^{i turn (m - n)}]`` under each head's attention, ``[H, n]`` for ``[n]`` turns."""
        waves = self._waves(turns)
        return self.distances.to(waves) @ waves

    def phase_between(self, turns: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """``phase`` of the differences, ``[H, n, k]`` for ``[n]`` turns and ``[k]`` others."""
        waves, back = self._waves(turns), self._waves(others).conj()
        return torch.stack([(waves * share[:, None]).mT @ back for share in self.distances])

    def _waves(self, turns: torch.Tensor) -> torch.Tensor:
        distance = torch.arange(self.distances.shape[1], device=turns.device)
        return torch.exp(1j * distance[:, None] * turns)


def turn_factor(frequencies: torch.Tensor, factor: float) -> torch.Tensor:
    """What cos and sin of these frequencies are multiplied with: only what turns is."""
    return torch.where(frequencies == 0, 1.0, factor).to(frequencies)


def felt_output(weights: AttentionWeights, importance: torch.Tensor | None) -> torch.Tensor:
    """``G W_O``, ``[D, H V]``: what the block's output is worth, on its way back to the heads.

    Args:
        weights: the source layer.
        importance: ``G [D, D]``, known to float32; None for plain squares.
    """
    output = weights.o[:, :-1]
    return output if importance is None else importance.float() @ output.float()


def working_projections(weights: AttentionWeights) -> list[torch.Tensor]:
    """``q``, ``k`` and ``v`` to multiply inputs with: bfloat16 where they are stored so and the
    device is fast at it, as the source itself does (``LayerReader.layer``); else float32."""
    parts = [weights.q, weights.k, weights.v]
    if weights.normed is None and multiplies_bfloat16(weights.q.device):
        narrow = [part.bfloat16() for part in parts]
        heads = zip(itertools.chain(*narrow), itertools.chain(*parts), strict=True)
        if all(torch.equal(new, old) for new, old in heads):  # one at a time: widened to compare
            return narrow
    return [part.float() for part in parts]


class Observer:
    """Sees the attention module of a layer at work and sums up.

    Args:
        weights: the source layer.
        spec: the source layer.
        frequencies: its rotary frequencies, ``[d/2]``.
        factor: what its rotary embedding multiplies cos and sin with.
        windows: the first so many windows count; later ones are held out and kept as they are.
        felt: ``felt_output`` of the layer.
        weigh: tokens count by the attention they get; False for all alike.
    """

    def __init__(
        self,
        weights: AttentionWeights,
        spec: AttentionSpec,
        frequencies: torch.Tensor,
        factor: float,
        windows: int,
        felt: torch.Tensor,
        *,
        weigh: bool = True,
    ) -> None:
        self.weights = weights
        self.weigh = weigh
        self.projections = working_projections(weights)
        blocks, felt = (
            part.float().unflatten(1, (spec.num_attention_heads, -1)).transpose(0, 1)
            for part in (weights.o[:, :-1], felt)
        )
        self.gram = blocks.mT @ felt  # [H, V, V]
        self.spec = spec
        self.frequencies, self.factor = frequencies, factor
        self.windows = windows
        self.held_out: list[HeldOut] = []
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens = 0
        self._weight = 0.0

    def watch(self, attention: nn.Module) -> None:
        """Sees every call of this attention module from now on."""
        attention.register_forward_hook(self._see, with_kwargs=True)

    def statistics(self) -> Statistics:
        """The means of all that was seen since it was last asked.

        Raises:
            MlakitError: there are numbers among them that are not finite.
        """
        sums, tokens = self._sums, self._tokens
        self._sums = {}
        if not all_finite(*sums.values()):
            raise MlakitError(
                "The activations are not finite numbers",
                remedy="check that the source itself works: mlakit generate",
            )
        mean = sums["output"] / tokens
        return Statistics(
            keys=sums["keys"] / tokens,
            cached=sums["cached"] / self._weight,
            centre=sums["centre"] / self._weight,
            energy=float(sums["energy"]) / tokens,
            queries=sums["queries"] / tokens,
            sensitive=sums["sensitive"] / tokens,
            overlap=sums["overlap"] / tokens,
            distances=sums["distances"] / tokens,
            output=float(sums["output_square"] / tokens - mean @ mean),
        )

    def _see(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        mask = kwargs.get("attention_mask")
        masks = [
            None if mask is None else mask[row if len(mask) > 1 else 0, 0]
            for row in range(len(hidden))
        ]
        counted = min(self.windows, len(hidden))
        self.windows -= counted
        if counted:
            self._add(hidden[:counted], output[0][:counted], masks)
        for x, y, own in list(zip(hidden, output[0], masks, strict=True))[counted:]:
            self.held_out.append(HeldOut(x.clone(), y.clone(), own))

    def _add(self, x: torch.Tensor, y: torch.Tensor, masks: Sequence[torch.Tensor | None]) -> None:
        """Some windows: inputs ``[b, T, D]``, outputs ``[b, T, D]``, masks ``[T, T]``.

        Products of one batch are float32, as their factors are; their sums are float64.
        """
        length, x, y = x.shape[1], x.flatten(0, 1), y.flatten(0, 1)
        query = self.weights.queries(x, self.projections[0])
        x = torch.cat([self.weights.inputs(x), x.new_ones(len(x), 1)], 1)
        key, value = (heads_of(x, part) for part in self.projections[1:])
        parts = zip(*(part.split(length, 1) for part in (query, key, value)), masks)
        seen = Attended.together([self._attention(*part) for part in parts])
        counts = seen.tokens if self.weigh else torch.ones_like(seen.tokens)
        kappa = torch.complex(*key.chunk(2, -1)).permute(2, 0, 1)  # [d/2, G, tokens]
        cached = torch.cat([*key, *value, x[:, -1:]], 1)
        self._tokens += len(x)
        self._weight += float(counts.double().sum())
        for name, term in {
            "keys": kappa @ kappa.mH,
            "cached": (cached * counts[:, None]).mT @ cached,
            "centre": counts @ x,
            "energy": x[:, :-1].square().mean(1).sum(),
            "queries": query.mT @ query,
            "sensitive": (query * seen.weight[..., None]).mT @ query,
            "overlap": seen.overlap,
            "distances": seen.distances,
            "output": y.sum(0, dtype=torch.float64),
            "output_square": y.square().sum(dtype=torch.float64),
        }.items():
            if name not in self._sums:
                wide = torch.complex128 if term.is_complex() else torch.float64
                self._sums[name] = torch.zeros_like(term, dtype=wide)
            self._sums[name] += term

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> Attended:
        """What one window's attention does, some queries at a time: no ``[H, T, T]`` is held."""
        heads, length, _ = query.shape
        repeats = heads // len(key)
        angles = torch.arange(length, device=query.device)[:, None] * self.frequencies.float()
        factor = turn_factor(self.frequencies, self.factor).float()
        turn = torch.polar(factor.expand_as(angles), angles)

        def rotate(part: torch.Tensor) -> torch.Tensor:
            turned = torch.complex(*part.chunk(2, -1)) * turn
            return torch.cat([turned.real, turned.imag], -1)

        query = rotate(query) * self.spec.softmax_scale
        key = rotate(key).mT.repeat_interleave(repeats, 0)  # [H, d, T]
        value = value.repeat_interleave(repeats, 0)
        turned = value @ self.gram  # v^T W_O^T W_O
        own = (turned * value).sum(-1, keepdim=True)
        keys = torch.cat([turned, own, torch.ones_like(own)], -1)
        weight = query.new_zeros(heads, length)
        tokens = query.new_zeros(length)
        overlap = query.new_zeros(heads, heads, dtype=torch.float64)
        distances = query.new_zeros(heads, length, dtype=torch.float64)
        for first, last in query_blocks(heads, length, length):
            rows = slice(first, last)  # no query sees a key behind the last of them
            scores = query[:, rows] @ key[..., :last]
            attention, slope = self._softmax(
                scores, first, None if mask is None else mask[rows, :last]
            )
            out = attention @ value[:, :last]
            read = (out @ self.gram * out).sum(-1)
            square = attention.square()
            tokens[:last] += square.sum((0, 1))
            if slope is not None:
                square = square.mul_(slope.square())
            # sum_n a^2 |W_O (v_n - o_m)|^2 of every query m, multiplied out
            met, own, count = (square @ keys[:, :last]).split([out.shape[-1], 1, 1], -1)
            felt = own[..., 0] + count[..., 0] * read - 2 * (met * out).sum(-1)
            weight[:, rows] = felt.clamp_min_(0)
            flat = attention.flatten(1)
            overlap += flat @ flat.mT
            distances[:, :last] += _by_distance(attention)
        return Attended(weight, tokens, overlap, distances)

    def _softmax(
        self, scores: torch.Tensor, first: int, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of scores ``[H, rows, T]``, and their slope where they are soft-capped.

        Args:
            scores: of the queries from ``first`` on, over all keys up to the last of them.
            first: position of the first query.
            mask: ``[rows, T]``; None for a causal one.
        """
        slope = None
        if self.spec.logit_softcap:
            capped = torch.tanh(scores / self.spec.logit_softcap)
            scores, slope = capped * self.spec.logit_softcap, 1 - capped.square()
        return hide(scores, first, mask).softmax(-1), slope


@dataclass(frozen=True)
class Attended:
    """Sums over one window's attention, see ``Statistics``.

    Attributes:
        weight: ``w`` of every query, ``[H, T]``.
        tokens: ``sum_im a^2`` of every key, ``[T]``.
        overlap: ``sum_mn a_i a_i'``, ``[H, H]`` float64.
        distances: attention at each distance, ``[H, T]`` float64.
    """

    weight: torch.Tensor
    tokens: torch.Tensor
    overlap: torch.Tensor
    distances: torch.Tensor

    @classmethod
    def together(cls, windows: Sequence[Attended]) -> Attended:
        """Those of some windows of one length, one after the other."""
        weight, tokens, overlap, distances = zip(*(vars(each).values() for each in windows))
        return cls(torch.cat(weight, 1), torch.cat(tokens), sum(overlap), sum(distances))


def query_blocks(heads: int, keys: int, queries: int) -> Iterator[tuple[int, int]]:
    """Ranges of queries whose scores over all keys are ``SCORES`` numbers or one query's."""
    rows = max(1, SCORES // (heads * keys))
    for first in range(0, queries, rows):
        yield first, min(first + rows, queries)


def hide(scores: torch.Tensor, first: int, mask: torch.Tensor | None) -> torch.Tensor:
    """Scores ``[..., rows, T]`` of the queries from ``first`` on, -inf where they do not look.

    Args:
        scores: over all keys up to the last query's own.
        first: position of the first query.
        mask: ``[..., rows, T]``, what a query sees or what is added; None for a causal one.
    """
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(first)
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float("-inf"))
    return scores + mask


def _by_distance(attention: torch.Tensor) -> torch.Tensor:
    """Sums of ``[H, rows, T]`` over queries, the newest keys' own, by distance, ``[H, T]``."""
    rows, length = attention.shape[1:]
    padded = nn.functional.pad(attention, (rows, 0))
    width = rows + length
    steps = (rows * width, width + 1, 1)  # down a column of it goes what is equally far back
    return padded.as_strided((len(padded), rows, length + 1), steps).sum(1)[:, 1:].flip(1)


@dataclass(frozen=True)
class HeldOut:
    """One window that no statistic has seen: inputs and outputs ``[T, D]``, mask ``[T, T]``."""

    inputs: torch.Tensor
    outputs: torch.Tensor
    mask: torch.Tensor | None


class Wrong(NamedTuple):
    """Squared error of an output: its share of the variance of the source's, and its mean over
    tokens in the metric that judges it; without one the share again."""

    share: float
    felt: float
