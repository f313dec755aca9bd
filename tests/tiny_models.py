"""Small random checkpoints of every convertible family, with a tokenizer of single letters."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from mlakit.families import FAMILIES

LETTERS = string.ascii_letters + " .,\n"
TEXT = "".join(LETTERS[(i * i + 7 * i) % len(LETTERS)] for i in range(4000))


def save_tiny(
    folder: Path,
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    sharded: bool = False,
    rough: bool = False,
    **options: Any,
) -> Path:
    """Saves a small model, weights larger than usual so that attention is not flat.

    Args:
        folder: where to.
        family: transformers' ``model_type``.
        dtype: of the weights.
        sharded: in many files.
        rough: scale biases, norms and single channels as they are in large trained models.
        **options: keys of the config; two layers, 4 heads on 2 and 32 dimensions by default.
    """
    settings = {
        "vocab_size": len(LETTERS) + 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.25,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **options,
    }
    if family not in ("qwen2", "qwen2_moe", "stablelm"):
        settings.setdefault("head_dim", 8)
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
                parameter.sub_(FAMILIES[family].norm_offset)
        if rough:
            roughen(model)
    model.to(dtype).save_pretrained(folder, max_shard_size="20KB" if sharded else "1GB")
    tokenizer = Tokenizer(
        WordLevel({"<s>": 0, "</s>": 1, **{c: i + 2 for i, c in enumerate(LETTERS)}}, "</s>")
    )
    tokenizer.pre_tokenizer = Split(Regex("[\\s\\S]"), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="</s>"
    ).save_pretrained(folder)
    return folder


def roughen(model: Any) -> None:
    """What large trained models are like, layer by layer.

    Norms differ tenfold and one channel in sixteen is amplified thirtyfold; a few key biases are
    in the hundreds (Qwen2); one token and one feed-forward row give a channel of the residual
    stream thousands of times the size of others (massive activations, arXiv 2402.17762).
    """
    for name, parameter in model.named_parameters():
        if name.endswith("k_proj.bias"):
            parameter[::3] *= 10
            parameter[1::8] += 150
            parameter[2::8] -= 150
        elif name.endswith("q_proj.bias"):
            parameter[::3] *= 10
        elif "norm" in name:
            parameter[1::7] *= 5
            parameter[::5] *= 0.1
            parameter[5::16] *= 30
        elif "embed_tokens" in name:
            parameter[7, 3] *= 2000
        elif name.endswith("down_proj.weight"):
            parameter[9] *= 50
        elif name.endswith(("k_proj.weight", "q_proj.weight", "qkv_proj.weight")):
            parameter[:, 3] *= 4
        elif name.endswith("v_proj.weight"):
            parameter[2] *= 8


def use_old_config_style(folder: Path) -> None:
    """Spells RoPE as configs did before transformers 5."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))
