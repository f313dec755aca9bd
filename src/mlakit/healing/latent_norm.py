"""The latent norm stays the identity: its epsilon against what trained weights can give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mlakit.checkpoint import Checkpoint
from mlakit.conversion.adapt import input_scale
from mlakit.conversion.factor import identity_norm_exponent, latent_bound
from mlakit.conversion.stream import LayerReader
from mlakit.families import read_model


class Overlay:
    """A checkpoint some of whose tensors have new values.

    Args:
        checkpoint: the folder.
        changed: new values by name.
    """

    def __init__(self, checkpoint: Checkpoint, changed: Mapping[str, Tensor]) -> None:
        self.checkpoint, self.changed = checkpoint, changed

    def __getattr__(self, name: str) -> Any:
        return getattr(self.checkpoint, name)

    def read(self, name: str) -> Tensor:
        """The new value, or the stored one."""
        return self.changed[name] if name in self.changed else self.checkpoint.read(name)


def needed_exponent(student: Checkpoint, changed: Mapping[str, Tensor]) -> int | None:
    """The k for which a norm of epsilon ``4^k`` changes no latent that any input can give.

    Args:
        student: a converted checkpoint.
        changed: its trained tensors.

    Returns:
        k; None where no latent is normed (ordinary models, the article's form).
    """
    if "latent_norm_eps" not in student.config or student.config["mla_form"] == "article":
        return None
    from mlakit.nn.hf import register

    register()
    model, overlay = read_model(student.config), Overlay(student, changed)
    found: Any = overlay
    reader = LayerReader(found, model, torch.device("cpu"))
    bounds = []
    for index, spec in enumerate(model.layers):
        prefix = reader.family.attention_prefix(index)
        tensors = {
            name.removeprefix(prefix): overlay.read(name)
            for name in student.names
            if name.startswith(prefix)
        }
        normed, rank = spec.qk_norm is not None, spec.source_kv_lora_rank
        scale = input_scale(reader, index, tensors, qk_norm=normed, rank=rank)
        down = tensors["kv_a_proj_with_mqa.weight"].double()
        bias = tensors.get("kv_a_proj_with_mqa.bias", down.new_zeros(len(down))).double()
        latent = torch.cat((down, bias[:, None]), 1)[: spec.kv_lora_rank]
        bounds.append(latent_bound(latent, scale))
    return identity_norm_exponent(max(bounds))
