"""Latent attention in vLLM: what is before and after vLLM's own `MLAAttention`.

Imported by vLLM only (see ``vllm_plugin``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from mlakit.engines.shapes import Shape
from mlakit.spec import AttentionSpec


class HeadProjection(nn.Module):
    """A matrix per head ``[H, out, in]``; each rank has those of its heads."""

    def __init__(self, heads: int, out_features: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, out_features, in_features))
        self.weight.weight_loader = self.load  # type: ignore[attr-defined]

    def load(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Copies the matrices of this rank's heads."""
        heads = len(parameter)
        parameter.data.copy_(whole.narrow(0, get_tensor_model_parallel_rank() * heads, heads))

    def forward(self, x: Tensor) -> Tensor:
        """``[T, H, in]`` to ``[T, H, out]``."""
        return torch.einsum("thi,hoi->tho", x, self.weight)


class LatentAttention(nn.Module):
    """One layer's latent attention on vLLM's kernels and pages.

    Args:
        vllm_config: vLLM's settings.
        layer: the layer as stored.
        shape: its sizes as run.
        frequencies: of its R / 2 rotary pairs; zero for those that do not turn.
        factor: on cos and sin of the others.
        eps: of the norms on queries and keys.
        prefix: its name in the model.
    """

    def __init__(
        self,
        vllm_config: Any,
        layer: AttentionSpec,
        shape: Shape,
        frequencies: list[float],
        factor: float,
        eps: float,
        prefix: str,
    ) -> None:
        super().__init__()
        quant, cache = vllm_config.quant_config, vllm_config.cache_config
        self.layer, self.shape, self.factor = layer, shape, factor
        heads, hidden = layer.num_attention_heads, layer.hidden_size
        self.heads = heads // get_tensor_model_parallel_world_size()
        query, inputs = shape.nope + shape.rope, hidden
        self.inv_freq: Tensor
        turning = torch.tensor(frequencies, dtype=torch.float32)
        self.register_buffer("inv_freq", turning, persistent=False)
        if layer.qk_norm:
            inputs = self.add_normed_heads(quant, eps, prefix)
        width = heads * (layer.head_dim if layer.qk_norm else query)
        self.q_proj = ColumnParallelLinear(
            hidden, width, bias=layer.q_bias, quant_config=quant, prefix=f"{prefix}.q_proj"
        )
        self.kv_a_proj_with_mqa = ReplicatedLinear(
            inputs,
            shape.rank + shape.rope,
            bias=layer.kv_bias and not layer.indirect,
            quant_config=quant,
            prefix=f"{prefix}.kv_a_proj_with_mqa",
        )
        self.kv_b_proj = ColumnParallelLinear(
            shape.rank,
            heads * (shape.nope + shape.value),
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.kv_b_proj",
        )
        self.o_proj = RowParallelLinear(
            heads * shape.value,
            hidden,
            bias=layer.o_bias,
            quant_config=quant,
            prefix=f"{prefix}.o_proj",
        )
        self.attn = MLAAttention(
            num_heads=self.heads,
            scale=layer.softmax_scale,
            qk_nope_head_dim=shape.nope,
            qk_rope_head_dim=shape.rope,
            v_head_dim=shape.value,
            q_lora_rank=None,
            kv_lora_rank=shape.rank,
            kv_b_proj=self.kv_b_proj,
            cache_config=cache,
            quant_config=quant,
            prefix=f"{prefix}.attn",
        )

    def add_normed_heads(self, quant: Any, eps: float, prefix: str) -> int:
        """The source's keys and values, of which the latent is made where keys are normed.

        Returns:
            How many numbers they have together.
        """
        layer, dim = self.layer, self.layer.head_dim
        groups, hidden = layer.source_kv_heads or 1, layer.hidden_size
        keys, values = groups * dim, groups * layer.value_dim
        self.k_proj, self.v_proj = (
            ReplicatedLinear(
                hidden, width, bias=layer.kv_bias, quant_config=quant, prefix=f"{prefix}.{name}"
            )
            for name, width in (("k_proj", keys), ("v_proj", values))
        )
        self.q_norm, self.k_norm = RMSNorm(dim, eps=eps), RMSNorm(dim, eps=eps)
        self.q_up_proj = HeadProjection(self.heads, self.shape.nope + self.shape.rope, dim)
        return keys + values

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, D]``; ``positions`` are those of the T tokens."""
        tokens, shape = hidden_states.shape[0], self.shape
        query, inputs = self.q_proj(hidden_states)[0], hidden_states
        if self.layer.qk_norm:
            query = self.q_up_proj(self.normed(query, self.q_norm))
            key = self.normed(self.k_proj(hidden_states)[0], self.k_norm).flatten(1)
            inputs = torch.cat((key, self.v_proj(hidden_states)[0]), dim=-1)
        query = query.view(tokens, self.heads, shape.nope + shape.rope)
        q_nope, q_rope = query.split([shape.nope, shape.rope], dim=-1)
        row = self.kv_a_proj_with_mqa(inputs)[0]
        latent, k_rope = row.split([shape.rank, shape.rope], dim=-1)
        cos, sin = self.angles(positions, query.dtype)
        query = torch.cat((q_nope, rotate(q_rope, cos, sin)), dim=-1)
        k_rope = rotate(k_rope.unsqueeze(1), cos, sin)
        size = torch.Size((tokens, self.heads * shape.value))
        context = self.attn(query, latent.contiguous(), k_rope, output_shape=size)
        return self.o_proj(context)[0]

    def normed(self, x: Tensor, norm: nn.Module) -> Tensor:
        """``[T, heads * d]`` to ``[T, heads, d]``, head by head."""
        dim = self.layer.head_dim
        return norm(x.reshape(-1, dim)).view(x.shape[0], -1, dim)

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin ``[T, 1, R]``."""
        turns = positions[:, None].float() * self.inv_freq
        factor = torch.where(self.inv_freq == 0, 1.0, self.factor)
        cos, sin = turns.cos() * factor, turns.sin() * factor
        cos, sin = (torch.cat((x, x), dim=-1).unsqueeze(1).to(dtype) for x in (cos, sin))
        return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns ``[T, H, R]``, real parts first."""
    real, imaginary = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-imaginary, real), dim=-1) * sin
