"""The CPU path: a piece of the cache, two GEMMs and a step of online softmax at a time.

Products are in float32, which a 16-bit cache is widened to while it is gathered: most CPUs emulate
16-bit products, ten to a hundred times slower. On those that multiply bfloat16 themselves (AVX-512
BF16, AMX) a bfloat16 cache is used as it is, and scores still come out in float32: what rounding to
bfloat16 took from a product is a second, equally fast product. Softmax runs in base 2, because
torch inlines ``exp2`` and calls a slower library for ``exp``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from itertools import chain

import torch
from torch import Tensor

from mlakit.ops.call import DenseCall, SparseCall
from mlakit.ops.cpu_rows import page_rows, selected_rows

LOWEST = torch.finfo(torch.float32).min
"""Stands for a largest score where there is none, without being infinite."""


def decode(call: DenseCall) -> tuple[Tensor, Tensor]:
    """``mla_decode`` for CPU tensors of at most 32 bits.

    Raises:
        UsageError: if a length or a page number points outside of the table or the cache, or
            ``cu_seqlens_q`` does not divide the queries.
    """
    kv_heads = call.k_cache.shape[2]
    group = call.q.shape[1] // kv_heads
    dtype = precision(call.q.dtype if call.cache_format is None else torch.float32)
    q = call.q.detach().unflatten(1, (kv_heads, group))
    out = q.new_zeros(*q.shape[:3], call.kv_lora_rank, dtype=torch.float32)  # [N, G, H / G, C]
    lse = out.new_full(q.shape[:3], math.inf)
    pages, lengths, starts = call.used_pages(), call.cache_seqlens.tolist(), call.query_starts()

    for sequence, length in enumerate(lengths):
        start, stop = starts[sequence : sequence + 2]
        start = max(start, stop - length) if call.causal else start  # the first that sees a key
        if start == stop or not length:
            continue
        first, visible = _visible(call, stop - start, length, group)
        for g in range(kv_heads):
            pieces = page_rows(call, g, pages[sequence], first, length, dtype)
            attended, level, _ = _attend(
                q[start:stop, g].flatten(0, 1), pieces, dtype, call.kv_lora_rank,
                call.softmax_scale, call.soft_cap, visible, first,
            )  # fmt: skip
            out[start:stop, g] = attended.view(stop - start, group, call.kv_lora_rank)
            lse[start:stop, g] = level.view(stop - start, group)
    return out.flatten(1, 2), lse.flatten(1)


def decode_selected(call: SparseCall) -> tuple[Tensor, Tensor, Tensor]:
    """``mla_sparse_decode`` for CPU tensors of at most 32 bits, and the largest score."""
    plain = all(selection.pages.dtype == call.q.dtype for selection in call.selections)
    dtype = precision(call.q.dtype if plain else torch.float32)
    q = call.q.detach()
    out = q.new_empty(*q.shape[:2], call.kv_lora_rank, dtype=torch.float32)
    lse, top = out.new_empty(q.shape[:2]), out.new_empty(q.shape[:2])

    for n in range(q.shape[0]):
        pieces = chain.from_iterable(selected_rows(some, n, dtype) for some in call.selections)
        out[n], lse[n], top[n] = _attend(q[n], pieces, dtype, call.kv_lora_rank, call.softmax_scale)
    return out, lse, top


def precision(stored: torch.dtype) -> torch.dtype:
    """What rows and queries are multiplied in."""
    if stored == torch.float64 or (stored == torch.bfloat16 and _multiplies_bfloat16()):
        return stored
    return torch.float32


@cache
def _multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 numbers."""
    asks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in asks)


def _visible(
    call: DenseCall, queries: int, length: int, group: int
) -> tuple[int, tuple[Tensor, Tensor] | None]:
    """Which keys the last ``queries`` of a sequence see.

    Returns:
        The first key that any of them sees and, where they do not all see the same, each row's
        first and the one after its last, ``[rows, 1]``, in the rows' order.
    """
    if not call.causal or (queries == 1 and not call.sliding_window):
        return 0, None
    window = call.sliding_window or length
    first = max(0, length - queries + 1 - window)
    if queries == 1:
        return first, None
    stop = torch.arange(length - queries + 1, length + 1, device="cpu")
    stop = stop.repeat_interleave(group).unsqueeze(1)
    return first, (stop - window, stop)


def _attend(
    q: Tensor,
    pieces: Iterator[Tensor],
    dtype: torch.dtype,
    rank: int,
    softmax_scale: float,
    soft_cap: float = 0.0,
    visible: tuple[Tensor, Tensor] | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Online softmax over the rows of one sequence and kv head.

    Queries and results are put into memory of their own, as rows are for batch invariance: where a
    matrix begins may change how a product is summed.

    Args:
        q: queries ``[rows, W]``, every one of which sees some key, if there is any.
        pieces: cache rows ``[tokens, row]`` of ``dtype``, in order.
        dtype: what is multiplied.
        rank: columns of a row that are its value.
        softmax_scale: as in DenseCall.
        soft_cap: as in DenseCall.
        visible: first key each row sees and the one after its last; None for all.
        first: number of the first key in the pieces.

    Returns:
        float32: out ``[rows, rank]``, lse and the largest score ``[rows]``; 0, +inf and -inf
        without any piece.
    """
    width = q.shape[1]
    q = q.to(dtype, copy=True, memory_format=torch.contiguous_format)
    out = q.new_zeros(q.shape[0], rank, dtype=torch.float32)
    peak = total = q.new_empty(0)
    start = first
    for rows in pieces:
        stop = start + rows.shape[0]
        scores = products(q, rows[:, rows.shape[1] - width :].T)
        if soft_cap:
            scores.mul_(softmax_scale / soft_cap).tanh_().mul_(soft_cap / math.log(2.0))
        else:
            scores.mul_(softmax_scale / math.log(2.0))
        if visible is not None:
            key = torch.arange(start, stop, device="cpu")
            scores.masked_fill_((key < visible[0]) | (key >= visible[1]), -math.inf)
        new_peak = scores.amax(1, keepdim=True)
        if visible is not None:  # a row may see nothing of this piece
            new_peak.clamp_min_(LOWEST)
        if start > first:
            new_peak = torch.maximum(peak, new_peak)
            rescale = peak.sub_(new_peak).exp2_()
            out.mul_(rescale)
            total.mul_(rescale)
        weights = scores.sub_(new_peak).exp2_()
        sums = weights.sum(1, keepdim=True)
        total = total.add_(sums) if start > first else sums
        if dtype == torch.float32:
            out.addmm_(weights, rows[:, :rank])
        else:
            out.add_(torch.mm(weights.to(dtype), rows[:, :rank]))
        peak, start = new_peak, stop
    if start == first:
        return out, out.new_full((len(out),), math.inf), out.new_full((len(out),), -math.inf)
    lse = total.log2().add_(peak)
    return out.div_(total), lse.mul_(math.log(2.0))[:, 0], peak.mul_(math.log(2.0))[:, 0]


def products(q: Tensor, keys: Tensor) -> Tensor:
    """``q keys`` in float32; of bfloat16 numbers to 2^-17, the rounding error of a rounding error.

    torch sums products of bfloat16 numbers in float32, and rounds the sum.
    """
    if q.dtype != torch.bfloat16:
        return torch.mm(q, keys)
    rounded = torch.mm(q, keys)
    return rounded.float().add_(torch.addmm(rounded, q, keys, beta=-1))
