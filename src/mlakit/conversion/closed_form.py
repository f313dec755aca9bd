"""The best latent layer that algebra alone gives, in the metric of the layer's own output.

Notation: query head i reads key head g(i); ``kappa[g, j] = k[g, j] + i k[g, j + d/2]`` are complex
keys, and RoPE gives a score the phase ``e^{-i theta_j (m - n)}``. A layer loses in two places:

* components whose rotation is dropped (``rotate.keep_rope`` chooses them). Their phase becomes a
  constant; the best one is its mean ``rho`` under the head's attention, shrunk towards 1 by what
  held-out text says (``phase_factor``).
* the joint low rank of unrotated keys and values. Errors dk, dv of a token, independent from
  token to token, change the block's output by ``E|dy|^2 = E[dk^T B_K dk + dv^T B_V dv]`` to first
  order; ``B^1/2 cov(k, v) B^1/2`` is cut at rank C (``output_axes``).

Constants are free: a constant added to all keys changes no softmax, and since attention sums to
one the mean of the values is a constant of the output, which goes to the bias of ``o_proj``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mlakit.conversion.factor import (
    AttentionWeights,
    LowRank,
    Tensors,
    balance_ratio,
    with_bias,
)
from mlakit.conversion.observe import Statistics, turn_factor
from mlakit.conversion.rotate import KeptRope, keep_rope
from mlakit.spec import AttentionSpec

FLOOR = 1e-9
"""Directions that matter less than this share of the most important one count as that much."""

UNSEEN = 1e-7
"""Every direction of the inputs has at least this share of their mean energy: a text that is short
or monotonous leaves some out, which must not be cut while there is rank for them."""


@dataclass(frozen=True)
class Rope:
    """How a layer keeps its positions.

    Attributes:
        kept: the key components that turn.
        gain: ``[H, R/2]`` complex: what each head's queries of kept components are multiplied
            with where these turn with another frequency than their own.
        dropped: ``[H, d/2]`` complex: the same in place of a dropped rotation.
    """

    kept: KeptRope
    gain: torch.Tensor
    dropped: torch.Tensor


def phase_factor(mean: torch.Tensor, shrinkage: float) -> torch.Tensor:
    """The constant in place of a phase of this mean: 1 at shrinkage 0, the mean itself at 1."""
    return 1 + shrinkage * (mean - 1)


def phase_error(mean: torch.Tensor, constant: torch.Tensor) -> torch.Tensor:
    """``E|phase - constant|^2`` of phases of absolute value one with this mean."""
    return 1 - 2 * (constant.conj() * mean).real + constant.abs().square()


def choose_rope(
    weights: AttentionWeights,
    statistics: Statistics,
    frequencies: torch.Tensor,
    factor: float,
    rope_dim: int,
    *,
    schedule: torch.Tensor | None,
    shrinkage: float,
    unitary: bool,
    sensitive: bool,
) -> Rope:
    """Which components turn, with what, and what the queries are multiplied with.

    Args:
        weights: the source layer.
        statistics: of its attention.
        frequencies: the source's, ``[d/2]``; zero where a pair does not turn.
        factor: what its rotary embedding multiplies cos and sin with.
        rope_dim: R.
        schedule: ``[R/2]`` frequencies of a fixed layout; None for each component's own.
        shrinkage: 0 ignores mean phases, 1 takes them as measured.
        unitary: complex mixing of heads.
        sensitive: weigh queries by what their scores do to the output.
    """
    groups = len(weights.k)
    mean = statistics.phase(frequencies)
    constant = phase_factor(mean, shrinkage)
    query = statistics.sensitive if sensitive else statistics.queries
    energy = query.diagonal(0, 1, 2).unflatten(1, (2, -1)).sum(1)  # [H, d/2]
    lost = energy * phase_error(mean, constant)
    avoided = None
    if schedule is not None:
        other = statistics.phase_between(frequencies, schedule)  # [H, d/2, R/2]
        left = energy[..., None] * phase_error(other, phase_factor(other, shrinkage))
        avoided = 1 - left.sum(0) / lost.sum(0).clamp_min(1e-30)[:, None]
    kept = keep_rope(
        statistics.keys,
        lost.unflatten(0, (groups, -1)).sum(1).mT,
        frequencies,
        rope_dim // 2,
        slots=schedule,
        avoided=avoided,
        unitary=unitary,
    )
    gain = phase_factor(statistics.phase(frequencies[kept.source] - kept.frequencies), shrinkage)
    factors = turn_factor(frequencies, factor).square()  # of scores: queries and keys have it
    own = factors[kept.source] / turn_factor(kept.frequencies, factor).square()
    return Rope(kept, gain * own, factors * constant)


def unrotated_keys(weights: AttentionWeights, kept: KeptRope) -> torch.Tensor:
    """What of the keys no kept component carries, ``[G d, D+1]``."""
    return _unrotated(weights.k, kept)


def _unrotated(keys: torch.Tensor, kept: KeptRope) -> torch.Tensor:
    """The same of any ``[G, d, n]``, ``[G d, n]``."""
    half = keys.shape[1] // 2
    kappa = torch.complex(keys[:, :half], keys[:, half:])  # [G, d/2, n]
    rest = torch.einsum("jgk,kjx->gjx", kept.remainder(half), kappa)
    return torch.cat([rest.real, rest.imag], 1).flatten(0, 1)


def unrotated_moment(cached: torch.Tensor, kept: KeptRope, dim: int) -> torch.Tensor:
    """``Statistics.cached`` without what the kept components carry, of the same shape.

    Args:
        cached: of keys of G heads of d dimensions, values and a one.
        kept: the components.
        dim: d.
    """
    groups = kept.mix.shape[1]
    for _ in range(2):  # rows, then columns
        keys, rest = cached.split([groups * dim, len(cached) - groups * dim])
        cached = torch.cat([_unrotated(keys.unflatten(0, (groups, dim)), kept), rest]).mT
    return cached


def key_metric(statistics: Statistics, spec: AttentionSpec, dropped: torch.Tensor) -> torch.Tensor:
    """``B_K [G, d, d]``: what errors of the unrotated keys of each group do to the output."""
    turn = real_form(torch.diag_embed(dropped))  # [H, d, d]
    heads = spec.softmax_scale**2 * turn @ statistics.sensitive @ turn.mT
    return heads.unflatten(0, (spec.num_key_value_heads, -1)).sum(1)


def value_metric(
    statistics: Statistics,
    spec: AttentionSpec,
    weights: AttentionWeights,
    felt: torch.Tensor,
) -> torch.Tensor:
    """``B_V [G V, G V]``: what errors of the values do to the output, in its metric.

    Args:
        statistics: of the layer's attention.
        spec: the source layer.
        weights: the source layer.
        felt: ``felt_output`` of the layer, ``[D, H V]``.
    """
    shape = (spec.num_key_value_heads, len(weights.q) // spec.num_key_value_heads, -1)
    output = weights.o[:, :-1].unflatten(1, shape)  # [D, G, H/G, V]
    overlap = statistics.overlap.view(*shape[:2], *shape[:2])
    blocks = []
    for group, shared in enumerate(overlap):
        gram = output[:, group].flatten(1).to(felt).mT @ felt  # [H/G V, H V], as exact as felt is
        pairs = gram.unflatten(1, shape).unflatten(0, (shape[1], -1))
        blocks.append(torch.einsum("nugmv,ngm->ugv", pairs.to(shared), shared).flatten(1))
    return torch.cat(blocks)


@dataclass(frozen=True)
class Axes:
    """Keys and values of a layer along axes that matter less and less: any rank is a prefix.

    The maps to the axes and back follow from these and the layer's weights, which are not repeated
    here.

    Attributes:
        energy: what each axis is worth in the metric, ``[G (d + V)]``, descending.
        rows: the axes, orthonormal where the metric is the identity, ``[G (d + V), G (d + V)]``.
        metric: ``B_K [G, d, d]`` and ``B_V [G V, G V]``.
        centre: ``[D+1]``, the mean of the inputs; None where means are no matter of their own.
    """

    energy: torch.Tensor
    rows: torch.Tensor
    metric: tuple[torch.Tensor, torch.Tensor]
    centre: torch.Tensor | None

    def cut(self, keys: torch.Tensor, values: torch.Tensor, rank: int, *, bias: bool) -> LowRank:
        """The first ``rank`` axes.

        Args:
            keys: unrotated keys, ``[G d, D+1]``.
            values: ``[G V, D+1]``.
            rank: C.
            bias: the latent may have a bias, and is then centred itself.
        """
        joint, axes = torch.cat([keys, values]), self.rows[:rank]
        roots, inverses = _roots(*self.metric)
        read, offset = axes @ roots, None
        down, up = read @ joint, inverses @ axes.mT
        key_up, value_up = up.split([len(keys), len(values)])
        if self.centre is not None:
            mean = joint @ self.centre
            if bias:
                down[:, -1] -= read @ mean
            offset = mean[len(keys) :] - value_up @ (down @ self.centre)
        kept = float(self.energy[:rank].sum() / self.energy.sum().clamp_min(1e-300))
        lost = float(self.energy[rank:].sum())
        return LowRank(down, key_up, value_up, kept, offset, lost)


def output_axes(
    weights: AttentionWeights,
    statistics: Statistics,
    kept: KeptRope,
    metric: tuple[torch.Tensor, torch.Tensor],
    *,
    centred: bool,
) -> Axes:
    """The axes whose first C harm the output least: PCA of ``[keys; values]`` in a metric.

    Args:
        weights: the source layer.
        statistics: of its attention.
        kept: the components that turn, which the keys are without.
        metric: ``B_K [G, d, d]`` and ``B_V [G V, G V]``.
        centred: means are no part of the latent; that of the values becomes ``offset``.
    """
    moment = unrotated_moment(statistics.cached, kept, weights.k.shape[1])
    covariance = moment[:-1, :-1].clone()
    if centred:
        covariance -= torch.outer(moment[:-1, -1], moment[:-1, -1])
    joint = torch.cat([unrotated_keys(weights, kept), weights.values])[:, :-1]
    covariance.addmm_(joint, joint.mT, alpha=UNSEEN * statistics.energy)
    roots = _roots(*metric)[0]
    energy, basis = torch.linalg.eigh(roots @ covariance @ roots)
    energy, basis = energy.flip(0).clamp_min(0), basis.flip(1)
    return Axes(energy, basis.mT, metric, statistics.centre if centred else None)


def balance_metric(
    weights: AttentionWeights, statistics: Statistics, kept: KeptRope
) -> tuple[torch.Tensor, torch.Tensor]:
    """TransMLA's balance in the shape of a metric: keys and values of equal mean length."""
    groups, dim = weights.k.shape[:2]
    width, rope_dim = groups * dim, 2 * len(kept.frequencies)
    squares = unrotated_moment(statistics.cached, kept, dim).diagonal()[:-1]
    keys, values = squares[:width], squares[width:]
    ratio = balance_ratio(keys, values, 0) * width / max(width - rope_dim, 1)
    unit = torch.eye(max(dim, len(values)), dtype=squares.dtype, device=squares.device)
    small, whole = unit[:dim, :dim], unit[: len(values), : len(values)]
    return small.expand(groups, -1, -1) / ratio**2, whole


def whole(keys: torch.Tensor, values: torch.Tensor) -> LowRank:
    """No low rank at all: the latent is ``[keys; values]``."""
    up = torch.eye(len(keys) + len(values), dtype=keys.dtype, device=keys.device)
    return LowRank(torch.cat([keys, values]), up[: len(keys)], up[len(keys) :], 1.0)


def latent_tensors(
    weights: AttentionWeights,
    spec: AttentionSpec,
    rope: Rope,
    low_rank: LowRank,
    *,
    query_up: bool = False,
) -> Tensors:
    """DeepSeek-shaped tensors of a layer, float64.

    The nope rows of each query are the source's own: what a dropped rotation is replaced by is
    multiplied into the head's up-projection.

    Args:
        weights: the source layer.
        spec: the source layer.
        rope: its rotations.
        low_rank: of its unrotated keys and values.
        query_up: queries stay the source's own, and a matrix per head makes all rows of them.

    Returns:
        ``q_proj [H (d + R), D]`` or ``q_up_proj [H, d + R, d]``, ``kv_a_proj_with_mqa [C + R, D]``,
        ``kv_b_proj [H (d + V), C]``, biases as the source has them, and ``o_proj.bias`` where
        values have an offset.
    """
    groups, dim = weights.k.shape[:2]
    group = weights.group_of_head
    key_up = low_rank.key_up.unflatten(0, (groups, dim))[group]  # [H, d, C]
    key_up = real_form(torch.diag_embed(rope.dropped)).mT @ key_up
    value_up = low_rank.value_up.unflatten(0, (groups, -1))[group]
    down = torch.cat([low_rank.down, _rope_keys(weights, rope.kept)])
    turning = rope_queries(rope, group, dim)
    if query_up:
        own = torch.eye(dim, dtype=turning.dtype, device=turning.device)
        query = {"q_up_proj.weight": torch.cat([own.expand(len(turning), -1, -1), turning], 1)}
    else:
        rows = torch.cat([weights.q, turning @ weights.q], 1).flatten(0, 1)
        query = with_bias("q_proj", rows, spec.q_bias)
    tensors = {
        **query,
        **with_bias("kv_a_proj_with_mqa", down, spec.kv_bias),
        "kv_b_proj.weight": torch.cat([key_up, value_up], 1).flatten(0, 1),
    }
    if low_rank.offset is not None:
        heads = low_rank.offset.unflatten(0, (groups, -1))[group].flatten()
        tensors["o_proj.bias"] = weights.o[:, -1] + weights.o[:, :-1] @ heads
    return tensors


def rope_queries(rope: Rope, group: torch.Tensor, dim: int) -> torch.Tensor:
    """Per head the map from its query to the R rotary dimensions, ``[H, R, d]``."""
    kept = rope.kept
    read = kept.spread[:, group].mT.conj() * rope.gain  # [H, R/2]
    at = torch.nn.functional.one_hot(kept.source, dim // 2).to(read)
    return real_form(read[..., None] * at)


def _rope_keys(weights: AttentionWeights, kept: KeptRope) -> torch.Tensor:
    """The kept components of the keys, ``[R, D+1]``."""
    half = weights.k.shape[1] // 2
    kappa = torch.complex(weights.k[:, :half], weights.k[:, half:])
    turning = torch.einsum("mg,gmx->mx", kept.mix, kappa[:, kept.source])
    return torch.cat([turning.real, turning.imag])


def real_form(matrix: torch.Tensor) -> torch.Tensor:
    """Complex matrices ``[..., m, n]`` as they act on real parts above imaginary ones."""
    first = torch.cat([matrix.real, -matrix.imag], -1)
    return torch.cat([first, torch.cat([matrix.imag, matrix.real], -1)], -2)


def _roots(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Square root of a block-diagonal metric, and its inverse, ``[G (d + V), G (d + V)]``."""
    parts = [torch.linalg.eigh((block + block.mT) / 2) for block in (keys, values)]
    floor = FLOOR * max(float(size.max()) for size, _ in parts)
    sizes = [(size.clamp_min(max(floor, 1e-300)).sqrt(), axes) for size, axes in parts]

    def assemble(power: int) -> torch.Tensor:
        blocks = [(axes * size[..., None, :] ** power) @ axes.mT for size, axes in sizes]
        return torch.block_diag(*blocks[0], blocks[1])

    return assemble(1), assemble(-1)
