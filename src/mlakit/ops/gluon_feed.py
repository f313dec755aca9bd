"""The seesaw kernel's shared memory and the warps that fill it; the schedule is in gluon_seesaw."""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mlakit.ops.gluon_job import HALF, PAGE, RANK, ROPE, read_item, tma_load

ROWS = gl.constexpr(64)
"""Query rows of a tile, those of one matrix instruction."""


class Tiles(NamedTuple):
    """Shared memory, but for the barriers."""

    q: gl.shared_memory_descriptor  # left, right
    p: gl.shared_memory_descriptor  # of even pages; of odd pages, and the queries' rope before
    left: gl.shared_memory_descriptor
    right: gl.shared_memory_descriptor
    rope: gl.shared_memory_descriptor
    max_even: gl.shared_memory_descriptor
    max_odd: gl.shared_memory_descriptor
    sum_odd: gl.shared_memory_descriptor
    sum_all: gl.shared_memory_descriptor


class Barriers(NamedTuple):
    """Who waits for what; the last four have one barrier per page."""

    q_full: gl.shared_memory_descriptor
    q_free: gl.shared_memory_descriptor
    max_even: gl.shared_memory_descriptor
    max_odd: gl.shared_memory_descriptor
    weight_even: gl.shared_memory_descriptor
    weight_odd: gl.shared_memory_descriptor
    sum_odd: gl.shared_memory_descriptor
    sum_all: gl.shared_memory_descriptor
    left_full: gl.shared_memory_descriptor
    right_full: gl.shared_memory_descriptor
    left_free: gl.shared_memory_descriptor
    right_free: gl.shared_memory_descriptor


@gluon.jit
def producer(descriptors, job, tiles, bars, SLOT: gl.constexpr):
    """One warp: fetch every item's even (SLOT 0) or odd (1) pages, and the first its queries.

    Past an item's end it fetches the last page again, so that both halves do the same steps.
    """
    column = gl.program_id(1) * job.head_columns
    step = 0
    for number in range(job.begin, job.end):
        item = read_item(job, number)
        if SLOT == 0:
            fetch_queries(descriptors, job, item, (number - job.begin) & 1, tiles, bars)
        line = job.table + item.sequence.to(gl.int64) * job.table_stride
        for page in range(item.first + SLOT, item.stop + SLOT, 2):
            row = gl.load(line + gl.minimum(page, item.stop - 1) * job.entry_stride) * job.page_rows
            fetch_page(descriptors, row, column, (step & 1) ^ 1, tiles, bars, SLOT)
            step += 1


@gluon.jit
def fetch_queries(descriptors, job, item, turn, tiles, bars):
    """Fetch an item's tile of query rows once both halves are done with the last."""
    row = (item.sequence * gl.num_programs(1) + gl.program_id(1)) * (job.queries * job.group)
    row += gl.program_id(0) * ROWS
    mbarrier.wait(bars.q_free, turn ^ 1)
    mbarrier.expect(bars.q_full, ROWS * (RANK + ROPE) * 2)
    tma_load(descriptors.q_half, [row, 0], bars.q_full, tiles.q.index(0))
    tma_load(descriptors.q_half, [row, HALF], bars.q_full, tiles.q.index(1))
    tma_load(descriptors.q_rope, [row, RANK], bars.q_full, tiles.p.index(1))


@gluon.jit
def fetch_page(descriptors, row, column, phase, tiles, bars, SLOT: gl.constexpr):
    """Fetch a page once its place is free, first its left and rope columns, then its right."""
    full = bars.left_full.index(SLOT)
    mbarrier.wait(bars.left_free.index(SLOT), phase)
    mbarrier.expect(full, PAGE * (HALF + ROPE) * 2)
    tma_load(descriptors.cache_half, [row, column], full, tiles.left.index(SLOT))
    tma_load(descriptors.cache_rope, [row, column + RANK], full, tiles.rope.index(SLOT))
    full = bars.right_full.index(SLOT)
    mbarrier.wait(bars.right_free.index(SLOT), phase)
    mbarrier.expect(full, PAGE * HALF * 2)
    tma_load(descriptors.cache_half, [row, column + HALF], full, tiles.right.index(SLOT))
