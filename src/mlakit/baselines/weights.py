"""Changed copies of a model, and what its layers see of a text."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mlakit.errors import UnsupportedModelError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def decoder_layers(model: PreTrainedModel) -> list[Any]:
    """The decoder layers of a model."""
    decoder: Any = model.get_decoder()
    return list(decoder.layers)


def attentions(model: PreTrainedModel) -> list[Any]:
    """The attention of every layer.

    Raises:
        UnsupportedModelError: the four projections are not modules of their own.
    """
    found = [layer.self_attn for layer in decoder_layers(model)]
    if not all(hasattr(module, name) for module in found for name in PROJECTIONS):
        raise UnsupportedModelError(
            f"{model.config.model_type} stores the projections of attention fused",
            remedy="leave this method out",
        )
    return found


def copied(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose weights may be changed."""
    return copy.deepcopy(model)


@torch.no_grad()
def watch_inputs(
    model: PreTrainedModel,
    ids: Tensor,
    modules: Mapping[Any, nn.Module],
    see: Callable[[Any, Tensor], None],
) -> None:
    """Runs windows ``[n, T]`` and shows ``see(key, x)`` the inputs ``[T, n]`` of modules."""
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, key=key: see(key, args[0].flatten(0, -2).float())
        )
        for key, module in modules.items()
    ]
    try:
        for window in ids:
            model(input_ids=window[None], use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
