"""A toy config of every family, for tests that need the family's own transformers classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
    "original_max_position_embeddings": 16,
}
CONVERTED = {
    **SIZES,
    "qk_nope_head_dim": 12,
    "v_head_dim": 12,
    "softmax_scale": 12**-0.5,
    "mlakit": {"source_attention": {"num_key_value_heads": 2, "head_dim": 12}},
}

TOYS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SIZES),
    "llama-mha": ("LlamaConfig", {**SIZES, "num_key_value_heads": 4}),
    "llama-mqa": ("LlamaConfig", {**SIZES, "num_key_value_heads": 1}),
    "llama-biases-tied": (
        "LlamaConfig",
        {
            **SIZES,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "head_dim": 16,
        },
    ),
    "mistral": ("MistralConfig", SIZES),
    "mistral-no-window": ("MistralConfig", {**SIZES, "sliding_window": None}),
    "qwen2": ("Qwen2Config", {**SIZES, "tie_word_embeddings": True}),
    "qwen2-windows": (
        "Qwen2Config",
        {**SIZES, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3Config", {**SIZES, "head_dim": 20, "attention_bias": True}),
    "gemma2": (
        "Gemma2Config",
        {**SIZES, "head_dim": 24, "query_pre_attn_scalar": 30, "sliding_window": 5},
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        {**SIZES, "head_dim": 12, "query_pre_attn_scalar": 30, "sliding_window": 5}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "granite": (
        "GraniteConfig",
        {**SIZES, "attention_multiplier": 0.2, "embedding_multiplier": 3.0}
        | {"residual_multiplier": 0.5, "logits_scaling": 4.0, "attention_bias": True},
    ),
    "olmo2": ("Olmo2Config", SIZES),
    "smollm3": ("SmolLM3Config", {**SIZES, "no_rope_layer_interval": 2}),
    "phi3": ("Phi3Config", SIZES),
    "phi3-partial": (
        "Phi3Config",
        {**SIZES, "partial_rotary_factor": 0.5, "sliding_window": 7},
    ),
    "gemma": ("GemmaConfig", {**SIZES, "head_dim": 16}),
    "glm4": ("Glm4Config", {**SIZES, "head_dim": 16}),
    "stablelm": ("StableLmConfig", {**SIZES, "num_attention_heads": 3, "num_key_value_heads": 3}),
    "stablelm-bias": (
        "StableLmConfig",
        {**SIZES, "use_qkv_bias": True, "partial_rotary_factor": 0.5},
    ),
    "glm": ("GlmConfig", {**SIZES, "head_dim": 16}),
    "mixtral": ("MixtralConfig", {**SIZES, "num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**SIZES, "num_experts": 4, "moe_intermediate_size": 24, "decoder_sparse_step": 2}
        | {"shared_expert_intermediate_size": 40, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**SIZES, "num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
        | {"head_dim": 12, "mlp_only_layers": [1]},
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        {**SIZES, **LATENT, "q_lora_rank": None, "attention_bias": True, "n_shared_experts": 2},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **SIZES,
            **LATENT,
            "q_lora_rank": 24,
            "attention_bias": True,
            "n_group": 2,
            "topk_group": 1,
            "rope_parameters": YARN,
        },
    ),
}
"""Name of the transformers config class and its arguments."""


def toy_config(name: str) -> Any:
    """The transformers config of one toy."""
    import transformers

    kind, arguments = TOYS[name]
    make: Callable[..., Any] = getattr(transformers, kind)
    return make(**arguments)


def as_json(config: Any) -> dict[str, Any]:
    """The config as its config.json would be parsed."""
    parsed: dict[str, Any] = json.loads(config.to_json_string())
    return parsed


def converted_config(form: str, family: str = "Llama") -> Any:
    """A toy config of a converted model: 4 heads of 12 that came from 2 kv heads."""
    from mlakit.nn import configs

    sizes = {
        "compress": {"kv_lora_rank": 20, "qk_rope_head_dim": 6},
        "equal-cache": {
            "kv_lora_rank": 24,
            "qk_rope_head_dim": 24,
            "qk_nope_head_dim": 0,
            "rope_blocks": 2,
        },
        "article": {"kv_lora_rank": 48, "qk_rope_head_dim": 12, "qk_nope_head_dim": 0},
    }[form]
    make: Callable[..., Any] = getattr(configs, f"MLA{family}Config")
    biases = {"q_bias": True, "kv_a_bias": True, "o_bias": family == "Qwen2"}
    return make(**{**CONVERTED, **sizes, **biases, "mla_form": form})
