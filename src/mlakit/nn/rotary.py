"""The rotary part of latent attention: frequencies, angles, and the turn itself."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mlakit.nn.configs import LatentConfig


class LatentRotaryEmbedding(LlamaRotaryEmbedding):
    """cos and sin of width R: the family's own schedule of R / rope_blocks dims, repeated.

    The schedule comes from transformers' functions, given a config whose head is one block wide;
    transformers itself recomputes the frequencies after loading on the meta device.
    """

    def __init__(self, config: LatentConfig) -> None:
        super().__init__(config.rope_schedule())  # type: ignore[arg-type]
        self.blocks = config.rope_blocks
        self.given = config.rope_inv_freq
        self.layer_inv_freq: Tensor | None
        self.register_buffer("layer_inv_freq", self.layer_frequencies(), persistent=False)

    def layer_frequencies(self) -> Tensor | None:
        """The frequencies that a config gives each layer, ``[layers, R/2]``, if it does."""
        return None if self.given is None else torch.tensor(self.given, dtype=torch.float32)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin ``[B, S, R]`` in x's dtype for ``position_ids`` ``[B, S]``.

        Where each layer has its own frequencies all layers' are stacked: ``[layers, B, S, R]``.
        """
        if self.layer_inv_freq is not None:
            angles = position_ids[None, :, :, None].float() * self.layer_inv_freq[:, None, None]
            angles = torch.cat((angles, angles), dim=-1)
            scale = self.attention_scaling
            return (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)
        cos, sin = super().forward(x, position_ids)
        if self.blocks == 1:
            return cos, sin
        half = cos.shape[-1] // 2
        return (
            cos[..., :half].repeat(1, 1, 2 * self.blocks),
            sin[..., :half].repeat(1, 1, 2 * self.blocks),
        )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns ``[B, H, S, R]`` by cos and sin ``[B, S, R]``, halves (re, im) side by side."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)
