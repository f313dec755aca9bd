"""Which weights train, in a converted model and in an ordinary one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from mlakit.errors import UnsupportedModelError
from mlakit.healing.lora import add_low_rank
from mlakit.healing.recipe import Recipe
from mlakit.nn.configs import LatentConfig
from mlakit.nn.latent_attention import MLAttention

LATENT_KV = ("kv_a_proj_with_mqa", "kv_b_proj", "k_b_proj", "v_b_proj", "q_up_proj")
"""The latent's down- and up-projections, in all forms. ``q_up_proj`` is the keys' one for what
turns: rotation stands between it and the latent, so it is applied to the queries; the source's own
``q_proj`` stays as it is."""

ORDINARY_KV = ("k_proj", "v_proj", "qkv_proj", "kv_a_proj_with_mqa", "kv_b_proj")
"""What makes keys and values where nothing was converted; some families fuse q with them."""


def attention_modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """The attention module of every decoder layer, by name."""
    for name, module in model.named_modules():
        if name.endswith(".self_attn"):
            yield name, module


def key_value_parts(module: nn.Module) -> tuple[str, ...]:
    """Names of the projections that keys and values go through in one attention module."""
    return LATENT_KV if isinstance(module, MLAttention) else ORDINARY_KV


def choose_trainable(model: PreTrainedModel, recipe: Recipe) -> dict[str, nn.Parameter]:
    """Freezes everything but the recipe's part.

    Trained weights become float32, frozen ones the recipe's dtype. The latent norm never trains:
    it is the identity.

    Returns:
        The parameters that train, by name; of ``lora`` those of the low-rank changes.
    """
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(recipe.train == "all" and "kv_a_layernorm" not in name)
    for _, module in attention_modules(model) if recipe.train != "all" else ():
        wanted = key_value_parts(module)
        for name, child in module.named_children():
            is_norm = name.endswith("norm")
            if recipe.train == "lora" and not is_norm:
                add_low_rank(child, recipe.lora_rank, recipe.seed)
            elif recipe.train != "lora":
                child.requires_grad_(name in wanted if recipe.train == "kv" else not is_norm)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise UnsupportedModelError(
            f"{model.config.model_type} has no weights of the part {recipe.train!r}",
            remedy="use --train attention or --train all",
        )
    dtype = getattr(torch, recipe.dtype or "float32")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
    return trained


def is_converted(model: PreTrainedModel) -> bool:
    """Whether mlakit converted it."""
    return isinstance(model.config, LatentConfig)
