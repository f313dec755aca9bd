"""Runs kvpress and optimum-quanto in their own environment: ``python crosscheck_runner.py IN OUT``.

IN is a folder with a small model and ``inputs.safetensors``; OUT gets what they made of it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from kvpress import ObservedAttentionPress, SnapKVPress, StreamingLLMPress, TOVAPress
from optimum.quanto import MaxOptimizer, qint2, qint4
from optimum.quanto.tensor.grouped import ungroup
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

PRESSES = {
    "snapkv": lambda: SnapKVPress(0.5, window_size=32),
    "tova": lambda: TOVAPress(0.5),
    "h2o": lambda: ObservedAttentionPress(0.5),
    "window": lambda: StreamingLLMPress(0.5),
}


def press(model: Any, ids: torch.Tensor, press: Any) -> dict[str, torch.Tensor]:
    """Scores of each layer and the keys that are left."""
    scores: list[torch.Tensor] = []
    score = press.score

    def seen(*args: Any, **kwargs: Any) -> torch.Tensor:
        scores.append(score(*args, **kwargs))
        return scores[-1]

    press.score = seen
    cache = DynamicCache()
    with torch.no_grad(), press(model):
        model(ids[None], past_key_values=cache)
    found = {f"{index}.scores": each[0] for index, each in enumerate(scores)}
    return found | {f"{i}.keys": layer.keys[0] for i, layer in enumerate(cache.layers)}


def rounded(x: torch.Tensor, bits: int, axis: int, group: int) -> torch.Tensor:
    """x as quanto holds it; by its operators, as its tensors would compile an extension."""
    scale, shift = MaxOptimizer()(x, {2: qint2, 4: qint4}[bits], axis, group)
    codes = torch.ops.quanto.quantize_affine(x, bits, axis, group, scale, shift)
    return ungroup(scale * codes - shift, axis, x.shape)


def main() -> None:
    """Writes everything into one file."""
    folder, output = map(Path, sys.argv[1:])
    given = load_file(folder / "inputs.safetensors")
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    found = {}
    for name, make in PRESSES.items():
        for key, value in press(model, given["ids"], make()).items():
            found[f"{name}.{key}"] = value.contiguous()
    for bits in (2, 4):
        found[f"token.{bits}"] = rounded(given["x"], bits, 0, given["x"].shape[-1])
        found[f"channel.{bits}"] = rounded(given["x"], bits, -1, 32)
    save_file({key: value.contiguous() for key, value in found.items()}, output)


if __name__ == "__main__":
    main()
