"""The table of families: one row each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from mlakit.families import readers, which
from mlakit.families.layouts import Layout
from mlakit.families.readers import Config
from mlakit.spec import AttentionSpec, FeedForwardSpec, RopeSpec

PLAIN = Layout()


@dataclass(frozen=True)
class Family:
    """One model family as transformers implements it.

    Attributes:
        name: transformers' ``model_type``.
        classes: what its classes are called: ``Llama`` of LlamaForCausalLM.
        attention: reads one layer's AttentionSpec from the config.
        feed_forward: reads one layer's FeedForwardSpec from the config.
        defaults: values transformers takes for keys that config.json may leave out.
        windowed: whether a layer, by index, has the sliding window when ``layer_types`` is absent.
        rotated: whether a layer, by index, has rotary embeddings.
        rope_by_type: layers with and without a window may have rotary embeddings of their own.
        partial_rotary: only the first dimensions of a head may be rotated.
        layout: how the attention tensors are stored.
        obstacle: why ``convert`` refuses the family; empty when it converts.
        refused: config keys and why a model with a true value there is not converted.
        article: its class can run the article's form.
        norms: the RMSNorms of a decoder layer.
        input_norm: the one in front of attention; None where attention reads the residual stream.
        norm_bias: the norms are LayerNorms, with biases.
        norm_offset: what an RMSNorm adds to its stored weight.
        expert_block: name of the mixture-of-experts block in a layer.
        expert_projections: the (gate, up, down) projections of one routed expert.
        shared_expert: name of the expert that every token visits.
        fused_gate: dense blocks store gate and up as one projection, ``gate_up_proj``.
        embedding_scale: what the model multiplies embeddings with.
        logits: what the model does to the product with the output matrix.
        single: config keys to change for a model of one layer, by its index.
    """

    name: str
    classes: str
    attention: Callable[[Config, RopeSpec | None, int | None], AttentionSpec]
    feed_forward: Callable[[Config, int], FeedForwardSpec]
    defaults: Config = field(default_factory=dict)
    windowed: Callable[[Config, int], bool] = lambda config, layer: False
    rotated: Callable[[Config, int], bool] = lambda config, layer: True
    rope_by_type: bool = False
    partial_rotary: bool = False
    layout: Layout = PLAIN
    obstacle: str = ""
    refused: dict[str, str] = field(default_factory=dict)
    article: bool = True
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    input_norm: str | None = "input_layernorm"
    norm_bias: bool = False
    norm_offset: float = 0.0
    expert_block: str = "mlp"
    expert_projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared_expert: str = "shared_experts"
    fused_gate: bool = False
    embedding_scale: Callable[[Config], float] = lambda config: 1.0
    logits: Callable[[Config, Any], Any] = lambda config, logits: logits
    single: Callable[[Config, int], dict[str, Any]] = lambda config, layer: {}
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm"
    output: str = "lm_head.weight"

    @property
    def norm_tensors(self) -> tuple[str, ...]:
        """The tensors of one norm."""
        return ("weight", "bias") if self.norm_bias else ("weight",)

    def layer(self, index: int) -> str:
        """Prefix of every tensor of one decoder layer."""
        return f"model.layers.{index}."

    def attention_prefix(self, index: int) -> str:
        """Prefix of the attention tensors of one decoder layer."""
        return f"{self.layer(index)}self_attn."


def _capped(config: Config, logits: Any) -> Any:
    cap = config.get("final_logit_softcapping")
    return logits if cap is None else cap * (logits / cap).tanh()


def _root_of_width(config: Config) -> float:
    return float(config["hidden_size"] ** 0.5)


def _one_expert_layer(config: Config, layer: int) -> dict[str, Any]:
    dense = not readers.qwen_experts(config, layer).num_experts
    return {"mlp_only_layers": [0] if dense else [], "decoder_sparse_step": 1}


def _one_dense_or_expert_layer(config: Config, layer: int) -> dict[str, Any]:
    return {"first_k_dense_replace": int(layer < config["first_k_dense_replace"])}


QWEN_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
QWEN_EXPERTS = {"decoder_sparse_step": 1, "max_position_embeddings": 32768}
SANDWICH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
BOTH_WAYS = {"use_bidirectional_attention": "tokens that see later ones cannot be decoded"}

ROWS = (
    Family("llama", "Llama", readers.grouped, readers.dense),
    Family(
        "mistral",
        "Mistral",
        readers.without_bias,
        readers.dense_without_bias,
        defaults={"sliding_window": 4096, "num_key_value_heads": 8},
        windowed=which.all_layers,
    ),
    Family(
        "qwen2",
        "Qwen2",
        readers.qwen2,
        readers.dense_without_bias,
        defaults={**QWEN_WINDOWS, "num_key_value_heads": 32},
        windowed=which.upper_layers,
    ),
    Family(
        "qwen3",
        "Qwen3",
        readers.qwen3,
        readers.dense_without_bias,
        defaults={**QWEN_WINDOWS, "num_key_value_heads": 32, "head_dim": 128},
        windowed=which.upper_layers,
    ),
    Family(
        "granite",
        "Granite",
        readers.granite,
        readers.dense,
        defaults={"attention_multiplier": 1.0},
        embedding_scale=lambda config: config.get("embedding_multiplier", 1.0),
        logits=lambda config, logits: logits / config.get("logits_scaling", 1.0),
        single=lambda config, layer: {"embedding_multiplier": 1.0},
    ),
    Family(
        "olmo2",
        "Olmo2",
        readers.olmo2,
        readers.dense_without_bias,
        norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        input_norm=None,
    ),
    Family(
        "smollm3",
        "SmolLM3",
        readers.grouped,
        readers.dense,
        defaults={
            "rope_theta": 2e6,
            "num_key_value_heads": 4,
            "no_rope_layer_interval": 4,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
        },
        windowed=which.no_positions_in_a_window,
        rotated=which.with_positions,
        single=lambda config, layer: {"no_rope_layers": [int(which.with_positions(config, layer))]},
    ),
    Family(
        "gemma",
        "Gemma",
        readers.grouped,
        readers.dense_without_bias,
        defaults={"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True},
        refused=BOTH_WAYS,
        norm_offset=1.0,
        embedding_scale=_root_of_width,
    ),
    Family(
        "gemma2",
        "Gemma2",
        readers.grouped,
        readers.dense_without_bias,
        defaults={
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
        },
        windowed=lambda config, layer: layer % 2 == 0,
        refused=BOTH_WAYS,
        norms=SANDWICH,
        norm_offset=1.0,
        embedding_scale=_root_of_width,
        logits=_capped,
    ),
    Family(
        "gemma3_text",
        "Gemma3",
        readers.gemma3,
        readers.dense_without_bias,
        defaults={
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
            "max_position_embeddings": 131072,
        },
        windowed=which.local_layers,
        rope_by_type=True,
        refused=BOTH_WAYS
        | {"attn_logit_softcapping": "transformers' class for this family ignores it"},
        norms=SANDWICH,
        norm_offset=1.0,
        embedding_scale=_root_of_width,
        logits=_capped,
    ),
    Family(
        "mixtral",
        "Mixtral",
        readers.without_bias,
        readers.mixtral,
        defaults={"rope_theta": 1e6, "num_key_value_heads": 8, "num_experts_per_tok": 2},
        windowed=which.all_layers,
        expert_block="block_sparse_moe",
        expert_projections=("w1", "w3", "w2"),
    ),
    Family(
        "qwen2_moe",
        "Qwen2Moe",
        readers.qwen2_moe,
        readers.qwen_experts,
        defaults={
            **QWEN_WINDOWS,
            **QWEN_EXPERTS,
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
        windowed=which.lower_even_layers,
        shared_expert="shared_expert",
        single=_one_expert_layer,
    ),
    Family(
        "qwen3_moe",
        "Qwen3Moe",
        readers.qwen3,
        readers.qwen_experts,
        defaults={
            **QWEN_WINDOWS,
            **QWEN_EXPERTS,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        windowed=which.all_layers,
        single=_one_expert_layer,
    ),
    Family(
        "phi3",
        "Phi3",
        readers.without_bias,
        readers.dense_without_bias,
        partial_rotary=True,
        layout=Layout(fused=True),
        fused_gate=True,
        windowed=which.all_layers,
    ),
    Family(
        "glm",
        "Glm",
        readers.glm,
        readers.dense_without_bias,
        defaults={
            "num_key_value_heads": 2,
            "head_dim": 128,
            "attention_bias": True,
            "partial_rotary_factor": 0.5,
        },
        partial_rotary=True,
        layout=Layout(interleaved=True),
        fused_gate=True,
    ),
    Family(
        "glm4",
        "Glm4",
        readers.glm,
        readers.dense_without_bias,
        defaults={
            "num_key_value_heads": 2,
            "head_dim": 128,
            "attention_bias": True,
            "partial_rotary_factor": 0.5,
        },
        partial_rotary=True,
        layout=Layout(interleaved=True),
        norms=(
            "input_layernorm",
            "post_self_attn_layernorm",
            "post_attention_layernorm",
            "post_mlp_layernorm",
        ),
        fused_gate=True,
    ),
    Family(
        "stablelm",
        "StableLm",
        readers.stablelm,
        readers.dense_without_bias,
        defaults={"num_key_value_heads": 32, "partial_rotary_factor": 0.25},
        partial_rotary=True,
        refused={
            "use_parallel_residual": "attention and feed-forward block side by side",
            "qk_layernorm": "a LayerNorm of its own for every query and key head",
        },
        article=False,
        norm_bias=True,
    ),
    Family(
        "deepseek_v2",
        "DeepseekV2",
        readers.deepseek,
        readers.deepseek_experts,
        defaults={"q_lora_rank": 1536, "first_k_dense_replace": 0},
        single=_one_dense_or_expert_layer,
        layout=Layout(interleaved=True, latent=True),
    ),
    Family(
        "deepseek_v3",
        "DeepseekV3",
        readers.deepseek,
        readers.deepseek_experts,
        defaults={"q_lora_rank": 1536, "first_k_dense_replace": 3},
        single=_one_dense_or_expert_layer,
        layout=Layout(interleaved=True, latent=True),
    ),
)

FAMILIES: dict[str, Family] = {row.name: row for row in ROWS}
"""Every family by ``model_type``; those that ``convert`` can read come back as ``mla_*``."""

FAMILIES |= {
    f"mla_{name}": replace(
        row,
        name=f"mla_{name}",
        attention=readers.converted,
        layout=PLAIN,
        obstacle="it was converted already; convert its source",
    )
    for name, row in FAMILIES.items()
    if not row.obstacle
}
