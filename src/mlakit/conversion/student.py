"""The latent attention that tensors make, as the result will run it, beside the source's layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig

from mlakit.conversion.factor import Tensors
from mlakit.conversion.observe import HeldOut
from mlakit.nn.configs import LatentConfig
from mlakit.nn.hf import register
from mlakit.nn.latent_attention import MLAttention
from mlakit.nn.rotary import LatentRotaryEmbedding

WIDE_EXPONENT = 30
"""k of a latent norm that is the identity for any latent in float32."""


def latent_config(values: dict[str, Any]) -> LatentConfig:
    """The config object that a result's ``config.json`` describes."""
    register()
    known: Any = AutoConfig.for_model(**values)
    known._attn_implementation = "eager" if values.get("attn_logit_softcapping") else "sdpa"
    found: LatentConfig = known
    return found


class Student:
    """One layer's latent attention in float32, for judging and fitting it.

    Args:
        config: the result's ``config.json``.
        index: of the layer.
        tensors: named as on disk below ``self_attn.``.
        frequencies: ``[R/2]``, what its rotary dimensions turn with.
        device: where it runs.
    """

    def __init__(
        self,
        config: dict[str, Any],
        index: int,
        tensors: Tensors,
        frequencies: Sequence[float],
        device: torch.device,
    ) -> None:
        rank = tensors["kv_b_proj.weight"].shape[1]
        sizes = {
            "kv_lora_rank": rank,
            "latent_norm_eps": 4.0**WIDE_EXPONENT,
            "rope_inv_freq": [list(frequencies)] * config["num_hidden_layers"],
            "o_bias": "o_proj.bias" in tensors,
        }
        known = latent_config({**config, **sizes})
        norm = torch.full((rank,), 2.0**WIDE_EXPONENT)
        state = {name: tensor.float() for name, tensor in tensors.items()}
        with torch.device("meta"):
            self.attention = MLAttention(known, index)
        self.attention.load_state_dict({**state, "kv_a_layernorm.weight": norm}, assign=True)
        self.attention.requires_grad_(False).to(device).eval()
        self.rotary = LatentRotaryEmbedding(known).to(device)

    def __call__(self, inputs: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The block's output for inputs ``[b, T, D]``, mask ``[T, T]`` or None for causal."""
        positions = torch.arange(inputs.shape[1], device=inputs.device)[None]
        output, _ = self.attention(
            hidden_states=inputs,
            position_embeddings=self.rotary(inputs, positions),
            attention_mask=None if mask is None else mask[None, None],
        )
        return output

    @torch.no_grad()
    def error(self, windows: Sequence[HeldOut]) -> float:
        """Squared error of the output over the variance of the source's, on held-out windows."""
        wrong, whole = 0.0, 0.0
        mean = torch.stack([window.outputs.mean(0) for window in windows]).mean(0)
        for window in windows:
            output = self(window.inputs[None], window.mask)[0]
            wrong += float((output - window.outputs).double().square().sum())
            whole += float((window.outputs - mean).double().square().sum())
        return wrong / max(whole, 1e-30)
