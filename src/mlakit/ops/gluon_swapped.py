"""Hopper kernel for few query rows: keys take a matrix instruction's 64 rows, queries its columns.

With 16 or 32 query rows most of a 64-row tile would be padding, and the time goes into reading the
cache anyway. So the operands swap places: scores are ``k q^T`` ``[64 tokens, rows]`` and the
result is ``v^T p`` ``[512, rows]``, in two halves of 256. One partition of 8 warps, ``consumer``,
computes; one warp, ``producer``, has the tensor memory accelerator fetch ``STAGES`` pages ahead.

Shared memory: queries 18 or 36 KiB, two pages of 72 KiB, weights 2 or 4 KiB. ``full[stage]`` is
completed by the accelerator, ``free[stage]`` by the consumer after its last product with the page.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mlakit.ops.gluon_job import (
    HALF,
    LOWEST,
    PAGE,
    RANK,
    ROPE,
    UNSEEN,
    Descriptors,
    Job,
    allocate_barriers,
    clear,
    final_row,
    partial_row,
    read_item,
    store_lse,
    tma_load,
    visible,
)

STAGES = gl.constexpr(2)
"""Pages in shared memory; a third would not fit."""


class Tiles(NamedTuple):
    """Shared memory, but for the barriers."""

    q: gl.shared_memory_descriptor  # left, right
    q_rope: gl.shared_memory_descriptor
    p: gl.shared_memory_descriptor
    left: gl.shared_memory_descriptor
    right: gl.shared_memory_descriptor
    rope: gl.shared_memory_descriptor


class Barriers(NamedTuple):
    """Who waits for what; the last two have one barrier per stage."""

    q_full: gl.shared_memory_descriptor
    q_free: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor


@gluon.jit
def producer(descriptors, job, tiles, bars, ROWS: gl.constexpr):
    """One warp: fetch every item's queries and pages."""
    column = gl.program_id(1) * job.head_columns
    count = 0
    for number in range(job.begin, job.end):
        item = read_item(job, number)
        rows = job.queries * job.group
        row = (item.sequence * gl.num_programs(1) + gl.program_id(1)) * rows
        row += gl.program_id(0) * ROWS
        mbarrier.wait(bars.q_free, ((number - job.begin) & 1) ^ 1)
        mbarrier.expect(bars.q_full, ROWS * (RANK + ROPE) * 2)
        tma_load(descriptors.q_half, [row, 0], bars.q_full, tiles.q.index(0))
        tma_load(descriptors.q_half, [row, HALF], bars.q_full, tiles.q.index(1))
        tma_load(descriptors.q_rope, [row, RANK], bars.q_full, tiles.q_rope)
        line = job.table + item.sequence.to(gl.int64) * job.table_stride
        for page in range(item.first, item.stop):
            stage = count % STAGES
            full = bars.full.index(stage)
            row = gl.load(line + page * job.entry_stride) * job.page_rows
            mbarrier.wait(bars.free.index(stage), (count // STAGES & 1) ^ 1)
            mbarrier.expect(full, PAGE * (RANK + ROPE) * 2)
            tma_load(descriptors.cache_half, [row, column], full, tiles.left.index(stage))
            tma_load(descriptors.cache_rope, [row, column + RANK], full, tiles.rope.index(stage))
            tma_load(descriptors.cache_half, [row, column + HALF], full, tiles.right.index(stage))
            count += 1


@gluon.jit
def step(
    left, right, l, m, page, count, border, edge, item, scale, tiles, bars,
    ROWS: gl.constexpr, SCORES: gl.constexpr, ROUND: gl.constexpr,
):  # fmt: skip
    """One page; ``left`` and ``right`` are the result's halves so far, ``[256, ROWS]``."""
    stage = count % STAGES
    mbarrier.wait(bars.full.index(stage), count // STAGES & 1)
    s = gl.zeros([PAGE, ROWS], gl.float32, SCORES)
    q_left, q_right = tiles.q.index(0).permute((1, 0)), tiles.q.index(1).permute((1, 0))
    s = warpgroup_mma(tiles.left.index(stage), q_left, s, use_acc=False, is_async=True)
    s = warpgroup_mma(tiles.rope.index(stage), tiles.q_rope.permute((1, 0)), s, is_async=True)
    s = warpgroup_mma(tiles.right.index(stage), q_right, s, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    s = s * scale
    if (page + 1) * PAGE > edge:
        token = page * PAGE + gl.arange(0, PAGE, gl.SliceLayout(1, SCORES))
        s = gl.where(token[:, None] < border[None, :], s, UNSEEN)
    clear(tiles.left.index(stage), item.stored - page * PAGE, ROUND)
    clear(tiles.right.index(stage), item.stored - page * PAGE, ROUND)
    peak = gl.maximum(m, gl.max(s, 0))
    rescale = gl.exp2(m - peak)
    p = gl.exp2(s - peak[None, :])
    l = l * rescale + gl.sum(p, 0)
    tiles.p.store(p.to(tiles.p.dtype))
    fence_async_shared()
    left = left * rescale[None, :]
    right = right * rescale[None, :]
    left = warpgroup_mma(tiles.left.index(stage).permute((1, 0)), tiles.p, left, is_async=True)
    right = warpgroup_mma(tiles.right.index(stage).permute((1, 0)), tiles.p, right, is_async=True)
    left, right = warpgroup_mma_wait(0, deps=[left, right])
    mbarrier.arrive(bars.free.index(stage), count=1)
    return left, right, l, peak


@gluon.jit
def consumer(
    job, tiles, bars,
    CAUSAL: gl.constexpr, ROWS: gl.constexpr, SCORES: gl.constexpr, ROUND: gl.constexpr,
):  # fmt: skip
    """All of the arithmetic."""
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    row = gl.program_id(0) * ROWS + gl.arange(0, ROWS, COLUMN)
    count = 0
    for number in range(job.begin, job.end):
        item = read_item(job, number)
        border = visible(job, item, row, CAUSAL)
        edge = visible(job, item, gl.program_id(0) * ROWS, CAUSAL)
        left = gl.zeros([HALF, ROWS], gl.float32, SCORES)
        right = gl.zeros([HALF, ROWS], gl.float32, SCORES)
        l = gl.zeros([ROWS], gl.float32, COLUMN)
        m = gl.full([ROWS], LOWEST, gl.float32, COLUMN)
        mbarrier.wait(bars.q_full, (number - job.begin) & 1)
        for page in range(item.first, item.stop):
            left, right, l, m = step(
                left, right, l, m, page, count, border, edge, item, job.scale, tiles, bars,
                ROWS, SCORES, ROUND,
            )  # fmt: skip
            count += 1
        mbarrier.arrive(bars.q_free, count=1)
        store_result(job, item, number, left, l, row, 0, SCORES)
        store_result(job, item, number, right, l, row, HALF, SCORES)
        store_lse(job, item, number, l, m, row)


@gluon.jit
def store_result(job, item, number, o, l, row, COLUMN: gl.constexpr, SCORES: gl.constexpr):
    """Normalise half a result and store it: in its final place, or beside its sequence's others."""
    column = (COLUMN + gl.arange(0, HALF, gl.SliceLayout(1, SCORES)))[:, None]
    real = (row < job.queries * job.group)[None, :]
    o = o * (1.0 / gl.where(l == 0.0, 1.0, l))[None, :]
    if item.whole != 0:
        at = final_row(job, item, row)[None, :] * RANK + column
        gl.store(job.out + at, o.to(job.out.dtype.element_ty), mask=real)
    else:
        at = partial_row(job, number, row)[None, :] * RANK + column
        gl.store(job.partial_out + at, o, mask=real)


@gluon.jit(do_not_specialize=["queries", "group", "capacity", "table_stride"])
def swapped(
    cache_half, cache_rope, q_half, q_rope, table, lengths, part_items, items, out, lse,
    partial_out, partial_lse, scale, queries, group, capacity, page_rows, head_columns,
    table_stride, entry_stride, length_stride, CAUSAL: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """One thread block of one part; 8 warps, to which it adds one. ROWS is 16 or 32."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, ROWS, 16])
    ROUND: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    WEIGHTS: gl.constexpr = gl.NVMMASharedLayout(ROWS * 2, 16, 2)
    dtype: gl.constexpr = cache_half.dtype
    tiles = Tiles(
        gl.allocate_shared_memory(dtype, [2, ROWS, HALF], TILE),
        gl.allocate_shared_memory(dtype, [ROWS, ROPE], TILE),
        gl.allocate_shared_memory(dtype, [PAGE, ROWS], WEIGHTS),
        gl.allocate_shared_memory(dtype, [STAGES, PAGE, HALF], TILE),
        gl.allocate_shared_memory(dtype, [STAGES, PAGE, HALF], TILE),
        gl.allocate_shared_memory(dtype, [STAGES, PAGE, ROPE], TILE),
    )
    queue = allocate_barriers(2, 1)
    bars = Barriers(
        queue.index(0), queue.index(1), allocate_barriers(STAGES, 1), allocate_barriers(STAGES, 1)
    )
    fence_async_shared()
    gdc_wait()
    gdc_launch_dependents()
    part = gl.program_id(2)
    job = Job(
        table, lengths, items, out, lse, partial_out, partial_lse,
        gl.load(part_items + part), gl.load(part_items + part + 1), scale, queries, group, capacity,
        page_rows, head_columns, table_stride, entry_stride, length_stride,
    )  # fmt: skip
    descriptors = Descriptors(cache_half, cache_rope, q_half, q_rope)
    gl.warp_specialize(
        [
            (consumer, (job, tiles, bars, CAUSAL, ROWS, SCORES, ROUND)),
            (producer, (descriptors, job, tiles, bars, ROWS)),
        ],
        [1],
        [56],
    )
