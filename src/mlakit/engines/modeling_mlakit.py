"""A Llama whose attention is latent: one small row per token is cached instead of keys and values.

This file is part of a checkpoint that mlakit wrote. It needs torch and transformers (5.16 or newer)
and nothing else: the decoder is transformers' own, its attention is the one below. Queries and
latents are DeepSeek-V2's (arXiv 2405.04434, section 2.1); every layer has rotary frequencies of its
own, and the norm on the latent, which engines expect there, is the identity by a large epsilon.

The shape of ``LatentAttention.forward`` is what vLLM's Transformers backend looks for: there it
runs on vLLM's own kernels for latent attention, with a latent cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel


class MLALlamaConfig(LlamaConfig):
    """A LlamaConfig and the sizes of latent attention.

    ``head_dim`` is the number of values cached per token and layer, which engines read there.
    """

    model_type = "mla_llama"
    base_model_tp_plan = {  # noqa: RUF012 - as transformers spells it
        name: how
        for name, how in (LlamaConfig.base_model_tp_plan or {}).items()
        if ".self_attn." not in name
    }

    kv_lora_rank: int = 512
    qk_rope_head_dim: int = 64
    qk_nope_head_dim: int = 128
    v_head_dim: int = 128
    q_lora_rank: int | None = None
    softmax_scale: float = 192**-0.5
    rope_inv_freq: Any = None
    rope_attention_factor: float = 1.0
    q_bias: bool = False
    kv_a_bias: bool = False
    o_bias: bool = False
    latent_norm_eps: float = 4.0**14

    def validate_rope(self) -> None:
        """Nothing to check: ``rope_inv_freq`` holds every frequency."""


class LatentNorm(nn.Module):
    """An RMSNorm of a large epsilon: the identity up to rounding."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), eps**0.5))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Norms ``[..., C]``."""
        x = hidden_states.to(torch.float32)
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.variance_epsilon)
        return (self.weight.to(torch.float32) * x).to(hidden_states.dtype)


class LatentRotaryEmbedding(nn.Module):
    """cos and sin ``[schedules, B, S, R]``: layers that turn alike share a schedule."""

    def __init__(self, config: MLALlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.factor = config.rope_attention_factor
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", self.frequencies(), persistent=False)

    def frequencies(self) -> Tensor:
        """``[schedules, R/2]``; zero where nothing turns."""
        rows = dict.fromkeys(map(tuple, self.config.rope_inv_freq))
        with torch.device("cpu"):
            return torch.tensor(list(rows), dtype=torch.float32)

    @torch.no_grad()
    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Angles of ``position_ids`` ``[B, S]`` in x's dtype."""
        frequencies = self.inv_freq[:, None, None].float()
        angles = position_ids[..., None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        factor = torch.where(frequencies == 0, 1.0, self.factor)
        factor = torch.cat((factor, factor), dim=-1)
        return (angles.cos() * factor).to(x.dtype), (angles.sin() * factor).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns ``[B, H, S, R]``, real parts first, by cos and sin ``[B, S, R]``."""
    real, imaginary = x.chunk(2, dim=-1)
    turned = torch.cat((-imaginary, real), dim=-1)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention that also returns its weights ``[B, H, S, T]``."""
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class LatentAttention(nn.Module):
    """Latent attention: expanded to read a prompt, absorbed to continue one."""

    def __init__(self, config: MLALlamaConfig, layer_idx: int) -> None:
        super().__init__()
        if config.dtype == torch.float16 and config._attn_implementation == "vllm":
            raise ValueError("vLLM's norm loses this latent in float16: --dtype bfloat16")
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.num_key_value_groups = 1
        self.kv_lora_rank, self.v_head_dim = config.kv_lora_rank, config.v_head_dim
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.qk_rope_head_dim = config.qk_rope_head_dim
        self.qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        self.scaling, self.attention_dropout = config.softmax_scale, config.attention_dropout
        rows = list(map(tuple, config.rope_inv_freq))
        self.schedule = list(dict.fromkeys(rows)).index(rows[layer_idx])
        heads, hidden = config.num_attention_heads, config.hidden_size
        cached = self.kv_lora_rank + self.qk_rope_head_dim
        up = heads * (self.qk_nope_head_dim + self.v_head_dim)
        self.q_proj = nn.Linear(hidden, heads * self.qk_head_dim, bias=config.q_bias)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, cached, bias=config.kv_a_bias)
        self.kv_a_layernorm = LatentNorm(self.kv_lora_rank, config.latent_norm_eps)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, up, bias=False)
        self.o_proj = nn.Linear(heads * self.v_head_dim, hidden, bias=config.o_bias)

    def expand(self, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, 1, T, C]`` and ``[B, 1, T, R]`` to keys ``[B, H, T, N + R]`` and values."""
        sizes = [self.qk_nope_head_dim, self.v_head_dim]
        heads = self.kv_b_proj(latent[:, 0]).unflatten(-1, (-1, sum(sizes))).transpose(1, 2)
        k_nope, value = torch.split(heads, sizes, dim=-1)
        key = torch.cat((k_nope, k_rope.expand(-1, k_nope.shape[1], -1, -1)), dim=-1)
        return key, value

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``[B, S, D]`` to ``[B, S, D]`` and, where there are some, the attention weights.

        A cache holds the latent as its keys and the rotated key as its values, one head each.
        """
        batch, length = hidden_states.shape[:-1]
        query = self.q_proj(hidden_states).view(batch, length, -1, self.qk_head_dim)
        sizes = [self.qk_nope_head_dim, self.qk_rope_head_dim]
        q_nope, q_rope = torch.split(query.transpose(1, 2), sizes, dim=-1)
        row = self.kv_a_proj_with_mqa(hidden_states)
        latent, k_rope = torch.split(row, [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        latent = self.kv_a_layernorm(latent).view(batch, 1, length, self.kv_lora_rank)
        k_rope = k_rope.view(batch, 1, length, self.qk_rope_head_dim)
        cos, sin = position_embeddings
        cos, sin = cos[self.schedule], sin[self.schedule]
        q_rope, k_rope = rotate(q_rope, cos, sin), rotate(k_rope, cos, sin)
        if past_key_values is not None:
            past = past_key_values.get_seq_length(self.layer_idx)
            latent, k_rope = past_key_values.update(latent, k_rope, self.layer_idx)
            if past > 0:
                return self.decode(q_nope, q_rope, latent, k_rope, attention_mask, **kwargs)
        query = torch.cat((q_nope, q_rope), dim=-1)
        key, value = self.expand(latent, k_rope)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(batch, length, -1).contiguous()), weights

    def decode(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The up-projections at the query and the output, so that cached rows are read as they are.

        Heads become rows of one head's queries: no key is repeated.
        """
        batch, heads, length, _ = q_rope.shape
        ups = self.kv_b_proj.weight.view(heads, -1, self.kv_lora_rank)
        w_uk, w_uv = ups.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        query = torch.cat((torch.einsum("bhsn,hnc->bhsc", q_nope, w_uk), q_rope), dim=-1)
        key = torch.cat((latent, k_rope), dim=-1)
        if attention_mask is not None and length > 1:
            mask = attention_mask[..., : key.shape[2]].expand(batch, heads, length, -1)
            attention_mask = mask.reshape(batch, 1, heads * length, -1)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        context, weights = attend(
            self,
            query.reshape(batch, 1, heads * length, -1),
            key,
            key,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            is_causal=False,
            **kwargs,
        )
        context = context[..., : self.kv_lora_rank].reshape(batch, heads, length, -1)
        if weights is not None:
            weights = weights.view(batch, heads, length, -1)
        values = torch.einsum("bhsc,hvc->bshv", context, w_uv)
        return self.o_proj(values.flatten(2)), weights


class MLALlamaModel(LlamaModel):
    """A LlamaModel with latent attention."""

    config_class = MLALlamaConfig
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        **LlamaModel._can_record_outputs,
        "attentions": LatentAttention,
    }

    def __init__(self, config: MLALlamaConfig) -> None:
        # The attention that this builds is replaced; it need not be as wide as the cache.
        cached, config.head_dim = config.head_dim, config.qk_rope_head_dim
        super().__init__(config)
        config.head_dim = cached
        for index, layer in enumerate(self.layers):
            layer.self_attn = LatentAttention(config, index)
        rotary: Any = LatentRotaryEmbedding(config)
        self.rotary_emb = rotary
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        initialise(super()._init_weights, module)


class MLALlamaForCausalLM(LlamaForCausalLM):
    """A LlamaForCausalLM with latent attention."""

    config_class = MLALlamaConfig
    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(self, config: MLALlamaConfig) -> None:
        PreTrainedModel.__init__(self, config)  # not LlamaForCausalLM's, which builds a LlamaModel
        self.model = MLALlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        initialise(super()._init_weights, module)


@torch.no_grad()
def initialise(usual: Any, module: nn.Module) -> None:
    """The family's own initialisation, and that of the modules above."""
    usual(module)
    if isinstance(module, LatentNorm):
        module.weight.fill_(module.variance_epsilon**0.5)
    elif isinstance(module, LatentRotaryEmbedding):
        module.inv_freq.copy_(module.frequencies())
