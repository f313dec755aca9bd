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
from mlakit.ops.cpu_rows import page_rows, selected_rows, used_pages

LOWEST = -1e30
"""Stands for a largest score where there is none, without being infinite."""


def decode(call: DenseCall) -> tuple[Tensor, Tensor]:
    """``mla_decode`` for CPU tensors of at most 32 bits.

    Raises:
        UsageError: if a length or a page number points outside of the table or the cache, or
            ``cu_seqlens_q`` does not divide the queries.
    """
    heads = call.q.shape[1]
    kv_heads = call.k_cache.shape[2]
    dtype = _precision(call.q.dtype if call.cache_format is None else torch.float32)
    q = call.q.detach().to(dtype).unflatten(1, (kv_heads, -1)).transpose(0, 1).contiguous()
    out = q.new_zeros(*q.shape[:3], call.kv_lora_rank, dtype=torch.float32)  # [G, N, H / G, C]
    lse = out.new_full((*q.shape[:3], 1), math.inf)
    pages, lengths, starts = used_pages(call), call.cache_seqlens.tolist(), call.query_starts()

    for sequence, length in enumerate(lengths):
        start, stop = starts[sequence : sequence + 2]
        start = max(start, stop - length) if call.causal else start  # the first that sees a key
        if start == stop or not length:
            continue
        first, visible = _visible(call, stop - start, length, heads // kv_heads)
        for g in range(kv_heads):
            at = (g, slice(start, stop))
            rows, outs, levels = (x[at].flatten(0, 1) for x in (q, out, lse))
            pieces = page_rows(call, g, pages[sequence], first, length, dtype)
            _attend(rows, outs, levels, pieces, call.softmax_scale, call.soft_cap, visible, first)
    return out.transpose(0, 1).flatten(1, 2), lse.transpose(0, 1).flatten(1)


def decode_selected(call: SparseCall) -> tuple[Tensor, Tensor, Tensor]:
    """``mla_sparse_decode`` for CPU tensors of at most 32 bits, and the largest score."""
    queries, heads = call.q.shape[:2]
    plain = all(selection.pages.dtype == call.q.dtype for selection in call.selections)
    dtype = _precision(call.q.dtype if plain else torch.float32)
    q = call.q.detach().to(dtype)
    out = q.new_zeros(queries, heads, call.kv_lora_rank, dtype=torch.float32)
    lse = out.new_full((queries, heads, 1), math.inf)
    top = out.new_full((queries, heads, 1), -math.inf)

    for n in range(queries):
        pieces = chain.from_iterable(selected_rows(some, n, dtype) for some in call.selections)
        _attend(q[n], out[n], lse[n], pieces, call.softmax_scale, top=top[n])
    return out, lse[..., 0], top[..., 0]


def _precision(stored: torch.dtype) -> torch.dtype:
    """What rows and queries are multiplied in."""
    return stored if stored == torch.bfloat16 and _multiplies_bfloat16() else torch.float32


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
    stop = torch.arange(length - queries + 1, length + 1).repeat_interleave(group).unsqueeze(1)
    return first, (stop - window, stop)


def _attend(
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    pieces: Iterator[Tensor],
    softmax_scale: float,
    soft_cap: float = 0.0,
    visible: tuple[Tensor, Tensor] | None = None,
    first: int = 0,
    top: Tensor | None = None,
) -> None:
    """Online softmax over the rows of one sequence and kv head; fills ``out`` and ``lse``.

    Without any piece it leaves them as they are.

    Args:
        q: queries ``[rows, W]``, every one of which sees some key.
        out: ``[rows, C]``, float32.
        lse: ``[rows, 1]``, float32.
        pieces: cache rows ``[tokens, row]`` in q's dtype, in order.
        softmax_scale: as in DenseCall.
        soft_cap: as in DenseCall.
        visible: first key each row sees and the one after its last; None for all.
        first: number of the first key in the pieces.
        top: gets each row's largest score, ``[rows, 1]``, float32.
    """
    width, rank = q.shape[1], out.shape[1]
    peak = total = torch.empty(0)
    start = first
    for rows in pieces:
        stop = start + rows.shape[0]
        scores = _products(q, rows[:, rows.shape[1] - width :].T)
        if soft_cap:
            scores.mul_(softmax_scale / soft_cap).tanh_().mul_(soft_cap / math.log(2.0))
        else:
            scores.mul_(softmax_scale / math.log(2.0))
        if visible is not None:
            key = torch.arange(start, stop)
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
        if q.dtype == torch.float32:
            out.addmm_(weights, rows[:, :rank])
        else:
            out.add_(torch.mm(weights.to(q.dtype), rows[:, :rank]))
        peak, start = new_peak, stop
    if start == first:
        return
    if top is not None:
        torch.mul(peak, math.log(2.0), out=top)
    out.div_(total)
    torch.mul(peak.add_(total.log2_()), math.log(2.0), out=lse)


def _products(q: Tensor, keys: Tensor) -> Tensor:
    """``q keys`` in float32; of bfloat16 numbers to 2^-17, the rounding error of a rounding error.

    torch sums products of bfloat16 numbers in float32, and rounds the sum.
    """
    if q.dtype == torch.float32:
        return torch.mm(q, keys)
    rounded = torch.mm(q, keys)
    return rounded.float().add_(torch.addmm(rounded, q, keys, beta=-1))
