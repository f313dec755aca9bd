"""The CPU path: a chunk of the cache in float32, two GEMMs and a step of online softmax at a time.

A chunk stays in the core's cache between the two products, and a 16-bit cache is widened while it
is gathered, so memory is read once. Pages that lie side by side are taken as one piece; in float32
they are not copied at all. Quantised rows, and rows chosen one by one, are gathered and dequantised
a chunk at a time. Softmax runs in base 2, because torch inlines ``exp2`` and calls a slower library
for ``exp``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import chain

import torch
from torch import Tensor

from mlakit.errors import UsageError
from mlakit.ops.cache_format import CacheFormat
from mlakit.ops.call import DenseCall, Selection, SparseCall

CHUNK = 512
"""Tokens per chunk: 1.2 MB of float32 at 576 columns."""

THREAD_FLOPS = 1e8
"""Work that pays for a Python thread, about 1 ms of one core."""

LOWEST = -1e30
"""Stands for a largest score where there is none, without being infinite."""


def decode(call: DenseCall) -> tuple[Tensor, Tensor]:
    """``mla_decode`` for CPU tensors of at most 32 bits, computed in float32.

    Raises:
        UsageError: if a length or a page number points outside of the table or the cache, or
            ``cu_seqlens_q`` does not divide the queries.
    """
    heads, width = call.q.shape[1:]
    kv_heads = call.k_cache.shape[2]
    q = _scaled(call.q, call.softmax_scale, call.soft_cap).unflatten(1, (kv_heads, -1))
    q = q.transpose(0, 1).contiguous()  # [G, N, H / G, W]
    out = q.new_zeros(*q.shape[:3], call.kv_lora_rank)
    lse = q.new_full((*q.shape[:3], 1), math.inf)
    pages = _used_pages(call.k_cache, call.block_table, call.cache_seqlens)
    lengths, starts = call.cache_seqlens.tolist(), call.query_starts()

    def attend(sequence: int) -> None:
        start, stop = starts[sequence : sequence + 2]
        length = lengths[sequence]
        start = max(start, stop - length) if call.causal else start  # the first that sees a key
        if start == stop or not length:
            return
        first, visible = _visible(call, stop - start, length, heads // kv_heads)
        for g in range(kv_heads):
            at = (g, slice(start, stop))
            chunks = _chunks(call, g, pages[sequence], first, length)
            rows, outs, levels = (x[at].flatten(0, 1) for x in (q, out, lse))
            _attend(rows, outs, levels, chunks, visible, first, call.soft_cap)

    flops = 2 * heads * (width + call.kv_lora_rank)
    flops *= sum((starts[b + 1] - starts[b]) * length for b, length in enumerate(lengths))
    longest_first = sorted(range(call.batch_size), key=lambda sequence: -lengths[sequence])
    _run(attend, longest_first, flops, one_thread=call.batch_invariant)
    return out.transpose(0, 1).flatten(1, 2), lse.transpose(0, 1).flatten(1)


def decode_selected(call: SparseCall) -> tuple[Tensor, Tensor, Tensor]:
    """``mla_sparse_decode`` for CPU tensors of at most 32 bits, and the largest score."""
    queries, heads, width = call.q.shape
    q = _scaled(call.q, call.softmax_scale, 0.0)
    out = q.new_zeros(queries, heads, call.kv_lora_rank)
    lse = q.new_full((queries, heads, 1), math.inf)
    top = q.new_full((queries, heads, 1), -math.inf)

    def attend(n: int) -> None:
        chunks = chain.from_iterable(_selected_rows(selection, n) for selection in call.selections)
        _attend(q[n], out[n], lse[n], chunks, top=top[n])

    rows = sum(selection.slots.shape[1] for selection in call.selections)
    flops = 2 * queries * heads * (width + call.kv_lora_rank) * rows
    _run(attend, list(range(queries)), flops, one_thread=call.batch_invariant)
    return out, lse[..., 0], top[..., 0]


def _scaled(q: Tensor, softmax_scale: float, soft_cap: float) -> Tensor:
    """Queries in float32 whose products with keys are scores in base 2, or in units of the cap."""
    return q.detach().float() * (softmax_scale / (soft_cap or math.log(2.0)))


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
    stop = torch.arange(length - queries + 1, length + 1).repeat_interleave(group).unsqueeze(1)
    begin = stop - (call.sliding_window or length)
    first = max(0, length - queries + 1 - (call.sliding_window or length))
    return first, (None if queries == 1 else (begin, stop))


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


def _chunks(
    call: DenseCall, kv_head: int, pages: list[int], first: int, length: int
) -> Iterator[Tensor]:
    """Cut one sequence's rows into float32 pieces ``[tokens, row]``, each valid until the next.

    Args:
        call: whose cache is read.
        kv_head: whose rows.
        pages: the sequence's page numbers.
        first: the first token; rows before it are not read, and neither are those ...
        length: ... from the sequence's end on.
    """
    cache, block_size = call.k_cache.detach(), call.k_cache.shape[1]
    if call.cache_format is not None:
        starts = torch.tensor(pages).mul_(block_size)
        slots = (starts[:, None] + torch.arange(block_size)).flatten()[first:length]
        yield from _stored_rows(cache, call.cache_format, slots)
        return
    cache = cache[:, :, kv_head]
    step = max(1, CHUNK // block_size)
    skipped = first // block_size
    buffer = torch.empty(min(step * block_size, length), call.row)
    for column in range(skipped, len(pages), step):
        some = pages[column : column + step]
        tokens = min(len(some) * block_size, length - column * block_size)
        begin = max(0, first - column * block_size)
        aside = some == list(range(some[0], some[0] + len(some)))
        if aside and not call.batch_invariant:  # where rows lie may change how a GEMM sums
            rows = cache[some[0] : some[0] + len(some)].flatten(0, 1)[begin:tokens]
            yield rows if rows.dtype == buffer.dtype else buffer[begin:tokens].copy_(rows)
            continue
        for start, page in zip(range(0, tokens, block_size), some):
            stop = min(tokens, start + block_size)
            start, offset = max(start, begin), max(0, begin - start)
            if start < stop:
                buffer[start:stop].copy_(cache[page, offset : offset + stop - start])
        yield buffer[begin:tokens]


def _selected_rows(selection: Selection, n: int) -> Iterator[Tensor]:
    """The rows that one query attends to, in float32 pieces."""
    slots = selection.slots[n, : max(0, int(selection.counts[n]))]
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
    out: Tensor,
    lse: Tensor,
    chunks: Iterator[Tensor],
    visible: tuple[Tensor, Tensor] | None = None,
    first: int = 0,
    soft_cap: float = 0.0,
    top: Tensor | None = None,
) -> None:
    """Online softmax over the chunks of one sequence and kv head; fills ``out`` and ``lse``.

    Without any chunk it leaves them as they are.

    Args:
        q: scaled queries ``[rows, W]``, every one of which sees some key.
        out: ``[rows, C]``, float32.
        lse: ``[rows, 1]``, float32.
        chunks: float32 cache rows ``[tokens, row]``, in order.
        visible: first key each row sees and the one after its last; None for all.
        first: number of the first key in the chunks.
        soft_cap: as in DenseCall.
        top: gets each row's largest score, ``[rows, 1]``, float32.
    """
    width, rank = q.shape[1], out.shape[1]
    peak = total = torch.empty(0)
    start = first
    for rows in chunks:
        stop = start + rows.shape[0]
        scores = torch.mm(q, rows[:, rows.shape[1] - width :].T)
        if soft_cap:
            scores.tanh_().mul_(soft_cap / math.log(2.0))
        if visible is not None:
            key = torch.arange(start, stop)
            scores.masked_fill_((key < visible[0]) | (key >= visible[1]), -math.inf)
        new_peak = scores.amax(1, keepdim=True)
        if visible is not None:  # a row may see nothing of this chunk
            new_peak.clamp_min_(LOWEST)
        if start == first:
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
    if start == first:
        return
    if top is not None:
        torch.mul(peak, math.log(2.0), out=top)
    out.div_(total)
    torch.mul(peak.add_(total.log2_()), math.log(2.0), out=lse)


def _run(task: Callable[[int], None], jobs: list[int], flops: int, *, one_thread: bool) -> None:
    """Do the jobs, one torch thread each on several Python threads where their work pays for them.

    Torch lets go of the interpreter lock inside its operators, so sequences run side by side
    without the barrier that several torch threads on one small product wait at (on a busy machine
    it costs far more than the product).

    Args:
        task: what to do, once for each of the jobs.
        jobs: its arguments.
        flops: work in all of them.
        one_thread: each job on one torch thread, however few there are.
    """
    threads = min(torch.get_num_threads(), len(jobs), int(flops / THREAD_FLOPS))
    if threads < 2:
        with _one_torch_thread() if one_thread else nullcontext():
            for job in jobs:
                task(job)
        return
    inference = torch.is_inference_mode_enabled()

    def alone(job: int) -> None:  # grad and inference mode are per thread
        with torch.inference_mode(inference), torch.no_grad():
            task(job)

    pool = ThreadPoolExecutor(threads, "mla", torch.set_num_threads, (1,))
    with _one_torch_thread(), pool:
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
