"""Attention to selected rows in plain torch on any device, without a wait for the device.

The whole batch at once, some of the selected rows at a time, so memory does not grow with their
number. Slots outside of the cache are read as row 0 and masked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mlakit.ops.cache_format import Selection

ROWS = 1 << 15
"""Rows gathered per step over the whole batch: 75 MB of float32 at 576 columns."""


def decode_selected(
    q: Tensor, selections: Sequence[Selection], kv_lora_rank: int, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Each query's attention to its own selected rows, in float32, or float64 for float64 q.

    Args:
        q: ``[B, S, H, W]``; meets the last W columns of a row.
        selections: caches and the rows in them, attended to as one.
        kv_lora_rank: columns of a row that are its value, from the left.
        softmax_scale: factor on the scores.

    Returns:
        ``out [B, S, H, kv_lora_rank]``, ``lse`` and the largest score, ``[B, S, H]``; 0, +inf and
        -inf where a query has no row.
    """
    width = q.shape[3]
    precision = torch.promote_types(q.dtype, torch.float32)
    q = q.detach().to(precision) * softmax_scale
    out = q.new_zeros(*q.shape[:3], kv_lora_rank)
    total = q.new_zeros(*q.shape[:3], 1)
    peak = torch.full_like(total, -math.inf)
    for selection in selections:
        for rows, hidden in _chunks(selection, precision):
            scores = q @ rows[..., rows.shape[3] - width :].mT
            scores = scores.masked_fill(hidden[:, :, None], -math.inf)
            new_peak = torch.maximum(peak, scores.amax(-1, keepdim=True))
            level = new_peak.clamp_min(torch.finfo(precision).min)  # finite where all is hidden
            rescale = torch.exp(peak - level)
            weights = torch.exp(scores - level)
            total = total * rescale + weights.sum(-1, keepdim=True)
            out = out * rescale + weights @ rows[..., :kv_lora_rank]
            peak = new_peak
    empty = total == 0
    lse = (peak + total.log()).masked_fill(empty, math.inf)
    return out / total.masked_fill(empty, 1), lse.squeeze(-1), peak.squeeze(-1)


def _chunks(selection: Selection, precision: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows ``[B, S or 1, k, row]`` and whether each query does not see them ``[B, S, k]``."""
    pages, cache_format, slots, counts = selection
    batch, queries, selected = slots.shape
    step = max(1, ROWS // max(1, batch * queries))
    for first in range(0, selected if selection.room else 0, step):
        some = slots[:, :, first : first + step]
        place = torch.arange(first, first + some.shape[2], device=some.device)
        seen = (some >= 0) & (some < selection.room) & (place < counts[:, :, None])
        used = seen if queries == counts.shape[1] else seen.any(1, keepdim=True)
        rows = cache_format.read(pages.detach(), some.masked_fill(~used, 0), precision)
        yield rows.masked_fill(~used[..., None], 0), ~seen
