"""A prefix as latents: some of its tokens, or all of them made from what the source itself sees.

All heads read one latent, so a token stays or goes for all of them together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from mlakit.baselines.prefix import Prefix
from mlakit.baselines.tokens import Rule, attention_scores, choose, kept
from mlakit.baselines.weights import decoder_layers
from mlakit.errors import MlakitError
from mlakit.evaluation.quality import feed
from mlakit.nn.cache import LatentCache
from mlakit.nn.hf import attention_specs, new_cache
from mlakit.nn.latent_attention import MLAttention
from mlakit.ops.cache_format import slots_of


class ThinnedCache(LatentCache):
    """Some tokens of one sequence; what is fed next keeps its true position.

    Attributes:
        gone: tokens that were read and are no longer held.
    """

    gone = 0

    def reset(self) -> None:
        """Forgets every token, those that went before too."""
        super().reset()
        self.gone = 0

    def begin_step(self, batch: int, length: int, attention_mask: Tensor | None = None) -> None:
        """Plans new tokens after those held, at positions after those read."""
        super().begin_step(batch, length, attention_mask)
        self.positions = self.positions + self.gone

    @classmethod
    def of(cls, model: PreTrainedModel, cache: LatentCache, chosen: list[Tensor]) -> ThinnedCache:
        """The chosen tokens of each layer, as they are held: nothing is rounded twice.

        Args:
            model: whose cache it is.
            cache: with one sequence.
            chosen: per layer, tokens to keep ``[n]``, ascending.
        """
        read, keep = cache.lengths[0], len(chosen[0])
        room = cache.max_length - read + keep
        thin = cls(attention_specs(model), 1, room, dtype=model.dtype, device=model.device)
        places = torch.arange(keep, device=model.device)
        for old, new, rows in zip(cache.layers, thin.layers, chosen, strict=True):
            new.pages[_where(thin, places)] = old.pages[_where(cache, rows)]
            new.columns = read
        thin.lengths, thin.columns, thin.gone = [keep], read, read - keep
        thin.cache_seqlens += keep
        return thin


def _where(cache: LatentCache, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Page and place in it of tokens ``[n]`` of the first sequence."""
    slots = slots_of(cache.block_table[:1], rows[None], cache.block_size)[0]
    return slots // cache.block_size, slots % cache.block_size


def latent_scores(
    attention: MLAttention, queries: Tensor, rows: Tensor, weights: Tensor, scale: float
) -> Tensor:
    """Attention that each latent gets, summed over queries by weight and over all heads.

    Args:
        attention: of the layer.
        queries: ``[1, H, P, N + R]``, rotated.
        rows: ``[c_kv | k_rope]`` of the tokens ``[P, C + R]``.
        weights: of each query ``[P]``.
        scale: factor on the scores.

    Returns:
        ``[1, P]``, float32.
    """
    sizes = [attention.qk_nope_head_dim, attention.qk_rope_head_dim]
    absorbed = attention.absorb(*queries.split(sizes, dim=-1))
    return attention_scores(absorbed, rows[None, None, :, -absorbed.shape[-1] :], weights, scale)


def evict_latents(rule: Rule, share: float, prefix: Prefix) -> Cache:
    """A latent cache with the tokens that the rule chooses, the same for all heads."""
    cache = latents(prefix)
    length = len(prefix.ids)
    weights, keep = rule.weights(length), kept(share, length)
    chosen = []
    for index, layer in enumerate(decoder_layers(prefix.model)):
        rows = cache.read(index, length)[0]
        scores = latent_scores(layer.self_attn, prefix.queries[index], rows, weights, prefix.scale)
        chosen.append(choose(scores, rule, keep)[0])
    return ThinnedCache.of(prefix.model, cache, chosen)


def latents(prefix: Prefix) -> LatentCache:
    """The cache of a prefix that a converted model read."""
    if not isinstance(prefix.cache, LatentCache):
        raise MlakitError(
            "a prefix without latents has none to keep", remedy="read it with a converted model"
        )
    return prefix.cache


@torch.no_grad()
def latents_of_source(source: PreTrainedModel, prefix: Prefix) -> Cache:
    """The latents of a prefix, made from the hidden states of the source instead of the model's.

    Args:
        source: the model that was converted.
        prefix: as the converted model read it.
    """
    model = prefix.model
    cache = new_cache(model, 1, latents(prefix).max_length)
    positions = torch.arange(len(prefix.ids), device=model.device)[None]
    decoder: Any = model.get_decoder()

    def fill(attention: MLAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        angles = decoder.rotary_emb(hidden, positions)
        attention(hidden, position_embeddings=angles, past_key_values=cache)

    handles = [
        own.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs, to=other.self_attn: fill(to, args, kwargs), with_kwargs=True
        )
        for own, other in zip(decoder_layers(source), decoder_layers(model), strict=True)
    ]
    try:
        feed(source, prefix.ids, new_cache(source, 1, len(prefix.ids)), seen=0, last_only=True)
    finally:
        for handle in handles:
            handle.remove()
    return cache
