"""Checkpoints of random weights at a real layer's shape, with a tokenizer that reads real text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from mlakit.checkpoint import ShardWriter, write_json_atomic

DEMO = Path(__file__).resolve().parents[1] / "src" / "mlakit" / "assets" / "demo_model"

SHAPES = {
    "moderate": (1024, 16, 4, 64, 2816),
    "llama-3.2-1b": (2048, 32, 8, 64, 8192),
    "llama-3-8b": (4096, 32, 8, 128, 14336),
}
"""D, H, G, d and the width of the feed-forward block."""


def write_checkpoint(
    folder: Path, shape: str, layers: int, context: int = 8192, vocabulary: int | None = None
) -> None:
    """A llama of random bfloat16 weights, one shard per layer, and the demo model's tokenizer.

    Args:
        folder: made if needed.
        shape: key of SHAPES.
        layers: how many.
        context: longest context of its config, and so of a calibration window.
        vocabulary: tokens; those of the demo model's tokenizer by default, of which it has some.
    """
    hidden, heads, groups, dim, inner = SHAPES[shape]
    config = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    config |= {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": dim,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "max_position_embeddings": context,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "vocab_size": vocabulary or config["vocab_size"],
    }
    sizes = {
        "self_attn.q_proj": (heads * dim, hidden),
        "self_attn.k_proj": (groups * dim, hidden),
        "self_attn.v_proj": (groups * dim, hidden),
        "self_attn.o_proj": (hidden, heads * dim),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    draw = torch.Generator().manual_seed(0)

    def random(rows: int, columns: int) -> torch.Tensor:
        drawn = torch.empty(rows, columns, dtype=torch.bfloat16).normal_(generator=draw)
        return drawn.mul_(columns**-0.5)

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    with ShardWriter(folder, layers + 1) as writer:
        for index in range(layers):
            prefix = f"model.layers.{index}."
            tensors = {f"{prefix}{name}.weight": random(*size) for name, size in sizes.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}{norm}.weight"] = ones
            writer.write(index + 1, tensors)
        vocabulary = config["vocab_size"]
        writer.write(
            layers + 1,
            {
                "model.embed_tokens.weight": random(vocabulary, hidden),
                "lm_head.weight": random(vocabulary, hidden),
                "model.norm.weight": ones,
            },
        )
        writer.finish()
    write_json_atomic(folder / "config.json", config)
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
