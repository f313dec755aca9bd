"""The CPU path: a chunk of the cache in float32, two GEMMs and a step of online softmax at a time.

A chunk stays in the core's cache between the two products, and a 16-bit cache is widened while it
is gathered, so memory is read once. Pages that lie side by side are taken as one piece; in float32
they are not copied at all. Quantised rows, and rows chosen one by one, are gathered and dequantised
a chunk at a time. Softmax runs in base 2, because torch inlines ``exp2`` and calls a slower library
for ``exp``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import chain

import torch
from torch import Tensor

from mlakit.errors import UsageError
from mlakit.ops.cache_format import CacheFormat, Selection

CHUNK = 512
"""Tokens per chunk: 1.2 MB of float32 at 576 columns."""

THREAD_FLOPS = 1e8
"""Work that pays for a Python thread, about 1 ms of one core."""


def decode(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    kv_lora_rank: int,
    softmax_scale: float,
    causal: bool,
    cache_format: CacheFormat | None = None,
) -> tuple[Tensor, Tensor]:
    """``mla_decode`` for CPU tensors of at most 32 bits, computed in float32.

    Args:
        q: as in ``mla_decode``, and so are the others.
        k_cache: pages; of ``cache_format`` if that is given.
        block_table: page numbers.
        cache_seqlens: tokens visible.
        kv_lora_rank: columns of a row that are its value.
        softmax_scale: factor on the scores.
        causal: whether a query sees no later key.
        cache_format: of quantised pages; None for numbers in q's dtype.

    Raises:
        UsageError: if a length or a page number points outside of the table or the cache.
    """
    batch, queries, heads, width = q.shape
    flops = 2 * queries * heads * (width + kv_lora_rank) * int(cache_seqlens.sum())
    threads = min(torch.get_num_threads(), batch, int(flops / THREAD_FLOPS))
    args = (q, k_cache, block_table, cache_seqlens, kv_lora_rank, softmax_scale, causal)
    with _one_torch_thread() if threads > 1 else nullcontext():
        return _decode(*args, cache_format, threads=threads)


def decode_selected(
    q: Tensor, selections: Sequence[Selection], kv_lora_rank: int, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Each query's attention to its own selected rows, in float32.

    Args:
        q: ``[B, S, H, W]``, at most 32 bits; meets the last W columns of a row.
        selections: caches and the rows in them, attended to as one.
        kv_lora_rank: columns of a row that are its value, from the left.
        softmax_scale: factor on the scores.

    Returns:
        ``out [B, S, H, kv_lora_rank]``, ``lse`` and the largest score, ``[B, S, H]``; 0, +inf and
        -inf where a query has no row.
    """
    batch, queries, heads, width = q.shape
    scaled = q.detach().float().flatten(0, 1) * (softmax_scale / math.log(2.0))
    out = scaled.new_zeros(batch * queries, heads, kv_lora_rank)
    lse = scaled.new_full((batch * queries, heads, 1), math.inf)
    peak = scaled.new_full((batch * queries, heads, 1), -math.inf)

    def attend(job: int) -> None:
        b, s = divmod(job, queries)
        chunks = chain.from_iterable(_selected_rows(selection, b, s) for selection in selections)
        _attend(scaled[job], chunks, None, out[job], lse[job], peak[job])

    rows = batch * queries * sum(selection.slots.shape[2] for selection in selections)
    flops = 2 * heads * (width + kv_lora_rank) * rows
    threads = min(torch.get_num_threads(), batch * queries, int(flops / THREAD_FLOPS))
    with _one_torch_thread() if threads > 1 else nullcontext():
        _run(attend, list(range(batch * queries)), threads)
    shape = (batch, queries, heads)
    return out.view(*shape, kv_lora_rank), lse.view(shape), peak.mul_(math.log(2.0)).view(shape)


def _decode(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    kv_lora_rank: int,
    softmax_scale: float,
    causal: bool,
    cache_format: CacheFormat | None,
    *,
    threads: int,
) -> tuple[Tensor, Tensor]:
    """``decode`` on a number of Python threads."""
    batch, queries, heads, _ = q.shape
    dtype = q.dtype
    kv_heads = k_cache.shape[2]
    group = heads // kv_heads
    q = q.detach().unflatten(2, (kv_heads, group)).transpose(1, 2).flatten(2, 3).float()
    q = q * (softmax_scale / math.log(2.0))  # [B, G, S * group, W]; scores in base 2
    out = q.new_zeros(*q.shape[:3], kv_lora_rank)
    lse = q.new_full((*q.shape[:3], 1), math.inf)
    pages = _used_pages(k_cache, block_table, cache_seqlens)
    lengths = cache_seqlens.tolist()

    def attend(sequence: int) -> None:
        length = lengths[sequence]
        seeing = _seeing(queries, length, causal)
        visible = None
        if causal and seeing > 1:  # keys each row sees, in the rows' order
            visible = torch.arange(length - seeing + 1, length + 1)
            visible = visible.repeat_interleave(group).unsqueeze(1)
        rows = slice((queries - seeing) * group, None)
        for g in range(kv_heads if seeing else 0):
            if cache_format is None:
                chunks = _chunks(k_cache.detach()[:, :, g], pages[sequence], length)
            else:
                slots = _slots(pages[sequence], k_cache.shape[1], length)
                chunks = _stored_rows(k_cache.detach(), cache_format, slots)
            at = (sequence, g, rows)
            _attend(q[at], chunks, visible, out[at], lse[at])

    _run(attend, sorted(range(batch), key=lambda sequence: -lengths[sequence]), threads)
    out = out.unflatten(2, (queries, group)).transpose(1, 2).flatten(2, 3)
    lse = lse.view(batch, kv_heads, queries, group).transpose(2, 3).flatten(1, 2)
    return out.to(dtype), lse


def _seeing(queries: int, length: int, causal: bool) -> int:
    """How many of the S queries, counted from the last, see any key."""
    if causal:
        return min(queries, length)
    return queries if length else 0


def _used_pages(k_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> list[list[int]]:
    """The page numbers each sequence uses, in order; the garbage after them is cut off."""
    num_blocks, block_size = k_cache.shape[:2]
    capacity = block_table.shape[1] * block_size
    used = []
    for b, (table, length) in enumerate(zip(block_table.tolist(), cache_seqlens.tolist())):
        if not 0 <= length <= capacity:
            raise UsageError(
                f"cache_seqlens[{b}] is {length}; block_table has room for 0 to {capacity} tokens"
            )
        pages = table[: -(-length // block_size)]
        if pages and not 0 <= min(pages) <= max(pages) < num_blocks:
            raise UsageError(
                f"block_table[{b}] uses pages {min(pages)} to {max(pages)}; k_cache has "
                f"{num_blocks}, counted from 0"
            )
        used.append(pages)
    return used


def _chunks(cache: Tensor, pages: list[int], length: int) -> Iterator[Tensor]:
    """Cut one sequence's rows into float32 pieces ``[tokens, row]``, each valid until the next.

    Args:
        cache: pages of one kv head ``[num_blocks, P, row]``.
        pages: the sequence's page numbers.
        length: tokens in them; rows after the last are not read.
    """
    block_size, row = cache.shape[1:]
    step = max(1, CHUNK // block_size)
    buffer = torch.empty(min(step * block_size, length), row)
    for first in range(0, len(pages), step):
        some = pages[first : first + step]
        tokens = min(len(some) * block_size, length - first * block_size)
        if some == list(range(some[0], some[0] + len(some))):
            rows = cache[some[0] : some[0] + len(some)].flatten(0, 1)[:tokens]
            yield rows if rows.dtype == buffer.dtype else buffer[:tokens].copy_(rows)
            continue
        for start, page in zip(range(0, tokens, block_size), some):
            stop = min(tokens, start + block_size)
            buffer[start:stop].copy_(cache[page, : stop - start])
        yield buffer[:tokens]


def _slots(pages: list[int], block_size: int, length: int) -> Tensor:
    """Where the tokens of one sequence lie, ``page * block_size + offset``, ``[length]``."""
    starts = torch.tensor(pages).mul_(block_size)
    return (starts[:, None] + torch.arange(block_size)).flatten()[:length]


def _selected_rows(selection: Selection, b: int, s: int) -> Iterator[Tensor]:
    """The rows that one query attends to, in float32 pieces."""
    slots = selection.slots[b, min(s, selection.slots.shape[1] - 1)]
    slots = slots[: max(0, int(selection.counts[b, s]))]
    slots = slots[(slots >= 0) & (slots < selection.room)]
    return _stored_rows(selection.pages.detach(), selection.cache_format, slots)


def _stored_rows(pages: Tensor, cache_format: CacheFormat, slots: Tensor) -> Iterator[Tensor]:
    """The rows at ``slots`` in float32 pieces ``[tokens, row]``, each valid until the next."""
    buffer = torch.empty(min(CHUNK, len(slots)), cache_format.width)
    for first in range(0, len(slots), CHUNK):
        some = slots[first : first + CHUNK]
        yield cache_format.read_into(buffer[: len(some)], pages, some)


def _attend(
    q: Tensor,
    chunks: Iterator[Tensor],
    visible: Tensor | None,
    out: Tensor,
    lse: Tensor,
    top: Tensor | None = None,
) -> None:
    """Online softmax over the chunks of one sequence and kv head; fills ``out`` and ``lse``.

    Without any chunk it leaves them as they are.

    Args:
        q: scaled queries ``[rows, W]``, every one of which sees the first key.
        chunks: float32 cache rows ``[tokens, row]``, in order.
        visible: keys each row sees ``[rows, 1]``, rising; None for all.
        out: ``[rows, C]``, float32.
        lse: ``[rows, 1]``, float32.
        top: gets each row's largest score, in base 2, ``[rows, 1]``, float32.
    """
    width, rank = q.shape[1], out.shape[1]
    peak = total = torch.empty(0)
    start = 0
    for rows in chunks:
        stop = start + rows.shape[0]
        scores = torch.mm(q, rows[:, rows.shape[1] - width :].T)
        if visible is not None and stop > visible[0]:
            scores.masked_fill_(torch.arange(start, stop) >= visible, -math.inf)
        new_peak = scores.amax(1, keepdim=True)
        if start == 0:
            weights = scores.sub_(new_peak).exp2_()
            total = weights.sum(1, keepdim=True)
            torch.mm(weights, rows[:, :rank], out=out)
        else:
            new_peak = torch.maximum(peak, new_peak)
            rescale = peak.sub_(new_peak).exp2_()
            weights = scores.sub_(new_peak).exp2_()
            total.mul_(rescale).add_(weights.sum(1, keepdim=True))
            out.mul_(rescale).addmm_(weights, rows[:, :rank])
        peak, start = new_peak, stop
    if start == 0:
        return
    if top is not None:
        top.copy_(peak)
    out.div_(total)
    torch.mul(peak.add_(total.log2_()), math.log(2.0), out=lse)


def _run(task: Callable[[int], None], jobs: list[int], threads: int) -> None:
    """Do the jobs, one torch thread each on several Python threads where ``threads`` is above 1.

    Torch lets go of the interpreter lock inside its operators, so sequences run side by side
    without the barrier that several torch threads on one small product wait at (on a busy machine
    it costs far more than the product).
    """
    if threads < 2:
        for job in jobs:
            task(job)
        return
    inference = torch.is_inference_mode_enabled()

    def alone(job: int) -> None:  # grad and inference mode are per thread
        with torch.inference_mode(inference), torch.no_grad():
            task(job)

    with ThreadPoolExecutor(threads, "mla", torch.set_num_threads, (1,)) as pool:
        list(pool.map(alone, jobs))


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Keep torch's operators on one thread, here and in Python threads born meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
