"""Tiny random models with latent attention in every form, for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlakit.nn.configs import MLALlamaConfig, MLAMistralConfig, MLAQwen2Config
from mlakit.nn.models import MLALlamaForCausalLM, MLAMistralForCausalLM, MLAQwen2ForCausalLM

FAMILIES: dict[str, Any] = {
    "llama": (MLALlamaConfig, MLALlamaForCausalLM),
    "mistral": (MLAMistralConfig, MLAMistralForCausalLM),
    "qwen2": (MLAQwen2Config, MLAQwen2ForCausalLM),
}
FORMS = ("compress", "equal-cache", "article")
HEADS, GROUPS, SIZE = 4, 2, 8

FORM_SIZES: dict[str, dict[str, int]] = {
    "compress": {"kv_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": SIZE},
    "equal-cache": {
        "kv_lora_rank": GROUPS * SIZE,
        "qk_rope_head_dim": GROUPS * SIZE,
        "qk_nope_head_dim": 0,
        "rope_blocks": GROUPS,
    },
    "article": {
        "kv_lora_rank": 2 * GROUPS * SIZE,
        "qk_rope_head_dim": SIZE,
        "qk_nope_head_dim": 0,
    },
}


def latent_config(family: str = "llama", form: str = "compress", **changes: Any) -> Any:
    """A config of two layers, 4 heads and 32 hidden dimensions."""
    fields = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "v_head_dim": SIZE,
        "softmax_scale": SIZE**-0.5,
        "latent_norm_eps": 4.0**14,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": None,
        "mlakit": {
            "format_version": 1,
            "source_attention": {"num_key_value_heads": GROUPS, "head_dim": SIZE},
        },
        **FORM_SIZES[form],
        **changes,
    }
    return FAMILIES[family][0](mla_form=form, **fields)


def latent_model(
    family: str = "llama", form: str = "compress", *, seed: int = 0, **changes: Any
) -> Any:
    """A model of that config with random weights and biases, in evaluation mode."""
    torch.manual_seed(seed)
    model = FAMILIES[family][1](latent_config(family, form, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.3)
    return model.eval()


def token_ids(batch: int, length: int, seed: int = 1) -> Tensor:
    """Random tokens ``[B, S]`` above the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 50, (batch, length), generator=generator)


@torch.no_grad()
def in_steps(model: Any, ids: Tensor, cache: Any, chunks: tuple[int, ...]) -> Tensor:
    """Logits ``[B, S, vocabulary]`` of tokens fed in chunks through a cache."""
    outputs = [
        model(input_ids=part, past_key_values=cache, use_cache=True).logits
        for part in ids.split(chunks, dim=1)
    ]
    return torch.cat(outputs, dim=1)
