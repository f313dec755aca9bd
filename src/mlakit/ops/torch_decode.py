"""Plain torch on any device: the whole batch at once, masked, without a wait for the device.

What runs where no kernel of ours does. Rows are gathered, and dequantised, some at a time, so
memory grows with the batch and not with the context. Rows that are not to be read (unused memory
may hold NaN, unused table entries anything) are read as row 0 and set to zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mlakit.ops.call import DenseCall, Selection, SparseCall

CHUNK = 512
"""Tokens gathered per sequence and step."""

ROWS = 1 << 15
"""Selected rows gathered per step over all queries: 75 MB of float32 at 576 columns."""


class _Softmax:
    """Running softmax of scores that come some at a time, and the blend of values.

    Args:
        shape: of one row per query, ``[..., rows]``.
        rank: columns of a value.
        like: a tensor of the device and the precision.
    """

    def __init__(self, shape: tuple[int, ...], rank: int, like: Tensor) -> None:
        self.out = like.new_zeros(*shape, rank)
        self.total = like.new_zeros(*shape, 1)
        self.peak = torch.full_like(self.total, -math.inf)

    def add(self, scores: Tensor, seen: Tensor, values: Tensor) -> None:
        """More keys: ``scores [..., rows, T]``, which of them count, ``values [..., T, rank]``."""
        scores = scores.masked_fill(~seen, -math.inf)
        peak = torch.maximum(self.peak, scores.amax(-1, keepdim=True))
        level = peak.clamp_min(torch.finfo(scores.dtype).min)  # finite where all is masked
        rescale = torch.exp(self.peak - level)
        weights = torch.exp(scores - level)
        self.total = self.total * rescale + weights.sum(-1, keepdim=True)
        self.out = self.out * rescale + weights @ values
        self.peak = peak

    def result(self) -> tuple[Tensor, Tensor]:
        """``out [..., rows, rank]`` and ``lse [..., rows]``; 0 and +inf without a key."""
        empty = self.total == 0
        lse = (self.peak + self.total.log()).masked_fill(empty, math.inf).squeeze(-1)
        return self.out / self.total.masked_fill(empty, 1), lse


def decode(call: DenseCall) -> tuple[Tensor, Tensor]:
    """``mla_decode`` in float32, or in float64 for float64 tensors.

    Raises:
        UsageError: on the CPU, where to look costs no wait, if a length or a page number points
            outside of the table or the cache, or ``cu_seqlens_q`` does not divide the queries.
    """
    if call.batch_invariant and call.batch_size:
        return _one_by_one(call)
    if call.q.device.type == "cpu":
        call.used_pages()
        call.query_starts()
    return _together(call)


def _together(call: DenseCall) -> tuple[Tensor, Tensor]:
    """All sequences at once; looks at no value."""
    if call.cu_seqlens_q is None:
        padded = call.q.unflatten(0, (call.batch_size, call.max_seqlen_q))
        counts = torch.full_like(call.cache_seqlens, call.max_seqlen_q)
        out, lse = _decode(call, padded, counts)
        return out.flatten(0, 1), lse.flatten(0, 1)
    starts, counts = call.cu_seqlens_q[:-1].long(), call.cu_seqlens_q.diff()
    place = torch.arange(call.max_seqlen_q, device=call.q.device)
    queries, heads = call.q.shape[:2]
    if not queries:
        nothing = call.q.new_zeros(0, heads, call.kv_lora_rank)
        return nothing, nothing[..., 0]
    padded = call.q[(starts[:, None] + place).clamp_max(queries - 1)]
    out, lse = _decode(call, padded, counts)
    query = torch.arange(queries, device=call.q.device)
    sequence = torch.searchsorted(call.cu_seqlens_q[1:], query, right=True)
    place = query - starts[sequence]
    return out[sequence, place], lse[sequence, place]


def _decode(call: DenseCall, q: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """``decode`` of q ``[B, S, H, W]``, of whose queries the first ``counts [B]`` are real."""
    queries, heads, width = q.shape[1:]
    kv_heads = call.k_cache.shape[2]
    group = heads // kv_heads
    precision = torch.promote_types(q.dtype, torch.float32)
    packed = q.detach().unflatten(2, (kv_heads, group)).transpose(1, 2).flatten(2, 3)
    packed = packed.to(precision) * call.softmax_scale  # [B, G, S * group, W]
    first, stop = _visible(call, counts, queries)
    first, stop = (x.repeat_interleave(group, 1)[:, None, :, None] for x in (first, stop))
    softmax = _Softmax(tuple(packed.shape[:3]), call.kv_lora_rank, packed)
    for rows, position in _pages(call, precision):
        scores = packed @ rows[..., rows.shape[-1] - width :].mT
        if call.soft_cap:
            scores = call.soft_cap * torch.tanh(scores / call.soft_cap)
        seen = (position >= first) & (position < stop)
        softmax.add(scores, seen, rows[..., : call.kv_lora_rank])
    out, lse = softmax.result()
    out = out.unflatten(2, (queries, group)).transpose(1, 2).flatten(2, 3)
    return out, lse.unflatten(2, (queries, group)).transpose(1, 2).flatten(2, 3)


def decode_selected(call: SparseCall) -> tuple[Tensor, Tensor, Tensor]:
    """``mla_sparse_decode`` in the precision of ``decode``, and the largest score."""
    queries, _, width = call.q.shape
    if call.batch_invariant and queries > 1:
        results = [decode_selected(_query(call, n)) for n in range(queries)]
        out, lse, top = (torch.cat(parts) for parts in zip(*results))
        return out, lse, top
    precision = torch.promote_types(call.q.dtype, torch.float32)
    q = call.q.detach().to(precision) * call.softmax_scale
    softmax = _Softmax(tuple(q.shape[:2]), call.kv_lora_rank, q)
    for selection in call.selections:
        for rows, seen in _selected(selection, precision):
            scores = q @ rows[..., rows.shape[2] - width :].mT
            softmax.add(scores, seen[:, None], rows[..., : call.kv_lora_rank])
    out, lse = softmax.result()
    return out, lse, softmax.peak.squeeze(-1)


def _query(call: SparseCall, n: int) -> SparseCall:
    """The call for one of the queries."""
    at = slice(n, n + 1)
    selections = tuple(
        some._replace(slots=some.slots[at], counts=some.counts[at]) for some in call.selections
    )
    return replace(call, q=call.q[at], selections=selections)


def _one_by_one(call: DenseCall) -> tuple[Tensor, Tensor]:
    """Every sequence by itself, with as much of the table as it uses; waits for the lengths."""
    starts, results = call.query_starts(), []
    for b, pages in enumerate(call.used_pages()):
        alone = replace(
            call,
            q=call.q[starts[b] : starts[b + 1]],
            block_table=call.block_table[b : b + 1, : len(pages)],
            cache_seqlens=call.cache_seqlens[b : b + 1],
            cu_seqlens_q=None,
            max_seqlen_q=starts[b + 1] - starts[b],
        )
        results.append(_together(alone))
    outs, lses = zip(*results)
    return torch.cat(outs), torch.cat(lses)


def _visible(call: DenseCall, counts: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """The first key that each query sees and the one after its last, ``[B, S]``."""
    lengths = call.cache_seqlens[:, None]
    if not call.causal:
        return torch.zeros_like(lengths).expand(-1, queries), lengths.expand(-1, queries)
    place = torch.arange(queries, device=counts.device)
    stop = lengths - (counts[:, None] - 1 - place)
    stop = torch.minimum(stop, lengths)  # queries past the real ones see what the last one sees
    return stop - call.sliding_window if call.sliding_window else torch.zeros_like(stop), stop


def _pages(call: DenseCall, precision: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows ``[B, G, tokens, row]`` of some pages of each sequence, and places ``[tokens]``."""
    cache, table = call.k_cache.detach(), call.block_table
    block_size = cache.shape[1]
    step = max(1, CHUNK // block_size)
    offset = torch.arange(block_size, device=cache.device)
    for first in range(0, table.shape[1] if cache.shape[0] else 0, step):
        columns = table[:, first : first + step]
        start = torch.arange(first, first + columns.shape[1], device=cache.device) * block_size
        pages = columns.masked_fill(start >= call.cache_seqlens[:, None], 0)
        if call.cache_format is None:
            rows = cache[pages].flatten(1, 2).transpose(1, 2).to(precision)
        else:
            slots = (pages.long()[..., None] * block_size + offset).flatten(1)
            rows = call.cache_format.read(cache, slots, precision)[:, None]
        position = (start[:, None] + offset).flatten()
        unused = position >= call.cache_seqlens[:, None]
        yield rows.masked_fill(unused[:, None, :, None], 0), position


def _selected(selection: Selection, precision: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Some selected rows of each query ``[N, k, row]``, and whether they count ``[N, k]``."""
    pages, cache_format, slots, counts = selection
    queries, selected = slots.shape
    step = max(1, ROWS // max(1, queries))
    for first in range(0, selected if selection.room else 0, step):
        some = slots[:, first : first + step]
        place = torch.arange(first, first + some.shape[1], device=some.device)
        seen = (some >= 0) & (some < selection.room) & (place < counts[:, None])
        rows = cache_format.read(pages.detach(), some.masked_fill(~seen, 0), precision)
        yield rows.masked_fill(~seen[..., None], 0), seen
