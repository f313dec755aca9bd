"""Where the CPU path's cache rows come from: pages, quantised pages, rows chosen one by one.

Each function cuts what a query attends to into pieces ``[tokens, row]``, each valid until the next
is asked for: a piece is small enough to stay in the CPU's caches between the two products that
read it, so memory is read once. Pages that lie side by side are taken as one piece, without a copy
where they hold the piece's dtype already.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mlakit.ops.cache_format import CacheFormat
from mlakit.ops.call import DenseCall, Selection

CHUNK = 1024
"""Tokens per piece in float32, 2.4 MB at 576 columns; as many bytes in other dtypes."""


def page_rows(
    call: DenseCall, kv_head: int, pages: list[int], first: int, length: int, dtype: torch.dtype
) -> Iterator[Tensor]:
    """One sequence's rows.

    Args:
        call: whose cache is read.
        kv_head: whose rows.
        pages: the sequence's page numbers.
        first: the first token; rows before it are left out, and so are those ...
        length: ... from the sequence's end on.
        dtype: of the pieces.
    """
    cache, block_size = call.k_cache.detach(), call.k_cache.shape[1]
    if call.cache_format is not None:
        starts = torch.tensor(pages, device="cpu").mul_(block_size)
        offsets = torch.arange(block_size, device="cpu")
        slots = (starts[:, None] + offsets).flatten()[first:length]
        yield from stored_rows(cache, call.cache_format, slots, dtype)
        return
    cache = cache[:, :, kv_head]
    step = max(1, _tokens(dtype) // block_size)
    gathered = cache.new_empty(min(step, len(pages)), block_size, call.row)
    converted = gathered if dtype == cache.dtype else torch.empty_like(gathered, dtype=dtype)
    for column in range(first // block_size, len(pages), step):
        some = pages[column : column + step]
        begin = max(0, first - column * block_size)
        stop = min(len(some) * block_size, length - column * block_size)
        aside = some == list(range(some[0], some[0] + len(some)))
        if aside and not call.batch_invariant:  # where rows lie may change how a GEMM sums
            rows = cache[some[0] : some[0] + len(some)]
        else:
            rows = gathered[: len(some)]
            torch.index_select(cache, 0, torch.tensor(some, device="cpu"), out=rows)
        rows = rows.flatten(0, 1)[begin:stop]
        if dtype != cache.dtype:
            rows = converted.flatten(0, 1)[begin:stop].copy_(rows)
        yield rows


def selected_rows(selection: Selection, n: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """The rows that one query attends to."""
    slots = selection.slots[n, : max(0, int(selection.counts[n]))]
    slots = slots[(slots >= 0) & (slots < selection.room)]
    return stored_rows(selection.pages.detach(), selection.cache_format, slots, dtype)


def stored_rows(
    pages: Tensor, cache_format: CacheFormat, slots: Tensor, dtype: torch.dtype
) -> Iterator[Tensor]:
    """The rows at ``slots``, dequantised."""
    step = _tokens(dtype)
    buffer = pages.new_empty(min(step, len(slots)), cache_format.width, dtype=dtype)
    for first in range(0, len(slots), step):
        some = slots[first : first + step]
        yield cache_format.read_into(buffer[: len(some)], pages, some)


def _tokens(dtype: torch.dtype) -> int:
    return CHUNK * 4 // dtype.itemsize
