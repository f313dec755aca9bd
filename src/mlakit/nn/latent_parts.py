"""The small modules and functions that latent attention is made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LatentNorm(nn.Module):
    """The RMSNorm that engines expect on a latent, made the identity by a large epsilon.

    With epsilon 4^k far above mean(z^2) and weight 2^k, z / sqrt(mean(z^2) + 4^k) * 2^k is z up to
    rounding. The weight multiplies in float32: z / 2^k would be subnormal in float16.

    Args:
        size: C.
        eps: epsilon, a power of 4.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), math.sqrt(eps)))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalises ``[..., C]``."""
        x = hidden_states.to(torch.float32)
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.variance_epsilon)
        return (self.weight.to(torch.float32) * x).to(hidden_states.dtype)


class HeadProjection(nn.Module):
    """A matrix per head, ``weight [H, out, in]``, as the up-projection of queries."""

    def __init__(self, heads: int, out_features: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, S, in]`` to ``[B, H, S, out]``."""
        return torch.einsum("bhsi,hoi->bhso", x, self.weight)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that both eager and SDPA attention add to the scores."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)


def last_columns(x: Tensor, count: int) -> Tensor:
    """The last ``count`` columns of ``[B, T, R]``; zeros beyond T, for a cache of fixed size."""
    if count <= x.shape[1]:
        return x[:, x.shape[1] - count :]
    return nn.functional.pad(x, (0, 0, 0, count - x.shape[1]))
