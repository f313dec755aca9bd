"""From config keys to the specs of one layer: a reader per way of writing a config.

Both styles are read: top-level ``rope_theta``/``rope_scaling`` (before transformers 5) and
``rope_parameters``, flat or one per layer type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlakit.errors import UnsupportedModelError
from mlakit.spec import (
    QUANTISED_ROWS,
    AttentionSpec,
    FeedForwardSpec,
    RopeSpec,
    yarn_mscale,
)

Config = Mapping[str, Any]

ROPE_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""Keys without which a scaling rule cannot be computed."""


def size(config: Config, key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        state = "is missing" if value is None else f"is {value!r}, not a positive whole number"
        raise UnsupportedModelError(
            f"config.json of model_type {config.get('model_type')!r}: {key} {state}",
            remedy="check that config.json is complete and belongs to these weights",
        )
    return value


def rope_of(config: Config, layer_type: str) -> RopeSpec | None:
    """The rotary embedding of one layer; ``dim`` is set by the attention reader."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if any(kind in given for kind in ("full_attention", "sliding_attention")):
        given = given.get(layer_type)
        if given is None:
            return None
    elif layer_type == "sliding_attention" and config.get("rope_local_base_freq"):
        given = {}  # the scaling and base at the top level are those of the other layers
    options = dict(given)
    theta = options.pop("rope_theta", None) or _default_theta(config, layer_type)
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not theta > 0:
        raise UnsupportedModelError(
            f"config.json: rope_theta is {theta!r}, not a positive number",
            remedy="check that config.json is complete and belongs to these weights",
        )
    legacy_type = options.pop("type", "default")
    rope_type = options.pop("rope_type", None) or legacy_type
    if config.get("partial_rotary_factor") is not None:
        options.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    if rope_type in ("llama3", "yarn", "longrope"):
        key = "original_max_position_embeddings"
        longest = size(config, "max_position_embeddings")
        options[key] = config.get(key) or options.get(key) or longest
        if rope_type == "yarn" and "factor" in options and options["factor"] is None:
            options["factor"] = longest / options[key]
    missing = [key for key in ROPE_REQUIRED.get(rope_type, ()) if options.get(key) is None]
    if missing:
        raise UnsupportedModelError(
            f"config.json: rope_type {rope_type!r} needs {missing[0]}, which is missing"
        )
    return RopeSpec(theta=float(theta), dim=0, rope_type=rope_type, parameters=options)


def _default_theta(config: Config, layer_type: str) -> Any:
    local = config.get("rope_local_base_freq") if layer_type == "sliding_attention" else None
    return local or config.get("rope_theta", 10000.0)


def _with_dim(rope: RopeSpec | None, dim: int, blocks: int = 1) -> RopeSpec | None:
    if rope is None:
        return None
    dim = int(dim * rope.parameters.get("partial_rotary_factor", 1.0))
    if dim % 2:
        raise UnsupportedModelError(f"config.json: {dim} rotary dimensions; RoPE needs pairs")
    return replace(rope, dim=dim, blocks=blocks)


def _heads(config: Config) -> tuple[int, int, int]:
    """hidden_size, num_attention_heads and num_key_value_heads, as AttentionSpec takes them."""
    hidden, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    has_groups = config.get("num_key_value_heads") is not None
    groups = size(config, "num_key_value_heads") if has_groups else heads
    if heads % groups:
        raise UnsupportedModelError(
            f"config.json: num_attention_heads {heads} is no multiple of"
            f" num_key_value_heads {groups}"
        )
    return hidden, heads, groups


def _head_dim(config: Config) -> int:
    if config.get("head_dim") is not None:
        return size(config, "head_dim")
    hidden, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    if hidden % heads:
        raise UnsupportedModelError(
            f"config.json has no head_dim, and hidden_size {hidden} is not divisible by"
            f" num_attention_heads {heads}"
        )
    return hidden // heads


def grouped(config: Config, rope: RopeSpec | None, window: int | None) -> AttentionSpec:
    """MHA, GQA and MQA as llama, mistral, qwen3, gemma2 and mixtral write them."""
    head_dim = _head_dim(config)
    bias = bool(config.get("attention_bias", False))
    return AttentionSpec(
        *_heads(config),
        head_dim=head_dim,
        softmax_scale=config.get("query_pre_attn_scalar", head_dim) ** -0.5,
        rope=_with_dim(rope, head_dim),
        logit_softcap=config.get("attn_logit_softcapping"),
        sliding_window=window,
        q_bias=bias,
        kv_bias=bias,
        o_bias=bias,
    )


def without_bias(config: Config, rope: RopeSpec | None, window: int | None) -> AttentionSpec:
    """Mistral and Mixtral: the classes have no attention bias, whatever the config says."""
    return grouped({**config, "attention_bias": False}, rope, window)


def qwen2(config: Config, rope: RopeSpec | None, window: int | None) -> AttentionSpec:
    """Qwen2: q, k and v always carry a bias, the output projection never does."""
    return replace(without_bias(config, rope, window), q_bias=True, kv_bias=True)


def qwen2_moe(config: Config, rope: RopeSpec | None, window: int | None) -> AttentionSpec:
    bias = bool(config.get("qkv_bias", True))
    return replace(without_bias(config, rope, window), q_bias=bias, kv_bias=bias)


def qwen3(config: Config, rope: RopeSpec | None, window: int | None) -> AttentionSpec:
    return replace(grouped(config, rope, window), qk_norm="head")


def gemma3(config: Config, rope: RopeSpec | None, window: int | None) -> AttentionSpec:
    """Gemma 3: its class takes ``attn_logit_softcapping`` and never uses it."""
    return replace(qwen3(config, rope, window), logit_softcap=None)


def granite(config: Config, rope: RopeSpec | None, window: int | None) -> AttentionSpec:
    return replace(grouped(config, rope, window), softmax_scale=config["attention_multiplier"])


def olmo2(config: Config, rope: RopeSpec | None, window: int | None) -> AttentionSpec:
    return replace(grouped(config, rope, window), qk_norm="projection")


def stablelm(config: Config, rope: RopeSpec | None, window: int | None) -> AttentionSpec:
    """StableLM: its own key for the biases, and heads that fill the hidden size."""
    bias = bool(config.get("use_qkv_bias", False))
    plain = {**config, "head_dim": None}
    return replace(without_bias(plain, rope, window), q_bias=bias, kv_bias=bias)


def glm(config: Config, rope: RopeSpec | None, window: int | None) -> AttentionSpec:
    """GLM: biases on q, k and v, never on the output projection."""
    return replace(grouped(config, rope, window), o_bias=False)


def deepseek(config: Config, rope: RopeSpec | None, window: int | None) -> AttentionSpec:
    """Native MLA. Source: DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1."""
    nope, rotated = size(config, "qk_nope_head_dim"), size(config, "qk_rope_head_dim")
    bias = bool(config.get("attention_bias", False))
    q_rank = None if config.get("q_lora_rank") is None else size(config, "q_lora_rank")
    rope = _with_dim(rope, rotated)
    scale = (nope + rotated) ** -0.5
    if rope and rope.rope_type != "default" and rope.parameters.get("mscale_all_dim"):
        scale *= yarn_mscale(rope.parameters["factor"], rope.parameters["mscale_all_dim"]) ** 2
    return AttentionSpec(
        *_heads(config),
        head_dim=nope + rotated,
        softmax_scale=scale,
        rope=rope,
        q_lora_rank=q_rank,
        kv_lora_rank=size(config, "kv_lora_rank"),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rotated,
        v_head_dim=size(config, "v_head_dim"),
        mla_form="compress",
        sliding_window=window,
        q_bias=bias and q_rank is not None,
        kv_bias=bias,
        o_bias=bias,
    )


def converted(config: Config, rope: RopeSpec | None, window: int | None) -> AttentionSpec:
    """A layer that mlakit converted: every size and the scale are written out."""
    form = config.get("mla_form")
    if form not in ("compress", "equal-cache", "article"):
        raise UnsupportedModelError(
            f"config.json has mla_form {form!r}",
            remedy="known forms: compress, equal-cache, article; or mlakit here is too old",
        )
    rotated, blocks = size(config, "qk_rope_head_dim"), size(config, "rope_blocks")
    value_dim = size(config, "v_head_dim")
    source = (config.get("mlakit") or {}).get("source_attention", {})
    scale = config.get("softmax_scale")
    if not isinstance(scale, float | int):
        raise UnsupportedModelError(f"config.json has softmax_scale {scale!r}, not a number")
    if config.get("cache_format") not in (None, *QUANTISED_ROWS):
        raise UnsupportedModelError(
            f"config.json has cache_format {config['cache_format']!r}",
            remedy=f"known formats: {', '.join(QUANTISED_ROWS)}; or mlakit here is too old",
        )
    return AttentionSpec(
        *_heads(config),
        head_dim=source.get("head_dim", value_dim),
        source_kv_heads=source.get("num_key_value_heads"),
        source_kv_lora_rank=config.get("source_kv_lora_rank"),
        source_qk_rope_head_dim=config.get("source_qk_rope_head_dim"),
        query_up=bool(config.get("query_up", False)),
        softmax_scale=float(scale),
        rope=_with_dim(rope, rotated // blocks, blocks),
        logit_softcap=config.get("attn_logit_softcapping"),
        qk_norm=config.get("qk_norm"),
        q_lora_rank=config.get("q_lora_rank"),
        kv_lora_rank=size(config, "kv_lora_rank"),
        qk_nope_head_dim=int(config.get("qk_nope_head_dim") or 0),
        qk_rope_head_dim=rotated,
        v_head_dim=value_dim,
        mla_form=form,
        sliding_window=window,
        q_bias=bool(config.get("q_bias", False)),
        kv_bias=bool(config.get("kv_a_bias", False)),
        o_bias=bool(config.get("o_bias", False)),
        cache_format=config.get("cache_format"),
    )


def dense(config: Config, layer: int) -> FeedForwardSpec:
    bias = bool(config.get("mlp_bias", False))
    return FeedForwardSpec(
        size(config, "hidden_size"), size(config, "intermediate_size"), bias=bias
    )


def dense_without_bias(config: Config, layer: int) -> FeedForwardSpec:
    return dense({**config, "mlp_bias": False}, layer)


def mixtral(config: Config, layer: int) -> FeedForwardSpec:
    return replace(
        dense_without_bias(config, layer),
        num_experts=size(config, "num_local_experts"),
        num_experts_per_tok=size(config, "num_experts_per_tok"),
    )


def qwen_experts(config: Config, layer: int) -> FeedForwardSpec:
    """Qwen2-MoE and Qwen3-MoE: every so many layers experts, and dense where listed."""
    key = "num_local_experts" if "num_local_experts" in config else "num_experts"
    dense_layer = layer in (config.get("mlp_only_layers") or ())
    if dense_layer or (layer + 1) % config["decoder_sparse_step"] or not config[key]:
        return dense_without_bias(config, layer)
    return FeedForwardSpec(
        size(config, "hidden_size"),
        size(config, "moe_intermediate_size"),
        num_experts=size(config, key),
        num_experts_per_tok=size(config, "num_experts_per_tok"),
        shared_intermediate_size=config.get("shared_expert_intermediate_size") or 0,
        shared_gate=bool(config.get("shared_expert_intermediate_size")),
    )


def deepseek_experts(config: Config, layer: int) -> FeedForwardSpec:
    if layer < config["first_k_dense_replace"] or config.get("n_routed_experts") is None:
        return dense_without_bias(config, layer)
    width = size(config, "moe_intermediate_size")
    return FeedForwardSpec(
        size(config, "hidden_size"),
        width,
        num_experts=size(config, "n_routed_experts"),
        num_experts_per_tok=size(config, "num_experts_per_tok"),
        shared_intermediate_size=width * (config.get("n_shared_experts") or 0),
        router_buffer=config["model_type"].endswith("deepseek_v3"),
    )
