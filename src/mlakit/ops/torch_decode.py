"""Plain torch on any device: the whole batch at once, masked, without a wait for the device.

What runs where no kernel of ours does. It gathers pages a few columns of the block table at a
time, so memory grows with the batch and not with the context.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK = 512
"""Tokens gathered per sequence and step."""


def decode(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    kv_lora_rank: int,
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """``mla_decode`` in float32, or in float64 for float64 tensors."""
    queries, heads, width = q.shape[1:]
    block_size, kv_heads, row = k_cache.shape[1:]
    group = heads // kv_heads
    precision = torch.promote_types(q.dtype, torch.float32)
    packed = q.detach().unflatten(2, (kv_heads, group)).transpose(1, 2).flatten(2, 3)
    packed = packed.to(precision) * softmax_scale  # [B, G, S * group, W]
    visible = _visible(cache_seqlens, queries, causal).repeat_interleave(group, 1)[:, None, :, None]
    out = packed.new_zeros(*packed.shape[:3], kv_lora_rank)
    total = packed.new_zeros(*packed.shape[:3], 1)
    peak = torch.full_like(total, -math.inf)
    step = max(1, CHUNK // block_size)
    for first in range(0, block_table.shape[1] if k_cache.shape[0] else 0, step):
        rows, position = _gather(k_cache, block_table, cache_seqlens, first, step)
        rows = rows.to(precision)
        scores = packed @ rows[..., row - width :].mT
        scores = scores.masked_fill(position >= visible, -math.inf)
        new_peak = torch.maximum(peak, scores.amax(-1, keepdim=True))
        level = new_peak.clamp_min(torch.finfo(precision).min)  # finite where all is masked
        rescale = torch.exp(peak - level)
        weights = torch.exp(scores - level)
        total = total * rescale + weights.sum(-1, keepdim=True)
        out = out * rescale + weights @ rows[..., :kv_lora_rank]
        peak = new_peak
    empty = total == 0
    out = out / total.masked_fill(empty, 1)
    lse = (peak + total.log()).masked_fill(empty, math.inf).squeeze(-1)
    out = out.unflatten(2, (queries, group)).transpose(1, 2).flatten(2, 3)
    return out, lse.unflatten(2, (queries, group)).transpose(2, 3).flatten(1, 2)


def _visible(cache_seqlens: Tensor, queries: int, causal: bool) -> Tensor:
    """Keys that each query sees, ``[B, S]``."""
    if not causal:
        return cache_seqlens[:, None].expand(-1, queries)
    return cache_seqlens[:, None] - torch.arange(queries - 1, -1, -1, device=cache_seqlens.device)


def _gather(
    k_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, first: int, step: int
) -> tuple[Tensor, Tensor]:
    """Rows ``[B, G, tokens, row]`` of some columns of the table, and their positions ``[tokens]``.

    Rows past a sequence's end come back as zeros: unused entries may be no page, unused rows NaN.
    """
    block_size = k_cache.shape[1]
    columns = block_table[:, first : first + step]
    start = torch.arange(first, first + columns.shape[1], device=k_cache.device) * block_size
    pages = columns.masked_fill(start >= cache_seqlens[:, None], 0)
    rows = k_cache.detach()[pages].flatten(1, 2).transpose(1, 2)
    position = (start[:, None] + torch.arange(block_size, device=k_cache.device)).flatten()
    unused = position >= cache_seqlens[:, None]
    return rows.masked_fill(unused[:, None, :, None], 0), position
