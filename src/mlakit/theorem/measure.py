"""Theorem 1 of TransMLA (arXiv 2502.07864, section 3) measured on the weights of a model.

At the same cache, latent attention expresses all that grouped attention does, and more:

* *all*: repeat W_K for every query head. The repeated W'_K ``[H d, D]`` has rank G d at most, so
  two factors with G d numbers between them give it back, and those are what is cached.
* *more*: two heads of one group read the same key, so the bilinear forms W_Q,h^T W_K,h of both,
  one above the other, have rank d at most, whatever W_Q is. With an up-projection per head they
  reach 2 d; one with orthogonal rows shows it before any training.

Both halves hold likewise for values. Biases count as one more column. Of queries and keys that
are normed, and at every distance of a rotary embedding, the same ranks hold: a norm's factor is
one number per head, and a rotation stands between W_Q and W_K.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlakit.checkpoint import Checkpoint, open_checkpoint
from mlakit.conversion.factor import article, augmented, read_weights
from mlakit.conversion.stream import LayerReader
from mlakit.errors import UnsupportedModelError
from mlakit.families import FAMILIES, convertible, read_model
from mlakit.spec import AttentionSpec

ROUNDING = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}
"""Largest relative rounding of a stored weight. A converted model's singular values that are
smaller, compared with its largest, are not told from rounding and count as none."""

EXACT = 1e-12
"""Largest relative error of a factorisation in float64 that still counts as none."""


@dataclass(frozen=True)
class Pairs:
    """Neighbouring heads of a group, two by two: how many directions each pair reads together.

    Attributes:
        smallest: rank of the pair that has least.
        largest: rank of the pair that has most.
        beyond: share of the squared singular values beyond the first d; mean over pairs.
        sizes: singular values of the first pair, the largest being 1.
    """

    smallest: int
    largest: int
    beyond: float
    sizes: tuple[float, ...]


@dataclass(frozen=True)
class Side:
    """Keys or values of one layer.

    Attributes:
        rank: of the projection repeated for every head; None for a converted model.
        error: largest error of its two factors' product, of its largest entry; likewise None.
        grouped: pairs in grouped attention, d directions at most; likewise None.
        latent: pairs with an up-projection per head: orthogonal ones, or the converted model's.
    """

    rank: int | None
    error: float | None
    grouped: Pairs | None
    latent: Pairs


@dataclass(frozen=True)
class LayerProof:
    """One layer.

    Attributes:
        heads: H.
        groups: G, of the source.
        head_dim: d, the bound of grouped attention.
        cached: numbers that grouped attention caches per token.
        cached_latent: numbers that latent attention caches instead.
        keys: of the scores.
        values: of the outputs.
    """

    layer: int
    heads: int
    groups: int
    head_dim: int
    cached: int
    cached_latent: int
    keys: Side
    values: Side

    @property
    def more(self) -> bool:
        """Whether every pair of heads reads more than grouped heads can."""
        return all(side.latent.smallest > self.head_dim for side in (self.keys, self.values))

    @property
    def holds(self) -> bool:
        """Whether the numbers are those of the theorem; of a converted model, the same cache."""
        exact = all(side.error is None or side.error < EXACT for side in (self.keys, self.values))
        return exact and self.cached == self.cached_latent and (self.more or self.converted)

    @property
    def converted(self) -> bool:
        """The up-projections are the model's own."""
        return self.keys.grouped is None


@dataclass(frozen=True)
class Proof:
    """What ``mlakit prove`` prints.

    Attributes:
        source: folder or hub id.
        model_type: transformers' name.
        layers: in order.
    """

    source: str
    model_type: str
    layers: tuple[LayerProof, ...]

    @property
    def converted(self) -> bool:
        """A converted model, of which is measured what its up-projections reach."""
        return self.layers[0].converted

    @property
    def holds(self) -> bool:
        """In every layer."""
        return all(layer.holds for layer in self.layers)

    @property
    def more(self) -> bool:
        """In every layer."""
        return all(layer.more for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, the verdicts beside the numbers."""
        verdict = {"converted": self.converted, "holds": self.holds, "more": self.more}
        return {**asdict(self), **verdict}


def prove(model: str | Path) -> Proof:
    """Theorem 1's numbers for every layer of a model with grouped heads, or of its conversion.

    Of a grouped model: rank and error of the factorisation, and what two heads of a group read
    together as they are and with orthogonal up-projections. Of an ``--equal-cache`` conversion:
    what two heads read together now, which training alone can raise above d.

    Args:
        model: folder or hub id; one layer's weights are read at a time.

    Raises:
        UnsupportedModelError: the theorem says nothing about this kind of attention.
    """
    checkpoint = open_checkpoint(model)
    spec = read_model(checkpoint.config)
    for index, layer in enumerate(spec.layers):
        _require_groups(checkpoint.source, index, layer)
    if spec.layers[0].mla_form:
        layers = tuple(_converted(checkpoint, i, layer) for i, layer in enumerate(spec.layers))
        return Proof(checkpoint.source, spec.model_type, layers)
    spec = convertible(checkpoint.config, checkpoint.shapes)
    checkpoint.download()
    reader = LayerReader(checkpoint, spec, torch.device("cpu"))
    found = tuple(_grouped(reader, index) for index in range(spec.num_hidden_layers))
    return Proof(checkpoint.source, spec.model_type, found)


def _require_groups(source: str, index: int, layer: AttentionSpec) -> None:
    """Refuses a layer in which no two heads share a key, all do, or a latent is not G d wide."""
    groups = layer.source_kv_heads or layer.num_key_value_heads
    if layer.kind == "mla" and layer.mla_form not in ("equal-cache", "article"):
        reason = (
            "its heads read one latent already (MLA), and the theorem compares grouped heads with"
            " a latent of the same size"
        )
    elif groups == layer.num_attention_heads:
        reason = "every head has a key of its own (MHA): no two of them share what a latent frees"
    elif groups == 1:
        reason = "all heads share one key (MQA), and a latent of that size holds nothing beside it"
    else:
        return
    raise UnsupportedModelError(
        f"Theorem 1 does not apply to layer {index} of {source}: {reason}",
        remedy="prove a model with grouped heads (GQA), or what convert --equal-cache made of"
        " one; mlakit inspect says what a model has",
    )


def _grouped(reader: LayerReader, index: int) -> LayerProof:
    spec, tensors = reader.spec.layers[index], reader.attention(index)
    weights = read_weights(tensors, spec)
    factors = article(weights, spec)
    down = augmented(factors, "kv_a_proj_with_mqa")
    down_v, down_k = down.chunk(2)
    heads, groups = spec.num_attention_heads, spec.num_key_value_heads
    noise = max(heads * spec.head_dim, spec.hidden_size) * torch.finfo(torch.float64).eps

    def side(own: Tensor, up: Tensor, down: Tensor, queries: Tensor | None) -> Side:
        each = own[weights.group_of_head]
        repeated = each.flatten(0, 1)
        blocks = torch.eye(len(down), dtype=torch.float64).unflatten(0, (groups, -1))
        orthogonal = blocks[torch.arange(heads) % groups]
        return Side(
            rank=_rank(torch.linalg.svdvals(repeated), noise),
            error=float((up @ down - repeated).abs().max() / repeated.abs().max()),
            grouped=_pairs(queries, each, groups, noise),
            # each factor carries the root of the singular values, and so the root of their noise
            latent=_pairs(queries, orthogonal @ down, groups, noise**0.5),
        )

    return LayerProof(
        layer=index,
        heads=heads,
        groups=groups,
        head_dim=spec.head_dim,
        cached=spec.cache_width,
        cached_latent=len(down),
        keys=side(weights.k, factors["k_b_proj.weight"], down_k, weights.q),
        values=side(weights.v, factors["v_b_proj.weight"], down_v, None),
    )


def _converted(checkpoint: Checkpoint, index: int, spec: AttentionSpec) -> LayerProof:
    """What a conversion's own up-projections reach, in the space that its latent is linear in."""
    prefix = FAMILIES[read_model(checkpoint.config).family].attention_prefix(index)
    names = [name for name in checkpoint.names if name.startswith(prefix)]
    tensors = {name.removeprefix(prefix): checkpoint.read(name) for name in names}
    rounding = max(ROUNDING[checkpoint.dtype(name)] for name in names)
    heads, width = spec.num_attention_heads, spec.cache_width
    groups = spec.source_kv_heads or 1
    down = augmented(tensors, "kv_a_proj_with_mqa")
    query = tensors["q_proj.weight"].double().unflatten(0, (heads, -1))
    if spec.mla_form == "article":
        down_v, down_k = down.chunk(2)
        up_k, up_v = (
            tensors[name].double().unflatten(0, (heads, -1))
            for name in ("k_b_proj.weight", "v_b_proj.weight")
        )
    else:
        down_v, down_k = down.split([spec.kv_lora_rank or 0, width - (spec.kv_lora_rank or 0)])
        up_k = tensors["q_up_proj.weight"].double().mT
        up_v = tensors["kv_b_proj.weight"].double().unflatten(0, (heads, -1))
    queries = None if spec.qk_norm else query
    return LayerProof(
        layer=index,
        heads=heads,
        groups=groups,
        head_dim=spec.head_dim,
        cached=2 * groups * spec.head_dim,
        cached_latent=width,
        keys=Side(None, None, None, _pairs(queries, up_k @ down_k, groups, rounding)),
        values=Side(None, None, None, _pairs(None, up_v @ down_v, groups, rounding)),
    )


def _pairs(queries: Tensor | None, keys: Tensor, groups: int, rounding: float) -> Pairs:
    """Measures heads two by two.

    ``W_Q^T W_K`` of a head is an isometry times ``R W_K``, with ``R`` of the QR decomposition of
    ``W_Q^T``: the singular values of the small matrix are those of the form.

    Args:
        queries: ``[H, d, D]``; None for values, whose forms are the projections themselves.
        keys: ``[H, d, D]``, what each head reads.
        groups: G; heads of one group are neighbours.
        rounding: singular values below this share of the largest are none.
    """
    if queries is not None:
        keys = torch.linalg.qr(queries.mT).R @ keys
    dim = keys.shape[1]
    members = keys.unflatten(0, (groups, -1))
    found = [torch.linalg.svdvals(pair) for pair in _two_by_two(members)]
    ranks = [_rank(sizes, rounding) for sizes in found]
    energies = [float(sizes[dim:].square().sum() / sizes.square().sum()) for sizes in found]
    first = (found[0] / found[0][0]).tolist()
    return Pairs(min(ranks), max(ranks), sum(energies) / len(energies), tuple(first))


def _two_by_two(members: Tensor) -> Iterator[Tensor]:
    """Neighbours of every group ``[G, n, d, D]``, one above the other ``[2 d, D]``."""
    for group in members:
        for first in range(0, len(group) - 1, 2):
            yield group[first : first + 2].flatten(0, 1)


def _rank(sizes: Tensor, rounding: float) -> int:
    return int((sizes > rounding * sizes[0]).sum())
