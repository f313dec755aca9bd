"""Queries and keys of families that norm them: no longer linear in the layer's input."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional

from mlakit.spec import AttentionSpec


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
