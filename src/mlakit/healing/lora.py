"""Low-rank changes of weights (LoRA, arXiv 2106.09685), merged into the weights at the end.

A weight ``W [..., out, in]`` becomes ``W + up @ down``, with W frozen. It is a parametrisation of
torch, so whatever reads ``module.weight`` (absorbed decoding does) sees the changed weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

MARK = ".parametrizations.weight."
"""Between the name of a module and its parts: ``original``, ``0.down`` and ``0.up``."""


class LowRank(nn.Module):
    """``W + up @ down``; ``up`` begins as zero, so nothing changes at first.

    Args:
        weight: ``[..., out, in]``.
        rank: of the change.
        generator: of the first values of ``down``, as LoRA's.
    """

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        *stack, rows, columns = weight.shape
        rank = min(rank, rows, columns)
        down = torch.empty(*stack, rank, columns)
        bound = 1 / math.sqrt(columns)
        down.uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(down.to(weight.device))
        self.up = nn.Parameter(torch.zeros(*stack, rows, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight, in the dtype of the stored one."""
        return weight + (self.up @ self.down).to(weight.dtype)


def add_low_rank(module: nn.Module, rank: int, seed: int) -> None:
    """Gives a module's ``weight`` a low-rank change to train; the rest of it stays frozen."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() < 2:
        return
    generator = torch.Generator().manual_seed(seed)
    parametrize.register_parametrization(module, "weight", LowRank(weight, rank, generator))


def merge_low_rank(trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The changes of whole weights, float32, by the weights' own names; empty without any.

    Args:
        trained: trained parameters by name.
    """
    return {
        name.replace(f"{MARK}0.up", ".weight"): up.float() @ trained[name[: -len("up")] + "down"]
        for name, up in trained.items()
        if name.endswith(f"{MARK}0.up")
    }
