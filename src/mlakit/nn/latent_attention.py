"""Latent attention inside a transformers model: expanded to read a prompt, absorbed to decode.

Three forms share one cache row per token, ``[c_kv | k_rope]`` (see ``AttentionSpec``). Without
history every form expands keys and values per head and calls transformers' attention function, so
it trains. With history the up-projections move to the query and the output, and attention reads
the cache rows themselves (DeepSeek-V2, arXiv 2405.04434, section 2.1; "absorb").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from mlakit.nn.attend import attend, reads_in_blocks
from mlakit.nn.cache import LatentCache
from mlakit.nn.configs import LatentConfig
from mlakit.nn.latent_parts import HeadProjection, LatentNorm, additive, last_columns
from mlakit.nn.rotary import layer_schedules, rotate
from mlakit.ops import mla_decode

HEADS_AT_ONCE = 8
"""Of a long history that is expanded: it is never held for more of them."""


class MLAttention(nn.Module):
    """The ``compress`` form: DeepSeek's latent attention, with any ranks, biases and scale.

    Args:
        config: a config with LatentConfig's fields.
        layer_idx: which decoder layer this is.
        norm: the family's RMSNorm, for the queries and keys of families that norm them.
    """

    def __init__(
        self, config: LatentConfig, layer_idx: int, norm: type[nn.Module] = LatentNorm
    ) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.kv_lora_rank = config.layer_rank(layer_idx)
        self.qk_rope_head_dim = config.qk_rope_head_dim
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.v_head_dim = config.v_head_dim
        self.scaling = config.softmax_scale
        self.softcap = getattr(config, "attn_logit_softcapping", None)
        self.sliding_window = config.layer_window(layer_idx)
        schedules = layer_schedules(config)
        self.schedule = None if schedules is None else schedules[layer_idx]
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.num_key_value_groups = 1
        heads, hidden = config.num_attention_heads, config.hidden_size
        self.qk_norm, self.source_rank = config.qk_norm, config.source_kv_lora_rank
        self.add_queries(config, norm)
        inputs = hidden
        if self.qk_norm:
            inputs = self.add_normed_heads(config, norm)
        elif self.source_rank:
            inputs = self.add_source_latent(config, norm)
        bias = config.kv_a_bias and not config.indirect
        width = config.head_dim - config.kv_lora_rank + self.kv_lora_rank
        self.kv_a_proj_with_mqa = nn.Linear(inputs, width, bias=bias)
        self.add_up_projections(config)
        self.o_proj = nn.Linear(heads * self.v_head_dim, hidden, bias=config.o_bias)

    def add_queries(self, config: LatentConfig, norm: type[nn.Module]) -> None:
        """The projection to queries, in two steps where the source's was."""
        width, rank = config.num_attention_heads * config.query_dim, config.q_lora_rank
        if rank is None:
            self.q_proj = nn.Linear(config.hidden_size, width, bias=config.q_bias)
            return
        self.q_a_proj = nn.Linear(config.hidden_size, rank, bias=config.q_bias)
        self.q_a_layernorm = norm(rank)
        self.q_b_proj = nn.Linear(rank, width, bias=False)

    def add_source_latent(self, config: LatentConfig, norm: type[nn.Module]) -> int:
        """The row that a latent source cached, before its rotation.

        Returns:
            How many numbers it has.
        """
        rank = config.source_kv_lora_rank or 0
        width = rank + (config.source_qk_rope_head_dim or 0)
        self.kv_proj = nn.Linear(config.hidden_size, width, bias=config.kv_a_bias)
        self.kv_norm = norm(rank)
        return width

    def add_normed_heads(self, config: LatentConfig, norm: type[nn.Module]) -> int:
        """The source's keys and values, which the latent is made of where keys are normed.

        Returns:
            How many numbers they have together.
        """
        heads, groups = config.num_attention_heads, config.source_kv_heads or 1
        width, values = groups * config.query_dim, groups * self.v_head_dim
        self.k_proj = nn.Linear(config.hidden_size, width, bias=config.kv_a_bias)
        self.v_proj = nn.Linear(config.hidden_size, values, bias=config.kv_a_bias)
        many = (heads, groups) if self.qk_norm == "projection" else (1, 1)
        self.q_norm, self.k_norm = (
            norm(count * config.query_dim, eps=config.rms_norm_eps) for count in many
        )
        return width + values

    def add_up_projections(self, config: LatentConfig) -> None:
        """The modules between the latent and the heads."""
        self.kv_a_layernorm = LatentNorm(self.kv_lora_rank, config.latent_norm_eps)
        heads, width = config.num_attention_heads, self.qk_nope_head_dim + self.v_head_dim
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, heads * width, bias=False)
        if config.maps_queries:
            width = self.qk_nope_head_dim + self.qk_rope_head_dim
            self.q_up_proj = HeadProjection(heads, width, config.query_dim)

    def split_heads(self, x: Tensor, norm: str) -> Tensor:
        """``[B, S, heads * d]`` to ``[B, S, heads, d]``, normed as a whole or head by head."""
        if self.qk_norm == "projection":
            x = getattr(self, norm)(x)
        x = x.unflatten(-1, (-1, self.config.query_dim))
        return getattr(self, norm)(x) if self.qk_norm == "head" else x

    def project_query(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, S, D]`` to the nope and rope parts of all heads, ``[B, H, S, N]`` and ``R``."""
        if self.config.q_lora_rank is None:
            q = self.q_proj(hidden_states)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        return self.split_query(self.split_heads(q, "q_norm").transpose(1, 2))

    def latent_inputs(self, hidden_states: Tensor) -> Tensor:
        """What the latent is linear in: x, ``[k_norm(k) | v]`` or ``[kv_norm(c) | k_rope]``."""
        if self.source_rank:
            row = self.kv_proj(hidden_states)
            latent = self.kv_norm(row[..., : self.source_rank])
            return torch.cat((latent, row[..., self.source_rank :]), dim=-1)
        if not self.qk_norm:
            return hidden_states
        key = self.split_heads(self.k_proj(hidden_states), "k_norm").flatten(-2)
        return torch.cat((key, self.v_proj(hidden_states)), dim=-1)

    def split_query(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Queries as projected to their nope and rope parts."""
        if self.config.maps_queries:
            q = self.q_up_proj(q)
        nope, rope = torch.split(q, [self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        return nope, rope

    def own_angles(self, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """cos and sin ``[B, S, R]`` of this layer: those of all layers, or its own of a stack."""
        cos, sin = position_embeddings
        return (cos, sin) if self.schedule is None else (cos[self.schedule], sin[self.schedule])

    def expand_kv(self, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, 1, T, C]`` and ``[B, 1, T, R]`` to keys ``[B, H, T, N + R]`` and values."""
        key, value = self.by_head(self.kv_b_proj(latent), k_rope)
        return key, value

    def by_head(self, expanded: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Some heads' part of ``kv_b_proj``'s output ``[B, 1, T, h (N + V)]`` to keys, values."""
        sizes = [self.qk_nope_head_dim, self.v_head_dim]
        heads = expanded[:, 0].unflatten(-1, (-1, sum(sizes))).transpose(1, 2)
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
        """Attention of S new tokens over themselves and all cached ones.

        Args:
            hidden_states: ``[B, S, D]``.
            position_embeddings: cos and sin ``[B, S, R]``, or a stack of them for all layers.
            attention_mask: what the host model makes for its attention implementation.
            past_key_values: a LatentCache, or any cache of transformers, which then holds the
                latent as its keys and the rotated key as its values, one head each.
            **kwargs: passed on to the attention function.

        Returns:
            ``[B, S, D]`` and, from the eager implementation, the weights ``[B, H, S, T]``.
        """
        batch, length = hidden_states.shape[:-1]
        q_nope, q_rope = self.project_query(hidden_states)
        compressed = self.kv_a_proj_with_mqa(self.latent_inputs(hidden_states))
        sizes = [self.kv_lora_rank, self.qk_rope_head_dim]
        latent, k_rope = torch.split(compressed, sizes, dim=-1)
        latent = self.kv_a_layernorm(latent).view(batch, 1, length, self.kv_lora_rank)
        k_rope = k_rope.view(batch, 1, length, self.qk_rope_head_dim)
        cos, sin = self.own_angles(position_embeddings)
        q_rope, k_rope = rotate(q_rope, cos, sin), rotate(k_rope, cos, sin)
        if past_key_values is not None:
            past = past_key_values.get_seq_length(self.layer_idx)
            if isinstance(past_key_values, LatentCache):
                rows = torch.cat((latent, k_rope), dim=-1)[:, 0]
                past_key_values.append(self.layer_idx, rows)
                if past > 0:
                    return self.decode_pages(q_nope, q_rope, past_key_values, **kwargs)
                latent, k_rope = past_key_values.stored(self.layer_idx, rows).split(sizes, dim=-1)
            else:
                latent, k_rope = past_key_values.update(latent, k_rope, self.layer_idx)
                if past > 0:
                    return self.decode(q_nope, q_rope, latent, k_rope, attention_mask, **kwargs)
        query = torch.cat((q_nope, q_rope), dim=-1)
        key, value = self.expand_kv(latent, k_rope)
        output, weights = attend(self, query, key, value, attention_mask, **kwargs)
        return self.o_proj(output.reshape(batch, length, -1).contiguous()), weights

    def up_projections(self) -> tuple[Tensor, Tensor]:
        """``W_UK [H, N, C]`` and ``W_UV [H, V, C]``, views of ``kv_b_proj``."""
        sizes = [self.qk_nope_head_dim, self.v_head_dim]
        heads = self.kv_b_proj.weight.view(-1, sum(sizes), self.kv_lora_rank)
        w_uk, w_uv = heads.split(sizes, dim=1)
        return w_uk, w_uv

    def absorb(self, q_nope: Tensor, q_rope: Tensor) -> Tensor:
        """Queries in the cache's own coordinates ``[B, H, S, C + R]``, or R without nope part."""
        if self.qk_nope_head_dim == 0:
            return q_rope
        q_latent = torch.einsum("bhsn,hnc->bhsc", q_nope, self.up_projections()[0])
        return torch.cat((q_latent, q_rope), dim=-1)

    def project(self, context: Tensor) -> Tensor:
        """Sums of latents ``[B, H, S, C]`` to the block's output ``[B, S, D]``."""
        values = torch.einsum("bhsc,hvc->bshv", context, self.up_projections()[1])
        return self.o_proj(values.flatten(2))

    def decode_pages(
        self, q_nope: Tensor, q_rope: Tensor, cache: LatentCache, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over the pages, mostly absorbed; in plain torch to return weights."""
        if kwargs.get("output_attentions"):
            count = max(cache.lengths)
            rows = cache.read(self.layer_idx, count).unsqueeze(1)
            latent, k_rope = rows.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
            seen = cache.visible(count, q_rope.shape[2], self.sliding_window)
            mask = additive(seen, q_rope.dtype)
            return self.decode(q_nope, q_rope, latent, k_rope, mask, **kwargs)
        if self.gains_by_expanding(q_rope):
            return self.o_proj(self.read_expanded(q_nope, q_rope, cache).flatten(2)), None
        layer = cache.layers[self.layer_idx]
        context, _ = mla_decode(
            self.absorb(q_nope, q_rope).transpose(1, 2),
            layer.pages,
            cache.block_table,
            cache.cache_seqlens,
            self.kv_lora_rank,
            softmax_scale=self.scaling,
            sliding_window=self.sliding_window,
            soft_cap=self.softcap,
            cache_format=layer.cache_format,
        )
        return self.project(context.transpose(1, 2)), None

    def gains_by_expanding(self, q_rope: Tensor) -> bool:
        """Whether ``[B, H, S, R]`` are so many queries that a cached row is better expanded.

        Per row and head that is C (N + V) products, and then N + V for every query, where the
        absorbed form has C for a value and, if N > 0, C for a key.
        """
        if self.config._attn_implementation != "sdpa" or not reads_in_blocks(q_rope, None):
            return False
        rank, nope = self.kv_lora_rank, self.qk_nope_head_dim
        expanded, absorbed = nope + self.v_head_dim, rank + (rank if nope else 0)
        return q_rope.shape[2] * (absorbed - expanded) > rank * expanded

    def read_expanded(self, q_nope: Tensor, q_rope: Tensor, cache: LatentCache) -> Tensor:
        """Values ``[B, S, H, V]`` that many new queries get from the pages, by some heads."""
        held, visible = self.read_pages(cache, q_rope.shape[2])
        latent, k_rope = held.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        query = torch.cat((q_nope, q_rope), dim=-1)
        height = HEADS_AT_ONCE * (self.qk_nope_head_dim + self.v_head_dim)
        values, maps = [], self.kv_b_proj.weight.split(height)
        for some, rows in zip(query.split(HEADS_AT_ONCE, dim=1), maps):
            key, value = self.by_head(nn.functional.linear(latent, rows), k_rope)
            values.append(attend(self, some, key, value, visible)[0])
        return torch.cat(values, dim=2)

    def read_pages(self, cache: LatentCache, length: int) -> tuple[Tensor, Tensor]:
        """Cached rows ``[B, 1, T, C + R]``, and which of S new queries see them, ``S, T``."""
        count, window = max(cache.lengths), self.sliding_window
        if window is not None:
            count = min(count, window + length - 1)
        rows = cache.read(self.layer_idx, count).unsqueeze(1)
        return rows, cache.visible(count, length, window)

    def decode(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The absorbed form on tensors ``[B, 1, T, C]`` and ``[B, 1, T, R]``.

        Heads become rows of one head's queries, so no key is repeated.
        """
        batch, heads, length, _ = q_rope.shape
        query = self.absorb(q_nope, q_rope).reshape(batch, 1, heads * length, -1)
        key, value = k_rope, latent
        if self.qk_nope_head_dim:
            key = value = torch.cat((latent, k_rope), dim=-1)
        if attention_mask is not None and length > 1:
            mask = attention_mask[..., : key.shape[2]].expand(batch, heads, length, -1)
            attention_mask = mask.reshape(batch, 1, heads * length, -1)
        context, weights = attend(
            self, query, key, value, attention_mask, is_causal=False, **kwargs
        )
        if weights is not None:
            weights = weights.view(batch, heads, length, -1)
        context = context[..., : self.kv_lora_rank].reshape(batch, heads, length, -1)
        return self.project(context), weights


class EqualCacheAttention(MLAttention):
    """The ``equal-cache`` form: keys are the source's merged keys, rotated; no nope part.

    Scores are RoPE(q_up[h] q_h) . RoPE(k) over the R = G d shared dims, values come from the
    latent alone, so at conversion it equals grouped-query attention exactly and trained it stays
    absorbable.
    """

    def split_query(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Queries ``[B, H, S, d]`` to an empty nope part and ``[B, H, S, R]``."""
        return q[..., :0], self.q_up_proj(q)

    def by_head(self, expanded: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Keys ``[B, h, T, R]``, a view of one shared key, and values ``[B, h, T, V]``."""
        value = expanded[:, 0].unflatten(-1, (-1, self.v_head_dim)).transpose(1, 2)
        return k_rope.expand(-1, value.shape[1], -1, -1), value


class ArticleAttention(MLAttention):
    """The ``article`` form (TransMLA v1, arXiv 2502.07864): keys are rotated after the expansion.

    The cache holds ``[c_v | c_k]`` unrotated, so a step expands and rotates all of it: nothing
    can be absorbed.
    """

    def add_up_projections(self, config: LatentConfig) -> None:
        """One up-projection for values and one for keys."""
        half, heads = self.kv_lora_rank // 2, config.num_attention_heads
        self.v_b_proj = nn.Linear(half, heads * self.v_head_dim, bias=False)
        self.k_b_proj = nn.Linear(half, heads * self.qk_rope_head_dim, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        key_position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As MLAttention; ``key_position_embeddings`` are cos and sin of all T tokens.

        Their last columns belong to the last cached tokens; without history
        ``position_embeddings`` serve the keys as well.
        """
        batch, length = hidden_states.shape[:-1]
        query = self.project_query(hidden_states)[1]
        query = rotate(query, *self.own_angles(position_embeddings))
        latent = self.kv_a_proj_with_mqa(self.latent_inputs(hidden_states)).unsqueeze(1)
        c_v, c_k = latent.chunk(2, dim=-1)
        if past_key_values is not None:
            past = past_key_values.get_seq_length(self.layer_idx)
            if not isinstance(past_key_values, LatentCache):
                c_v, c_k = past_key_values.update(c_v, c_k, self.layer_idx)
            else:
                past_key_values.append(self.layer_idx, latent[:, 0])
                c_v, c_k = past_key_values.stored(self.layer_idx, latent[:, 0]).chunk(2, dim=-1)
                if past > 0:
                    rows, seen = self.read_pages(past_key_values, length)
                    (c_v, c_k), attention_mask = rows.chunk(2, -1), additive(seen, query.dtype)
        cos, sin = self.own_angles(key_position_embeddings or position_embeddings)
        total = c_k.shape[2]
        key = self.k_b_proj(c_k).view(batch, total, -1, self.qk_rope_head_dim).transpose(1, 2)
        value = self.v_b_proj(c_v).view(batch, total, -1, self.v_head_dim).transpose(1, 2)
        key = rotate(key, last_columns(cos, total), last_columns(sin, total))
        output, weights = attend(self, query, key, value, attention_mask, **kwargs)
        return self.o_proj(output.reshape(batch, length, -1).contiguous()), weights

    def split_query(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Queries ``[B, H, S, R]`` to an empty nope part and themselves."""
        return q[..., :0], q


FORMS: dict[str, type[MLAttention]] = {
    "compress": MLAttention,
    "equal-cache": EqualCacheAttention,
    "article": ArticleAttention,
}
