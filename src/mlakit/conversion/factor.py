"""The factorisations behind a conversion: exact ones at equal cache, and the joint low rank.

Everything here is float64 algebra on the weights of one attention layer. A bias is carried as an
extra column: a projection is ``W @ [x; 1]`` with ``W [rows, D+1]``.

Keys are read as complex numbers. RoPE multiplies ``kappa[g, j] = k[g, j] + i k[g, j + d/2]`` by a
phase that is the same for all heads of a frequency, so every complex mixing of the G heads of one
frequency commutes with it; a real mixing of all dimensions does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from mlakit.conversion.normed import LatentHeads, NormedHeads
from mlakit.conversion.rotate import Rotation
from mlakit.spec import AttentionSpec

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class AttentionWeights:
    """The projections of one layer, float64.

    Attributes:
        q: ``[H, d, D+1]``; the last column is the bias, zero where the source has none.
        k: ``[G, d, D+1]``.
        v: ``[G, V, D+1]``; V = d but where the source is latent.
        o: ``[D, H V + 1]``, the output projection and its bias.
        normed: where queries and keys are not linear in x; ``q`` then acts on each head of
            ``normed.queries(x)`` and ``k`` and ``v`` on ``normed.inputs(x)``.
        value_heads: ``[H, V, C]`` of a source that is latent already. G is then 1, d and V are
            those of ``AttentionSpec.absorbed``, and ``q`` and ``o`` hold what is absorbed.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor
    normed: NormedHeads | LatentHeads | None = None
    value_heads: torch.Tensor | None = None

    def inputs(self, hidden: torch.Tensor) -> torch.Tensor:
        """What keys and values are linear in, for inputs ``[..., D]`` of the layer."""
        return hidden if self.normed is None else self.normed.inputs(hidden)

    def queries(self, hidden: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """Queries ``[H, T, d]`` for inputs ``[T, D]``; ``q`` is this layer's in their dtype."""
        if self.normed is not None:
            return self.normed.queries(hidden) @ q[..., :-1].mT
        return heads_of(torch.cat([hidden, hidden.new_ones(len(hidden), 1)], 1), q)

    @property
    def keys(self) -> torch.Tensor:
        """All keys as one projection ``[G d, D+1]``."""
        return self.k.flatten(0, 1)

    @property
    def values(self) -> torch.Tensor:
        """All values as one projection ``[G d, D+1]``."""
        return self.v.flatten(0, 1)

    @property
    def group_of_head(self) -> torch.Tensor:
        """``[H]``: the key/value head that each query head reads."""
        heads, groups = len(self.q), len(self.k)
        return torch.arange(heads, device=self.q.device) // (heads // groups)


def heads_of(rows: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """Heads ``[H, T, d]`` of rows ``[T, n]`` under ``[H, d, n]``, multiplied in its dtype."""
    found = functional.linear(rows.to(projection.dtype), projection.flatten(0, 1)).to(rows.dtype)
    return found.unflatten(1, projection.shape[:2]).transpose(0, 1)


def read_weights(tensors: Mapping[str, torch.Tensor], spec: AttentionSpec) -> AttentionWeights:
    """Collects a source layer's projections.

    Args:
        tensors: ``q_proj.weight``, ``k_proj.weight``, ``v_proj.weight``, ``o_proj.weight`` and
            their biases, if any.
        spec: the source layer.
    """

    def projection(name: str, heads: int) -> torch.Tensor:
        return augmented(tensors, name).view(heads, spec.head_dim, -1)

    return AttentionWeights(
        q=projection("q_proj", spec.num_attention_heads),
        k=projection("k_proj", spec.num_key_value_heads),
        v=projection("v_proj", spec.num_key_value_heads),
        o=augmented(tensors, "o_proj"),
    )


def augmented(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """A projection with its bias, or zeros, as the last column, float64."""
    weight = tensors[f"{name}.weight"].double()
    bias = tensors.get(f"{name}.bias")
    column = weight.new_zeros(len(weight)) if bias is None else bias.double()
    return torch.cat([weight, column[:, None]], 1)


def with_bias(name: str, augmented: torch.Tensor, bias: bool) -> Tensors:
    """Splits ``[rows, D+1]`` into the tensors ``name.weight`` and, if wanted, ``name.bias``."""
    tensors = {f"{name}.weight": augmented[:, :-1]}
    return tensors | ({f"{name}.bias": augmented[:, -1]} if bias else {})


def equal_cache(weights: AttentionWeights, spec: AttentionSpec) -> Tensors:
    """The equal-cache conversion in its absorbable form: exact, same bytes, nothing lost.

    The replicated key projection ``W'_K`` (TransMLA, arXiv 2502.07864, section 4) is decomposed
    frequency by frequency with a complex SVD at full rank. The unitary factor mixes the G heads
    of a frequency, commutes with RoPE and is undone by ``q_up``; the rest is what is cached, so
    the cached keys carry their rotation and the up-projection can be absorbed into the query.
    Values have no rotation: an ordinary orthogonal SVD of ``W'_V``.

    Returns:
        ``q_up_proj.weight [H, G d, d]``, ``kv_a_proj_with_mqa.weight [2 G d, D]`` (value rows
        first) and its bias, ``kv_b_proj.weight [H d, G d]``; float64. The query and output
        projections stay as they are.
    """
    heads, half = len(weights.q), spec.head_dim // 2
    groups = weights.group_of_head
    kappa = torch.complex(weights.k[:, :half], weights.k[:, half:]).transpose(0, 1)  # [d/2, G, D+1]
    unitary = _left_singular_vectors(kappa)  # [d/2, G (head), G (component)]
    latent = (unitary.mH @ kappa).transpose(0, 1).flatten(0, 1)  # [G d/2, D+1], component-major
    keys = torch.cat([latent.real, latent.imag])

    # conj(q) kappa_g = conj(q) sum_b U[g, b] latent_b: component b of head i reads q conj(U[g, b])
    mixing = unitary[:, groups].conj().permute(1, 2, 0)  # [H, G (component), d/2]
    real, imag = torch.diag_embed(mixing.real), torch.diag_embed(mixing.imag)
    real, imag = real.flatten(1, 2), imag.flatten(1, 2)  # [H, G d/2, d/2]
    q_up = torch.cat([torch.cat([real, -imag], 2), torch.cat([imag, real], 2)], 1)

    basis = _left_singular_vectors(weights.values)  # [G d, G d], orthogonal
    up = basis.view(len(weights.v), spec.head_dim, -1)[groups]
    return {
        "q_up_proj.weight": q_up,
        "kv_b_proj.weight": up.reshape(heads * spec.head_dim, -1),
        **with_bias(
            "kv_a_proj_with_mqa", torch.cat([basis.mT @ weights.values, keys]), spec.kv_bias
        ),
    }


def article(weights: AttentionWeights, spec: AttentionSpec) -> Tensors:
    """The equal-cache conversion as the TransMLA article writes it (arXiv 2502.07864, section 4).

    ``W'_K [H d, D]`` (each head's copy of its group's keys) has rank G d; its SVD is split in two
    halves ``U sqrt(S)`` and ``sqrt(S) V^T``, and likewise for values. Keys are rotated after the
    up-projection, so this form cannot be absorbed.

    Returns:
        ``k_b_proj.weight``, ``v_b_proj.weight [H d, G d]`` and ``kv_a_proj_with_mqa.weight
        [2 G d, D]`` (value rows first) with its bias; float64.
    """
    up_k, down_k = _balanced_svd(weights.keys, weights)
    up_v, down_v = _balanced_svd(weights.values, weights)
    return {
        "k_b_proj.weight": up_k,
        "v_b_proj.weight": up_v,
        **with_bias("kv_a_proj_with_mqa", torch.cat([down_v, down_k]), spec.kv_bias),
    }


def compress_query(weights: AttentionWeights, rotation: Rotation) -> torch.Tensor:
    """The query projection of the partial-RoPE model and of its compressed form.

    Returns:
        ``[H (d + R), D+1]``: per head the d original rows, then the R rows that meet the shared
        rotated key.
    """
    groups, dim = weights.k.shape[:2]
    per_group = rotation.rope.view(-1, groups, dim).transpose(0, 1)  # [G, R, d]
    rope = per_group[weights.group_of_head] @ weights.q
    return torch.cat([weights.q, rope], 1).flatten(0, 1)


def balance_ratio(key_moment: torch.Tensor, value_moment: torch.Tensor, rope_dim: int) -> float:
    """How much longer the unrotated keys' columns are than the values', as published.

    Both are means over columns of their root mean square. The published code drops the first
    ``rope_dim`` columns of both tensors; for the values that is an oversight, kept here because
    this method is the baseline that others are measured against.

    Args:
        key_moment: diagonal of ``E[k k^T]`` of the unrotated keys, ``[G d - R]``.
        value_moment: diagonal of ``E[v v^T]``, ``[G d]``.
        rope_dim: R.
    """
    value = float(value_moment[rope_dim:].clamp_min(0).sqrt().mean())
    key = float(key_moment.clamp_min(0).sqrt().mean())
    return key / value if key > 0 and value > 0 else 1.0


@dataclass(frozen=True)
class LowRank:
    """A joint low rank of unrotated keys and values.

    Attributes:
        down: ``[C, D+1]``, from the layer's input to the latent.
        key_up: ``[G d, C]``, from the latent to the unrotated keys.
        value_up: ``[G d, C]``, from the latent to the values.
        kept: share of the weighted energy of both that the latent carries.
        offset: ``[G d]``, a constant to add to the values; None for none.
        lost: the weighted energy that it does not carry.
    """

    down: torch.Tensor
    key_up: torch.Tensor
    value_up: torch.Tensor
    kept: float
    offset: torch.Tensor | None = None
    lost: float = 0.0


def joint_low_rank(
    weights: AttentionWeights, rotation: Rotation, moment: torch.Tensor, rank: int
) -> LowRank:
    """Balanced joint PCA of the unrotated keys and the values (TransMLA, arXiv 2502.07864v3).

    The covariance of ``z = [k_nope / ratio; v]`` follows from the second moment of the layer's
    inputs alone, because z is linear in them. It is not centred, as published.

    Args:
        weights: the source layer.
        rotation: which components are not part of it.
        moment: ``E[x x^T]`` of the inputs with a one appended, ``[D+1, D+1]`` float64.
        rank: C, at most ``2 G d - R``.
    """
    keys, values = rotation.nope @ weights.keys, weights.values
    width, rope_dim = len(keys), len(rotation.rope)
    ratio = 1.0
    if width:
        ratio = balance_ratio(
            torch.einsum("ij,jk,ik->i", keys, moment, keys),
            torch.einsum("ij,jk,ik->i", values, moment, values),
            rope_dim,
        )
    joint = torch.cat([keys / ratio, values])
    energy, basis = torch.linalg.eigh(joint @ moment @ joint.mT)
    basis = basis.flip(1)[:, :rank]
    energy = energy.flip(0).clamp_min(0)
    return LowRank(
        down=basis.mT @ joint,
        key_up=rotation.nope.mT @ basis[:width] * ratio,
        value_up=basis[width:],
        kept=float(energy[:rank].sum() / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)),
    )


def compress(
    weights: AttentionWeights,
    spec: AttentionSpec,
    rotation: Rotation,
    low_rank: LowRank,
) -> Tensors:
    """DeepSeek-shaped tensors of a compressed layer; the output projection stays as it is.

    Returns:
        ``q_proj [H (d + R), D]``, ``kv_a_proj_with_mqa [C + R, D]`` (latent rows first),
        ``kv_b_proj [H 2d, C]`` (per head key rows, then value rows) and the biases; float64.
    """
    groups, dim = weights.k.shape[:2]
    key_up = low_rank.key_up.view(groups, dim, -1)
    value_up = low_rank.value_up.view(groups, dim, -1)
    up = torch.cat([key_up, value_up], 1)[weights.group_of_head].flatten(0, 1)
    down = torch.cat([low_rank.down, rotation.rope @ weights.keys])
    return {
        **with_bias("q_proj", compress_query(weights, rotation), spec.q_bias),
        **with_bias("kv_a_proj_with_mqa", down, spec.kv_bias),
        "kv_b_proj.weight": up,
    }


def latent_bound(down: torch.Tensor, norm: torch.Tensor) -> float:
    """A bound on the mean square of a latent, valid for every input.

    The layer's input is ``x = norm * n`` with ``|n|^2 <= D`` (an RMSNorm's output), so
    ``|W x + b| <= |W diag(norm)|_2 sqrt(D) + |b|``.

    Args:
        down: ``[C, D+1]``, float64.
        norm: ``[D]``.
    """
    scaled = down[:, :-1] * norm
    spectral = math.sqrt(max(float(torch.linalg.eigvalsh(scaled @ scaled.mT)[-1]), 0.0))
    length = spectral * math.sqrt(len(norm)) + float(down[:, -1].norm())
    return length**2 / len(down)


def identity_norm_exponent(mean_square: float) -> int:
    """The k for which an RMSNorm with ``eps = 4^k`` and weight ``2^k`` is the identity in float32.

    ``4^k >= 2^24 mean_square``: adding the mean square to eps then changes no bit of it.
    """
    return max(0, math.ceil(math.log(max(mean_square, 1e-30) * 2.0**24, 4)))


def all_finite(*tensors: torch.Tensor) -> bool:
    """Whether all numbers are finite; needs no memory, and of half precision no wide copy."""
    real = (torch.view_as_real(each) if each.is_complex() else each for each in tensors)
    limits = (limit for each in real if each.numel() for limit in each.aminmax())
    return all(math.isfinite(float(limit)) for limit in limits)


def _left_singular_vectors(matrix: torch.Tensor) -> torch.Tensor:
    """Left singular vectors ``[..., n, n]``, largest first; unitary whatever the rank."""
    return torch.linalg.eigh(matrix @ matrix.mH).eigenvectors.flip(-1)


def _balanced_svd(
    projection: torch.Tensor, weights: AttentionWeights
) -> tuple[torch.Tensor, torch.Tensor]:
    """``U sqrt(S) [H d, G d]`` and ``sqrt(S) V^T [G d, D+1]`` of the replicated projection.

    Replicating each head n = H/G times multiplies by ``sqrt(n)`` times an isometry, so the SVD of
    the replicated projection follows from that of the projection itself.
    """
    heads, (groups, dim) = len(weights.q), weights.k.shape[:2]
    repeats = heads // groups
    left, sizes, right = torch.linalg.svd(projection, full_matrices=False)
    missing = groups * dim - len(sizes)  # a projection wider than its input has no full rank
    left = torch.nn.functional.pad(left, (0, missing))
    right = torch.nn.functional.pad(right, (0, 0, 0, missing))
    root = torch.nn.functional.pad(sizes * math.sqrt(repeats), (0, missing)).sqrt()
    up = left.view(groups, dim, -1)[weights.group_of_head].flatten(0, 1) / math.sqrt(repeats)
    return up * root, root[:, None] * right
