"""What differs between families, kept out of the mathematics of conversion.

Every source layer is seen as one standard kind: queries of H heads, and keys and values that are
linear in some input (see ``normed``). Rows of a head are ordered as in ``families.layouts``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from mlakit.conversion.factor import AttentionWeights, Tensors, augmented, read_weights
from mlakit.conversion.normed import NormedHeads
from mlakit.conversion.rotate import Rotation, rorope
from mlakit.spec import AttentionSpec

if TYPE_CHECKING:
    from mlakit.conversion.stream import LayerReader


def source_weights(reader: LayerReader, index: int) -> AttentionWeights:
    """The float64 projections of a source layer, on the reader's device.

    Where queries and keys are normed, ``q`` maps each normed head to itself, and ``k`` and ``v``
    pick their half of the input that ``NormedHeads.inputs`` gives.
    """
    tensors, spec = reader.attention(index), reader.spec.layers[index]
    scale = input_scale(reader, index, tensors)
    if not spec.qk_norm:
        return read_weights(tensors, scale, spec)
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
        norm=_normed_scale(tensors, spec, scale, offset),
        normed=NormedHeads(tensors, spec, eps, offset),
    )


def input_scale(reader: LayerReader, index: int, tensors: Tensors) -> torch.Tensor:
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


def _normed_scale(
    tensors: Tensors, spec: AttentionSpec, scale: torch.Tensor, offset: float
) -> torch.Tensor:
    """The same of ``[k_norm(k) | v]``: each half of ``z / scale`` is as long as it is wide."""
    width = spec.num_key_value_heads * spec.head_dim
    gain = tensors["k_norm.weight"].double() + offset
    weight = tensors["v_proj.weight"].double() * scale
    spectral = float(torch.linalg.eigvalsh(weight @ weight.mT)[-1].clamp_min(0).sqrt())
    longest = spectral * math.sqrt(len(scale))
    if "v_proj.bias" in tensors:
        longest += float(tensors["v_proj.bias"].double().norm())
    values = gain.new_full((width,), longest / math.sqrt(width))
    return torch.cat([gain.repeat(width // len(gain)), values])


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
