"""What differs between families, kept out of the mathematics of conversion.

Every source layer is seen as one standard kind: queries of H heads, and keys and values that are
linear in some input (see ``normed``). Rows of a head are ordered as in ``families.layouts``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from mlakit.conversion.factor import AttentionWeights, Tensors, augmented, read_weights
from mlakit.conversion.normed import LatentHeads, NormedHeads
from mlakit.conversion.rotate import Rotation, rorope
from mlakit.spec import AttentionSpec

if TYPE_CHECKING:
    from mlakit.conversion.stream import LayerReader


def source_weights(reader: LayerReader, index: int) -> AttentionWeights:
    """The float64 projections of a source layer, on the reader's device.

    Where queries and keys are normed, ``q`` maps each normed head to itself, and ``k`` and ``v``
    pick their half of the input that ``NormedHeads.inputs`` gives. A latent source is seen in its
    absorbed form (``AttentionSpec.absorbed``): ``k`` and ``v`` pick from the row it caches.
    """
    tensors, spec = reader.attention(index), reader.spec.layers[index]
    if spec.kv_lora_rank is not None:
        return _absorbed_weights(reader, tensors, spec)
    if not spec.qk_norm:
        return read_weights(tensors, spec)
    heads, groups, dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
    with_bias = torch.eye(dim, dim + 1, dtype=torch.float64, device=reader.device)
    width = groups * dim
    halves = torch.eye(2 * width, 2 * width + 1, dtype=torch.float64, device=reader.device)
    keys, values = halves.split(width)
    offset, eps = reader.family.norm_offset, float(reader.spec.config.get("rms_norm_eps") or 1e-6)
    return AttentionWeights(
        q=with_bias.expand(heads, -1, -1),
        k=keys.view(groups, dim, -1),
        v=values.view(groups, dim, -1),
        o=augmented(tensors, "o_proj"),
        normed=NormedHeads(tensors, spec, eps, offset),
    )


def _absorbed_weights(
    reader: LayerReader, tensors: Tensors, spec: AttentionSpec
) -> AttentionWeights:
    heads, rank, nope = spec.num_attention_heads, spec.kv_lora_rank or 0, spec.qk_nope_head_dim or 0
    interleaved = reader.spec.config.get("rope_interleave", True)
    layout = replace(reader.family.layout, interleaved=bool(interleaved))
    order = layout.order(spec.absorbed)
    row = torch.eye(spec.cache_width, spec.cache_width + 1, dtype=torch.float64).to(reader.device)
    up = tensors["kv_b_proj.weight"].double().unflatten(0, (heads, -1))
    w_uk, w_uv = up.split([nope, spec.value_dim], 1)
    query = row.new_zeros(heads, spec.cache_width, spec.head_dim + 1)
    query[:, :rank, :nope] = w_uk.mT
    query[:, rank:, nope:-1] = row[rank:, rank:-1]
    output = augmented(tensors, "o_proj")
    blocks = output[:, :-1].unflatten(1, (heads, -1))
    absorbed = torch.einsum("xhv,hvc->xhc", blocks, w_uv).flatten(1)
    return AttentionWeights(
        q=query[:, order],
        k=row[order][None],
        v=row[None, :rank],
        o=torch.cat([absorbed, output[:, -1:]], 1),
        normed=LatentHeads(tensors, spec),
        value_heads=w_uv,
    )


def input_scale(
    reader: LayerReader, index: int, tensors: Tensors, *, qk_norm: bool, rank: int | None
) -> torch.Tensor:
    """``[n]`` float64, such that every z that keys and values are linear in, of n numbers, has
    ``|z / scale|^2 <= n``.

    Args:
        reader: the source.
        index: of the layer.
        tensors: of its attention.
        qk_norm: its keys are normed.
        rank: of its latent; None where it has none.
    """
    scale = _hidden_scale(reader, index)
    if rank is not None:
        return _row_scale(tensors, rank, scale)
    return _normed_scale(tensors, scale, reader.family.norm_offset) if qk_norm else scale


def _row_scale(tensors: Tensors, rank: int, scale: torch.Tensor) -> torch.Tensor:
    """``input_scale`` of the row ``[kv_norm(c) | k_rope]`` that a latent source caches."""
    weight = tensors["kv_proj.weight"][rank:].double() * scale
    bias = tensors.get("kv_proj.bias", scale.new_zeros(rank + len(weight)))[rank:].double()
    rope = weight.new_full((len(weight),), _longest(weight, bias) / math.sqrt(len(weight)))
    return torch.cat([tensors["kv_norm.weight"].double().abs(), rope])


def _longest(weight: torch.Tensor, bias: torch.Tensor) -> float:
    """A bound on ``|W n + b|`` for every n of mean square 1."""
    spectral = float(torch.linalg.eigvalsh(weight @ weight.mT)[-1].clamp_min(0).sqrt())
    return spectral * math.sqrt(weight.shape[1]) + float(bias.norm())


def _hidden_scale(reader: LayerReader, index: int) -> torch.Tensor:
    """``[D]`` float64, such that every input x of attention has ``|x / scale|^2 <= D``.

    An RMSNorm in front of attention gives its weight; a bias counts beside it, since
    ``|w n + b| <= (|w| + |b|) max(|n|, 1)``. Where attention reads the residual stream
    itself, that is at most the largest embedding and what the normed blocks before have added.
    """
    family, read = reader.family, reader.checkpoint.read
    size = reader.spec.hidden_size
    if family.input_norm is not None:
        norm = f"{family.layer(index)}{family.input_norm}"
        weight = read(f"{norm}.weight").double() + family.norm_offset
        if family.norm_bias:
            weight = (weight.abs() + read(f"{norm}.bias").double().abs()) * math.sqrt(2)
        return weight.to(reader.device)
    largest = reader.longest_embedding
    for before in range(index):
        for norm in family.norms:
            weight = read(f"{family.layer(before)}{norm}.weight").double() + family.norm_offset
            largest += math.sqrt(size) * float(weight.abs().max())
    bound = largest / math.sqrt(size)
    return torch.full((size,), bound, dtype=torch.float64, device=reader.device)


def _normed_scale(tensors: Tensors, scale: torch.Tensor, offset: float) -> torch.Tensor:
    """The same of ``[k_norm(k) | v]``: each half of ``z / scale`` is as long as it is wide."""
    width = len(tensors["v_proj.weight"])
    gain = tensors["k_norm.weight"].double() + offset
    weight = tensors["v_proj.weight"].double() * scale
    bias = tensors.get("v_proj.bias", weight.new_zeros(width)).double()
    values = gain.new_full((width,), _longest(weight, bias) / math.sqrt(width))
    return torch.cat([gain.repeat(width // len(gain)), values])


def own_heads(tensors: Tensors, weights: AttentionWeights, target: AttentionSpec) -> Tensors:
    """From the absorbed form of a latent source back to its own heads; others as they are.

    The nope rows of a query are the source's own head, or where no rotation is dropped those of
    its dimensions that never turn.

    Args:
        tensors: what the factorisation gives.
        weights: the source layer.
        target: the converted one.
    """
    if weights.value_heads is None:
        return tensors
    heads, nope = len(weights.q), target.qk_nope_head_dim
    up = weights.q[..., :-1].mT  # [H, N + R, C + R], of the source
    query, row = tensors["q_proj.weight"].unflatten(0, (heads, -1)), up.shape[2]
    key, value = tensors["kv_b_proj.weight"].unflatten(0, (heads, -1)).tensor_split([row], 1)
    own = torch.eye(up.shape[1], dtype=up.dtype, device=up.device)[:nope].expand(heads, -1, -1)
    rows = torch.cat([(up @ key)[:, :nope], weights.value_heads @ value], 1)
    kept = {name: part for name, part in tensors.items() if name != "q_proj.weight"}
    return kept | {
        "q_up_proj.weight": torch.cat([own, query[:, row:]], 1),
        "kv_b_proj.weight": rows.flatten(0, 1),
    }


def stored_tensors(
    tensors: Tensors, source: Tensors, spec: AttentionSpec, target: AttentionSpec
) -> Tensors:
    """A converted layer as it is written: the new tensors and those kept of the standard source.

    Args:
        tensors: what the factorisation gives; or a layer that is whole already.
        source: the standard source layer's.
        spec: the source layer.
        target: the converted one.
    """
    new = dict(tensors)
    if spec.qk_norm and not (target.mla_form == "compress" and "q_up_proj.weight" in new):
        new.pop("kv_a_proj_with_mqa.bias", None)  # zero: the biases are those of k_proj and v_proj
        new.pop("q_proj.bias", None)
        query = new.pop("q_proj.weight", None)
        if query is not None:
            new["q_up_proj.weight"] = query.unflatten(0, (spec.num_attention_heads, -1))
    kept = set(target.tensor_shapes()) & set(source) - set(new)
    return new | {name: source[name] for name in kept}


def partial_rorope(moment: torch.Tensor, spec: AttentionSpec, rope_dim: int, fold: int) -> Rotation:
    """``rorope`` for heads of which only some dimensions turn; the others lose nothing.

    Args:
        moment: ``E[k k^T]`` of the standard layer, ``[G d, G d]`` float64.
        spec: the source layer.
        rope_dim: R, a divisor of the turning dimensions.
        fold: frequencies per group.
    """
    groups, dim, turning = spec.num_key_value_heads, spec.head_dim, spec.rotary_dim
    if turning == dim:
        return rorope(moment, groups, rope_dim, fold)
    of_head = torch.arange(dim, device=moment.device) % (dim // 2) < turning // 2
    turns = of_head.repeat(groups)
    part = rorope(moment[turns][:, turns], groups, rope_dim, fold)

    def widened(rows: torch.Tensor) -> torch.Tensor:
        wide = rows.new_zeros(len(rows), groups * dim)
        wide[:, turns] = rows
        return wide

    still = torch.eye(groups * dim, dtype=moment.dtype, device=moment.device)[~turns]
    return Rotation(widened(part.rope), torch.cat([widened(part.nope), still]), part.frequencies)
