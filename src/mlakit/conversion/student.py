"""The latent attention that tensors make, as the result will run it, beside the source's layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from mlakit.conversion.factor import Tensors
from mlakit.conversion.observe import HeldOut, Wrong
from mlakit.nn.configs import LatentConfig
from mlakit.nn.hf import register
from mlakit.nn.models import build_attention
from mlakit.nn.rotary import LatentRotaryEmbedding, inverse_frequencies, layer_schedules

WIDE_EXPONENT = 30
"""k of a latent norm that is the identity for any latent in float32."""


def latent_config(values: dict[str, Any]) -> LatentConfig:
    """The config object that a result's ``config.json`` describes."""
    register()
    known: Any = AutoConfig.for_model(**values)
    known._attn_implementation = "eager" if values.get("attn_logit_softcapping") else "sdpa"
    found: LatentConfig = known
    return found


def layer_schedule(values: dict[str, Any], index: int, theta: float | None = None) -> torch.Tensor:
    """The ``[R/2]`` frequencies, float64, that a ``config.json`` gives a layer without its own.

    Args:
        values: the config.
        index: of the layer.
        theta: ``rope_theta`` in place of the config's.
    """
    config = {**values, "rope_inv_freq": None}
    if theta is not None:
        config["rope_parameters"] = {**config["rope_parameters"], "rope_theta": theta}
    known = latent_config(config)
    frequencies, rows = inverse_frequencies(known)[0], layer_schedules(known)
    return (frequencies if rows is None else frequencies[rows[index]]).double()


class Student(nn.Module):
    """One layer's latent attention in float32, in place of the source's own.

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
        super().__init__()
        rank = tensors["kv_b_proj.weight"].shape[1]
        sizes = {
            "kv_lora_rank": rank,
            "kv_lora_ranks": None,
            "latent_norm_eps": 4.0**WIDE_EXPONENT,
            "rope_inv_freq": [list(frequencies)] * config["num_hidden_layers"],
            "o_bias": "o_proj.bias" in tensors,
        }
        known = latent_config({**config, **sizes})
        norm = torch.full((rank,), 2.0**WIDE_EXPONENT)
        state = {name: tensor.float() for name, tensor in tensors.items()}
        with torch.device("meta"):
            self.attention = build_attention(known, index)
        self.attention.load_state_dict({**state, "kv_a_layernorm.weight": norm}, assign=True)
        self.attention.requires_grad_(False).to(device).eval()
        self.rotary = LatentRotaryEmbedding(known).to(device)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """The block's output for inputs ``[b, T, D]``; the rest as the family's layer gives it."""
        positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
        output, _ = self.attention(
            hidden_states=hidden_states,
            position_embeddings=self.rotary(hidden_states, positions),
            attention_mask=attention_mask,
        )
        return output, None

    @torch.no_grad()
    def error(self, windows: Sequence[HeldOut], importance: torch.Tensor | None = None) -> Wrong:
        """What the output misses on held-out windows.

        Args:
            windows: inputs and outputs of the source's layer.
            importance: ``[D, D]``, a metric of the output.
        """
        plain, felt, whole, tokens = 0.0, 0.0, 0.0, 0
        metric = None if importance is None else importance.float()
        mean = torch.stack([window.outputs.mean(0) for window in windows]).mean(0)
        for window in windows:
            mask = None if window.mask is None else window.mask[None, None]
            output = self(window.inputs[None], mask)[0][0]
            change = output - window.outputs
            plain += float(change.square().sum(dtype=torch.float64))
            whole += float((window.outputs - mean).square().sum(dtype=torch.float64))
            tokens += len(change)
            if metric is not None:
                felt += float(((change @ metric) * change).sum(dtype=torch.float64))
        share = plain / max(whole, 1e-30)
        return Wrong(share, share if metric is None else felt / tokens)
