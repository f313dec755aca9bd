"""What the Hopper kernels have in common: the job, its items, and where results go.

Both are Gluon: Triton's language with layouts, memory and waiting in the programmer's hands. Both
are for pages of 64 rows of 512 + 64 numbers of 16 bits, and have a fixed grid of thread blocks,
``[tiles of query rows, G, parts]``, that work through the items of ``gluon_plan``.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

PAGE = gl.constexpr(64)
RANK = gl.constexpr(512)
HALF = gl.constexpr(256)
ROPE = gl.constexpr(64)

UNSEEN = gl.constexpr(-1e33)
"""A masked score: far below any running maximum, so that its weight is 0 even in an empty row."""

LOWEST = gl.constexpr(-1e30)
"""The running maximum before the first score; finite, so that no difference is NaN."""

LN2 = gl.constexpr(0.6931471805599453)

# One name for what Triton 3.6 and 3.9 call differently.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


class Descriptors(NamedTuple):
    """Boxes to fetch: 256 and 64 columns wide, of the cache's rows and of the queries'."""

    cache_half: tma.tensor_descriptor
    cache_rope: tma.tensor_descriptor
    q_half: tma.tensor_descriptor
    q_rope: tma.tensor_descriptor


class Job(NamedTuple):
    """What the call asks for: pointers, and sizes that do not change between items."""

    table: gl.tensor  # page numbers
    lengths: gl.tensor
    items: gl.tensor
    out: gl.tensor  # [N, H, 512]
    lse: gl.tensor  # [N, H]
    partial_out: gl.tensor  # [items, G, S * H / G, 512]
    partial_lse: gl.tensor
    begin: gl.tensor  # items of this thread block's part
    end: gl.tensor
    scale: gl.tensor  # softmax scale times log2(e)
    queries: gl.tensor  # S
    group: gl.tensor  # H / G
    capacity: gl.tensor  # tokens that a line of the table has room for
    page_rows: gl.tensor  # from one page to the next, in cache rows
    head_columns: gl.tensor  # from one kv head to the next, in columns
    table_stride: gl.tensor
    entry_stride: gl.tensor
    length_stride: gl.tensor


class Item(NamedTuple):
    """Steps of one sequence, in pages: every item has an even number, but for a sequence's last."""

    sequence: gl.tensor
    first: gl.tensor  # page
    stop: gl.tensor  # page after the last
    whole: gl.tensor  # all of the sequence, so the result is final
    length: gl.tensor
    stored: gl.tensor  # tokens that the pages hold: the length, or the table's room


@gluon.jit
def read_item(job, number):
    """One line of the plan, and its sequence's length."""
    at = job.items + number * 4
    sequence = gl.load(at)
    length = gl.load(job.lengths + sequence * job.length_stride)
    stored = gl.minimum(length, job.capacity)
    first = gl.load(at + 1) * 2
    stop = gl.minimum(gl.load(at + 2) * 2, (stored + PAGE - 1) // PAGE)
    return Item(sequence, first, stop, gl.load(at + 3), length, stored)


@gluon.jit
def visible(job, item, row, CAUSAL: gl.constexpr):
    """Position after the last token of the item that a query row sees."""
    end = gl.minimum(item.stored, item.stop * PAGE)
    if CAUSAL:
        end = gl.minimum(item.length - (job.queries - 1) + row // job.group, end)
    else:
        end = end + 0 * row
    return end


@gluon.jit
def clear(values, stored, ROUND: gl.constexpr):
    """Overwrite rows from ``stored`` on with 0: they may hold NaN, which a weight of 0 keeps."""
    if stored < PAGE:
        row = gl.arange(0, PAGE, gl.SliceLayout(1, ROUND))
        for part in gl.static_range(4):
            columns = values.slice(part * 64, 64, dim=1)
            value = columns.load(ROUND)
            nothing = gl.zeros([PAGE, 64], value.dtype, ROUND)
            columns.store(gl.where((row < stored)[:, None], value, nothing))
        fence_async_shared()


@gluon.jit
def final_row(job, item, row):
    """Where a row of the tile is in ``[N, H]``."""
    head = gl.program_id(1) * job.group + row % job.group
    query = item.sequence.to(gl.int64) * job.queries + row // job.group
    return query * (gl.num_programs(1) * job.group) + head


@gluon.jit
def partial_row(job, number, row):
    """Where a row of the tile is among an item's partial results."""
    first = number.to(gl.int64) * gl.num_programs(1) + gl.program_id(1)
    return first * (job.queries * job.group) + row


@gluon.jit
def store_lse(job, item, number, l, m, row):
    """Store the logarithm of the softmax's denominator; to base 2, -inf if 0, where partial."""
    real = row < job.queries * job.group
    level = m + gl.log2(l)
    if item.whole != 0:
        level = gl.where(l == 0.0, float("inf"), level * LN2)
        gl.store(job.lse + final_row(job, item, row), level, mask=real)
    else:
        gl.store(job.partial_lse + partial_row(job, number, row), level, mask=real)


@gluon.jit
def allocate_barriers(N: gl.constexpr, ARRIVALS: gl.constexpr):
    """Some barriers that so many arrivals complete."""
    bars = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars
