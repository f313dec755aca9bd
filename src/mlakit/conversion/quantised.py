"""Latents that are cached in few bits: their basis in the weights, and their rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mlakit.conversion.adapt import stored_tensors
from mlakit.conversion.card import converted_config
from mlakit.conversion.factor import Tensors
from mlakit.conversion.plan import ConversionPlan
from mlakit.conversion.stream import LayerReader
from mlakit.conversion.student import Student, layer_schedule
from mlakit.nn.even_latent import even_attention
from mlakit.ops.cache_format import CacheFormat


def in_even_basis(
    reader: LayerReader,
    plan: ConversionPlan,
    index: int,
    tensors: Tensors,
    facts: dict[str, Any],
) -> Tensors:
    """A converted layer with its latent in the basis that suits few bits: the same function.

    Args:
        reader: the source.
        plan: the result's sizes.
        index: of the layer.
        tensors: named as on disk below ``self_attn.``.
        facts: what is known of the layer.
    """
    config = converted_config(reader.checkpoint.config, plan, reader.spec, 0)
    turns = facts.get("frequencies") or layer_schedule(config, index).tolist()
    spec, target = reader.spec.layers[index], plan.layers[index]
    whole = stored_tensors(tensors, reader.attention(index), spec, target)
    attention = Student(config, index, whole, turns, reader.device).attention
    name = reader.family.input_norm
    norm = None if name is None else getattr(reader.layer(index).layers[0], name)
    even_attention(attention, norm)
    state = attention.state_dict()
    changed = ("kv_a_proj_with_mqa.weight", "kv_a_proj_with_mqa.bias", "kv_b_proj.weight")
    return {
        name: state[name].double() if name in changed else tensor
        for name, tensor in tensors.items()
    }


def round_latents(attention: Any, kind: str) -> None:
    """From here on a layer's latents are what a cache of this kind gives back.

    Args:
        attention: of the form ``compress``.
        kind: of the cache.
    """

    def hook(norm: nn.Module, inputs: Any, latent: Tensor) -> Tensor:
        flat = latent.flatten(0, -2)
        how, slots = CacheFormat(kind, flat.shape[1], 0), torch.arange(len(flat))
        slots = slots.to(flat.device)
        pages = how.allocate(1, len(flat), flat.device)
        how.append(pages, slots, flat)
        return how.read(pages, slots, flat.dtype).view(latent.shape)

    attention.kv_a_layernorm.register_forward_hook(hook)
