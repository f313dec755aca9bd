"""The rotary part of latent attention: frequencies, angles, and the turn itself."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mlakit.nn.configs import LatentConfig


class LatentRotaryEmbedding(nn.Module):
    """cos and sin of width R: the family's own schedule of R / rope_blocks dims, repeated.

    A frequency is 0 where nothing turns: the last dimensions of a partly rotated head, and layers
    without positions. Schedules that differ between layers are stacked, each once.

    Args:
        config: a config with LatentConfig's fields.
    """

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        self.config = config
        frequencies, self.attention_scaling = inverse_frequencies(config)
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", frequencies, persistent=False)

    @torch.no_grad()
    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin ``[B, S, R]`` in x's dtype for ``position_ids`` ``[B, S]``.

        Where layers differ the schedules are stacked, ``[schedules, B, S, R]``, whatever the
        layer type that the family's model asks for; a layer picks by ``layer_schedules``.
        """
        frequencies = self.inv_freq
        if frequencies.dim() > 1:
            frequencies = frequencies[:, None, None]
        angles = position_ids[..., None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        scale = torch.where(frequencies == 0, 1.0, self.attention_scaling)  # of what turns
        scale = torch.cat((scale, scale), dim=-1)
        return (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)


def layer_schedules(config: LatentConfig) -> list[int] | None:
    """Which of the stacked schedules each layer has; None where all have the same."""
    keys = _keys(config)
    distinct = list(dict.fromkeys(keys))
    return [distinct.index(key) for key in keys] if len(distinct) > 1 else None


def inverse_frequencies(config: LatentConfig) -> tuple[Tensor, float]:
    """Frequencies ``[R/2]``, or ``[schedules, R/2]`` where layers differ, and a factor on cos, sin.

    They come from transformers' functions, given a config whose head is one block wide. They are
    real numbers even where a model is being built without memory, on the meta device.
    """
    with torch.device("cpu"):
        return _inverse_frequencies(config)


def _inverse_frequencies(config: LatentConfig) -> tuple[Tensor, float]:
    if config.rope_inv_freq is not None:
        table = torch.tensor(list(dict.fromkeys(_keys(config))), dtype=torch.float32)
        types = [config.layer_rope(layer) for layer in range(config.num_hidden_layers)]
        scaling = next((_schedule(config, kind)[1] for rotated, kind in types if rotated), 1.0)
        return (table if len(table) > 1 else table[0]), scaling
    rows, scaling = [], 1.0
    half = config.qk_rope_head_dim // config.rope_blocks // 2
    layers = range(config.num_hidden_layers)
    for rotated, layer_type in dict.fromkeys(config.layer_rope(layer) for layer in layers):
        row = torch.zeros(half)
        if rotated:
            turning, scaling = _schedule(config, layer_type)
            row[: len(turning)] = turning
        rows.append(row.repeat(config.rope_blocks))
    return (torch.stack(rows) if len(rows) > 1 else rows[0]), scaling


def _keys(config: LatentConfig) -> list[Hashable]:
    """Of each layer what its frequencies depend on."""
    if config.rope_inv_freq is not None:
        return [tuple(row) for row in config.rope_inv_freq]
    return [config.layer_rope(layer) for layer in range(config.num_hidden_layers)]


def _schedule(config: LatentConfig, layer_type: str | None) -> tuple[Tensor, float]:
    """The turning frequencies of one block, and transformers' factor on cos and sin."""
    schedule = config.rope_schedule(layer_type)
    rope = schedule.rope_parameters
    if rope["rope_type"] != "default":
        return ROPE_INIT_FUNCTIONS[rope["rope_type"]](schedule, torch.device("cpu"))
    dim = int(schedule.head_dim * rope.get("partial_rotary_factor", 1.0))
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    return 1.0 / (rope["rope_theta"] ** exponents), 1.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns ``[B, H, S, R]`` by cos and sin ``[B, S, R]``, halves (re, im) side by side."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)
