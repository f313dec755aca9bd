"""Who computes attention over keys and values of every head: transformers' function or ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from mlakit.ops.cpu_prefill import BLOCK, prefill


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention by the implementation that the model's config names.

    A long prompt on a CPU, where nothing is trained, is read in blocks (``ops.cpu_prefill``)
    wherever the config leaves it to torch.

    Args:
        module: the attention layer; its ``scaling``, ``softcap`` and ``attention_dropout`` hold.
        query: ``[B, H, S, E]``.
        key: ``[B, H, T, E]``.
        value: ``[B, H, T, V]``.
        attention_mask: what the host model makes for its attention implementation.
        **kwargs: passed on to transformers' function.

    Returns:
        ``[B, S, H, V]`` and, from the eager implementation, the weights ``[B, H, S, T]``.
    """
    implementation = module.config._attn_implementation
    dropout = module.attention_dropout if module.training else 0.0
    missing = 0
    if implementation == "sdpa":
        is_causal = kwargs.get("is_causal", True)
        if not dropout and reads_in_blocks(query, attention_mask, is_causal):
            scale = module.scaling
            return prefill(query, key, value, softmax_scale=scale, visible=attention_mask), None
        # torch's kernels that never hold all scores want values as wide as keys.
        missing = max(0, query.shape[-1] - value.shape[-1])
        value = nn.functional.pad(value, (0, missing)) if missing else value
    if module.softcap is not None:
        kwargs["softcap"] = module.softcap
    attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
        implementation, eager_attention_forward
    )
    output, weights = attention(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=module.scaling,
        **kwargs,
    )
    return (output[..., :-missing] if missing else output), weights


def reads_in_blocks(query: Tensor, attention_mask: Tensor | None, is_causal: bool = True) -> bool:
    """Whether ``ops.cpu_prefill``, forward only, can take torch's place for ``[B, H, S, E]``."""
    if query.device.type != "cpu" or torch.is_grad_enabled() or query.shape[2] < BLOCK:
        return False
    if attention_mask is None:
        return is_causal
    return attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1
