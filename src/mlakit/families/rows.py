"""The table of families: one row each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from mlakit.families import readers
from mlakit.families.readers import Config
from mlakit.spec import AttentionSpec, FeedForwardSpec, RopeSpec


@dataclass(frozen=True)
class Family:
    """One model family as transformers implements it.

    Attributes:
        name: transformers' ``model_type``.
        attention: reads one layer's AttentionSpec from the config.
        feed_forward: reads one layer's FeedForwardSpec from the config.
        defaults: values transformers takes for keys that config.json may leave out.
        windowed: whether a layer, by index, has the sliding window when ``layer_types`` is absent.
        obstacle: why ``convert`` refuses the family; empty when it converts.
        norms: the RMSNorms of a decoder layer.
        expert_block: name of the mixture-of-experts block in a layer.
        expert_projections: the (gate, up, down) projections of one routed expert.
    """

    name: str
    attention: Callable[[Config, RopeSpec | None, int | None], AttentionSpec]
    feed_forward: Callable[[Config, int], FeedForwardSpec]
    defaults: Config = field(default_factory=dict)
    windowed: Callable[[Config, int], bool] = lambda config, layer: False
    obstacle: str = ""
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    expert_block: str = "mlp"
    expert_projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    output: str = "lm_head.weight"

    def layer(self, index: int) -> str:
        """Prefix of every tensor of one decoder layer."""
        return f"model.layers.{index}."

    def attention_prefix(self, index: int) -> str:
        """Prefix of the attention tensors of one decoder layer."""
        return f"{self.layer(index)}self_attn."


def _upper_layers(config: Config, layer: int) -> bool:
    """Qwen: the window, where it is switched on, begins at ``max_window_layers``."""
    return layer >= config["max_window_layers"]


QWEN_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}

ROWS = (
    Family("llama", readers.grouped, readers.dense),
    Family(
        "mistral",
        readers.without_bias,
        readers.dense_without_bias,
        defaults={"sliding_window": 4096, "num_key_value_heads": 8},
        windowed=lambda config, layer: True,
    ),
    Family(
        "qwen2",
        readers.qwen2,
        readers.dense_without_bias,
        defaults={**QWEN_WINDOWS, "num_key_value_heads": 32},
        windowed=_upper_layers,
    ),
    Family(
        "qwen3",
        readers.qwen3,
        readers.dense_without_bias,
        defaults={**QWEN_WINDOWS, "num_key_value_heads": 32, "head_dim": 128},
        windowed=_upper_layers,
        obstacle="the norm of each query and key head (q_norm, k_norm) is not yet converted",
    ),
    Family(
        "gemma2",
        readers.grouped,
        readers.dense_without_bias,
        defaults={
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
        },
        windowed=lambda config, layer: layer % 2 == 0,
        obstacle="soft-capped attention scores (attn_logit_softcapping) are not yet converted",
        norms=(
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
    ),
    Family(
        "mixtral",
        readers.without_bias,
        readers.mixtral,
        defaults={"rope_theta": 1e6, "num_key_value_heads": 8},
        windowed=lambda config, layer: True,
        obstacle="mixtures of experts (num_local_experts) are not yet converted",
        expert_block="block_sparse_moe",
        expert_projections=("w1", "w3", "w2"),
    ),
    Family(
        "deepseek_v2",
        readers.deepseek,
        readers.deepseek_experts,
        defaults={"q_lora_rank": 1536, "first_k_dense_replace": 0},
        obstacle="its attention is latent (kv_lora_rank) already",
    ),
    Family(
        "deepseek_v3",
        readers.deepseek,
        readers.deepseek_experts,
        defaults={"q_lora_rank": 1536, "first_k_dense_replace": 3},
        obstacle="its attention is latent (kv_lora_rank) already",
    ),
)

FAMILIES: dict[str, Family] = {row.name: row for row in ROWS}
"""Every family by ``model_type``; those that ``convert`` can read come back as ``mla_*``."""

FAMILIES |= {
    f"mla_{name}": replace(
        row,
        name=f"mla_{name}",
        attention=readers.converted,
        obstacle="it was converted already; convert its source",
    )
    for name, row in FAMILIES.items()
    if not row.obstacle
}
