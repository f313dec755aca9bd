"""Queries, keys and values that are not linear in the layer's input: what stands in its place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional

from mlakit.spec import AttentionSpec

LATENT_EPS = 1e-6
"""Epsilon of the norms inside DeepSeek's latent attention, whatever the config says of others."""


class NormedHeads:
    """The normed queries of a source layer, and what its keys and values are linear in.

    What is cached may be any function of the input, computed once when a token is written. With
    the input ``[k_norm(k) | v]`` in place of x, keys and values are its two halves, and all that
    follows is as linear as without the norm; likewise queries from their normed heads on.

    Args:
        tensors: the standard layer's, see ``families.layouts``.
        spec: the layer.
        eps: of the norms.
        offset: what the norms add to their stored weight.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], spec: AttentionSpec, eps: float, offset: float
    ) -> None:
        self.spec, self.eps = spec, eps
        self.tensors = {name: tensor.float() for name, tensor in tensors.items()}
        for name in ("q_norm.weight", "k_norm.weight"):
            self.tensors[name] = self.tensors[name] + offset

    def queries(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., T, D]`` to ``[..., H, T, d]``, not rotated."""
        q = self._normed("q", hidden)
        return q.unflatten(-1, (-1, self.spec.head_dim)).transpose(-2, -3)

    def inputs(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., D]`` to ``[k_norm(k) | v]``, ``[..., 2 G d]``."""
        return torch.cat([self._normed("k", hidden), self._projected("v", hidden)], -1)

    def _projected(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        weight, bias = self.tensors[f"{name}_proj.weight"], self.tensors.get(f"{name}_proj.bias")
        return functional.linear(hidden, weight, bias)

    def _normed(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        gain = self.tensors[f"{name}_norm.weight"]  # of one head, or of all of them together
        x = self._projected(name, hidden).unflatten(-1, (-1, len(gain)))
        return functional.rms_norm(x, (len(gain),), gain, self.eps).flatten(-2)


class LatentHeads:
    """The queries of a source layer that is latent already, and the row that it caches.

    With the input ``[kv_norm(c) | k_rope]`` in place of x, keys and values are linear again
    (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Args:
        tensors: the standard layer's, see ``families.layouts``.
        spec: the layer.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], spec: AttentionSpec) -> None:
        self.spec = spec
        self.tensors = {name: tensor.float() for name, tensor in tensors.items()}

    def queries(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., T, D]`` to ``[..., H, T, N + R]``, not rotated."""
        if self.spec.q_lora_rank is None:
            q = self._projected("q_proj", hidden)
        else:
            compressed = self._normed("q_a_layernorm", self._projected("q_a_proj", hidden))
            q = self._projected("q_b_proj", compressed)
        return q.unflatten(-1, (self.spec.num_attention_heads, -1)).transpose(-2, -3)

    def inputs(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., D]`` to ``[kv_norm(c) | k_rope]``, ``[..., C + R]``, not rotated."""
        rank = self.spec.kv_lora_rank or 0
        row = self._projected("kv_proj", hidden)
        return torch.cat([self._normed("kv_norm", row[..., :rank]), row[..., rank:]], -1)

    def _projected(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        return functional.linear(x, weight, bias)

    def _normed(self, name: str, x: torch.Tensor) -> torch.Tensor:
        gain = self.tensors[f"{name}.weight"]
        return functional.rms_norm(x, (len(gain),), gain, LATENT_EPS)
