"""Model classes of converted checkpoints: the family's own layers around latent attention."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from mlakit.families import FAMILIES
from mlakit.nn.cache import LatentCache
from mlakit.nn.configs import CONFIGS, LatentConfig
from mlakit.nn.latent_attention import FORMS, MLAttention
from mlakit.nn.latent_parts import HeadProjection, LatentNorm
from mlakit.nn.rotary import LatentRotaryEmbedding, inverse_frequencies


def build_attention(config: LatentConfig, layer_idx: int) -> MLAttention:
    """The latent attention of one layer, with the norms of its family."""
    package, prefix = _package(type(config))
    norm = getattr(package, f"{prefix}RMSNorm", LatentNorm)  # families without one norm no keys
    return FORMS[config.mla_form](config, layer_idx, norm)


def _package(config: Any) -> tuple[Any, str]:
    """transformers' module of a family's classes, and what they are called."""
    name = config.__mro__[2].__module__.replace(".configuration_", ".modeling_")
    return import_module(name), config.__name__.removeprefix("MLA").removesuffix("Config")


def install_latent_attention(model: Any) -> None:
    """Replaces the attention and the rotary embedding of a family's bare decoder.

    Args:
        model: a family's model, such as LlamaModel, built with a LatentConfig.
    """
    for index, layer in enumerate(model.layers):
        layer.self_attn = build_attention(model.config, index)
    model.rotary_emb = LatentRotaryEmbedding(model.config)
    model.post_init()


@torch.no_grad()
def init_latent_weights(module: nn.Module, std: float) -> None:
    """Initialises the parameters that only latent attention has."""
    if isinstance(module, LatentNorm):
        init.constant_(module.weight, module.variance_epsilon**0.5)
    elif isinstance(module, HeadProjection):
        init.normal_(module.weight, mean=0.0, std=std)
    elif isinstance(module, LatentRotaryEmbedding):
        init.copy_(module.inv_freq, inverse_frequencies(module.config)[0])


def prepare_step(
    model: Any,
    tokens: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
) -> dict[str, Any]:
    """What a step needs once for all layers: where tokens go, and positions of cached ones.

    Args:
        model: the decoder.
        tokens: input ids ``[B, S]`` or embeddings ``[B, S, D]``.
        attention_mask: the caller's mask.
        position_ids: the caller's positions ``[B, S]``.
        cache: the caller's cache.

    Returns:
        The arguments for the family's forward.
    """
    step: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": position_ids}
    if cache is None or tokens is None:
        return step
    past, length = cache.get_seq_length(), tokens.shape[1]
    if isinstance(cache, LatentCache):
        cache.begin_step(tokens.shape[0], length, attention_mask)
        if position_ids is None:
            step["position_ids"] = cache.positions
        if past > 0:
            step["attention_mask"] = None  # decoding goes by the cache's own lengths
    if past > 0 and model.config.mla_form == "article":
        positions = _key_positions(step["position_ids"], attention_mask, past + length, cache)
        weight = model.embed_tokens.weight
        embeddings = model.rotary_emb(weight, positions.to(weight.device))
        step["key_position_embeddings"] = embeddings
    return step


def _key_positions(
    position_ids: Tensor | None, attention_mask: Tensor | None, total: int, cache: Cache
) -> Tensor:
    """Positions ``[B or 1, T]`` of all tokens, which end where the new tokens end."""
    if position_ids is None:
        return torch.arange(total).unsqueeze(0)
    if isinstance(cache, LatentCache):
        age = torch.arange(max(cache.lengths) - 1, -1, -1).unsqueeze(0)
    elif isinstance(attention_mask, Tensor) and attention_mask.shape == (
        attention_mask.shape[0],
        total,
    ):
        counted = attention_mask.long().cumsum(dim=1)
        age = counted[:, -1:] - counted
    else:
        age = torch.arange(total - 1, -1, -1).unsqueeze(0)
    return (position_ids[:, -1:] - age.to(position_ids.device)).clamp_min(0)


class LatentDecoder(PreTrainedModel):
    """A family's bare decoder with latent attention; stands before the family's own class."""

    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(self, config: LatentConfig) -> None:
        # The rotary embedding that the family builds is replaced, but an odd width would stop it.
        width, config.head_dim = config.head_dim, config.rope_schedule().head_dim
        super().__init__(config)  # type: ignore[arg-type]
        config.head_dim = width
        install_latent_attention(self)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_latent_weights(module, self.config.initializer_range)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As the family's; a LatentCache is planned for the step first."""
        tokens = inputs_embeds if input_ids is None else input_ids
        step = prepare_step(self, tokens, attention_mask, position_ids, past_key_values)
        return super().forward(
            input_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **step,
            **kwargs,
        )


class LatentLanguageModel(PreTrainedModel):
    """A family's language model around its LatentDecoder.

    The family's own ``__init__`` is passed over: it would build ordinary attention first.
    """

    _supports_flash_attn = False
    _supports_flex_attn = False
    decoder_class: type[LatentDecoder]  # not "decoder": get_decoder() would return the class

    def __init__(self, config: LatentConfig) -> None:
        PreTrainedModel.__init__(self, config)  # type: ignore[arg-type]
        self.model = self.decoder_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name in ROUTING:
            if hasattr(config, name):
                setattr(self, name, getattr(config, name))
        self.post_init()


ROUTING = ("num_experts", "num_experts_per_tok", "router_aux_loss_coef")
"""What the language models of families with experts keep of their config."""


def _classes(family: str, config: Any) -> tuple[Any, Any]:
    """The decoder and the language model of a family's converted checkpoints."""
    source = config.__mro__[2]
    package, prefix = _package(config)
    bare: Any = getattr(package, source.__name__.removesuffix("Config") + "Model")
    causal: Any = getattr(package, f"{prefix}ForCausalLM")
    outputs = {**bare._can_record_outputs, "attentions": MLAttention}
    fields = {"config_class": config, "__module__": __name__}
    if "attn_logit_softcapping" in FAMILIES[family].defaults:
        fields["_supports_sdpa"] = False  # it has no cap, and some versions leave it out silently
    decoder: Any = type(
        f"MLA{prefix}Model",
        (LatentDecoder, bare),
        {
            **fields,
            "_can_record_outputs": outputs,
            "__doc__": f"{prefix}Model with latent attention.",
        },
    )
    name = f"MLA{prefix}ForCausalLM"
    doc = f"{prefix}ForCausalLM with latent attention."
    return decoder, type(
        name, (LatentLanguageModel, causal), {**fields, "decoder_class": decoder, "__doc__": doc}
    )


MODELS = {family: _classes(family, config) for family, config in CONFIGS.items()}
"""Decoder and language model of every family: ``MLALlamaModel``, ``MLALlamaForCausalLM``, ..."""


def __getattr__(name: str) -> Any:
    """The model classes by name, as pickle and ``from mlakit.nn.models import`` ask for them."""
    for pair in MODELS.values():
        for model in pair:
            if model.__name__ == name:
                return model
    raise AttributeError(f"{__name__} has no {name}")
