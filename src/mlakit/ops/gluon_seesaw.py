"""Hopper kernel for many query rows: two warpgroups that take turns, fed by two warps.

A thread block keeps 64 query rows and works through its part's items (see ``gluon_plan``). Scores
of 64 rows against a page of 64 tokens, and a 64 x 256 half of the result, are what a warpgroup's
registers hold, so two warpgroups share the work (the schedule that FlashMLA's authors describe):

* ``even_half`` (the default partition) scores even pages and owns result columns 0 to 255;
* ``odd_half`` scores odd pages and owns columns 256 to 511;
* two ``producer`` warps have the tensor memory accelerator fetch queries and pages, one the even
  pages, one the odd, so that neither waits for the other's place to become free.

Each half needs the weights of both pages: its own come from registers, the other's from shared
memory. While one computes a softmax, the other keeps the tensor cores busy. Per step, that is two
pages, with s the scores, m the running maximum, p the weights:

====  =============================================  =============================================
      even_half                                      odd_half
====  =============================================  =============================================
1     m0 = max(m, s0); publishes m0 (max_even)       s1 = q k1
2     p0; o += p0 v0, left                           m1 = max(m0, s1); publishes m1 (max_odd)
3     rescales p0 to m1; publishes it (weight_even)  p1; publishes it (weight_odd)
4     o += p1 v1, left; next s0 = q k0               o += p0 v0 + p1 v1, right
====  =============================================  =============================================

Shared memory: queries 72 KiB; two pages, each as left, right (256 columns) and rope (64), 144 KiB;
p0 8 KiB; p1 lives where the queries' rope columns were, which both halves have in registers then.
Barriers of page i: ``left_full[i]`` (left and rope) and ``right_full[i]``, by the accelerator;
``left_free[i]`` by even_half after its last product with left, when all scores that need left and
rope are long there, and ``right_free[i]`` by odd_half likewise. A barrier completes once per step,
those of the queries (``q_full``, ``q_free``) and of the softmax sums once per item.

The compiler would compute a hundred addresses before the loop and spill them. An index that it
cannot see through (``opaque``) keeps them in the loop, where they cost an addition each.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mlakit.ops.gluon_feed import ROWS, Barriers, Tiles, producer
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
    visible,
)


@gluon.jit
def opaque(value: gl.constexpr):
    """A constant that the compiler takes for a variable, so that it hoists nothing made of it."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [gl.to_tensor(value)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def hide(s, border, edge, start, SCORES: gl.constexpr):
    """Scores of the page that starts at ``start``, without what rows do not see.

    No row's ``border`` is below ``edge``, so most pages need nothing.
    """
    if start + PAGE > edge:
        token = start + gl.arange(0, PAGE, gl.SliceLayout(0, SCORES))
        s = gl.where(token[None, :] < border[:, None], s, UNSEEN)
    return s


@gluon.jit
def begin_scores(q_rope, phase, tiles, bars, SLOT: gl.constexpr, SCORES: gl.constexpr):
    """Start on the scores of a page with its left and rope columns, which come first."""
    slot = opaque(SLOT)
    s = gl.zeros([ROWS, PAGE], gl.float32, SCORES)
    mbarrier.wait(bars.left_full.index(SLOT), phase)
    key = tiles.left.index(slot).permute((1, 0))
    s = warpgroup_mma(tiles.q.index(opaque(0)), key, s, use_acc=False, is_async=True)
    key = tiles.rope.index(slot).permute((1, 0))
    return warpgroup_mma(q_rope, key, s, is_async=True)


@gluon.jit
def finish_scores(s, phase, tiles, bars, SLOT: gl.constexpr):
    """Add the right columns."""
    mbarrier.wait(bars.right_full.index(SLOT), phase)
    key = tiles.right.index(opaque(SLOT)).permute((1, 0))
    s = warpgroup_mma(tiles.q.index(opaque(1)), key, s, is_async=True)
    return warpgroup_mma_wait(0, deps=[s])


@gluon.jit
def even_step(
    o, l, m, s, page, phase, q_rope, border, edge, item, scale, tiles, bars,
    LAST: gl.constexpr, SCORES: gl.constexpr, RESULT: gl.constexpr, ROUND: gl.constexpr,
):  # fmt: skip
    """A step of even_half, whose scores ``s`` are there; unless LAST, starts the next one's."""
    ROW: gl.constexpr = gl.SliceLayout(1, RESULT)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, RESULT, 2)
    even, odd = opaque(0), opaque(1)
    s = hide(s * scale, border, edge, page * PAGE, SCORES)
    m_even = gl.maximum(m, gl.max(s, 1))
    rescale = gl.exp2(m - m_even)
    tiles.max_even.store(m_even)
    mbarrier.arrive(bars.max_even, count=1)
    p = gl.exp2(s - m_even[:, None])
    l = l * rescale + gl.sum(p, 1)
    o = o * gl.convert_layout(rescale, ROW)[:, None]
    weights = gl.convert_layout(p.to(tiles.p.dtype), WEIGHTS)
    if LAST:
        clear(tiles.left.index(even), item.stored - page * PAGE, ROUND)
    product = warpgroup_mma(weights, tiles.left.index(even), o, is_async=True)
    o = warpgroup_mma_wait(0, deps=[product])
    mbarrier.arrive(bars.left_free.index(0), count=1)
    mbarrier.wait(bars.max_odd, phase)
    m = tiles.max_odd.load(gl.SliceLayout(1, SCORES))
    rescale = gl.exp2(m_even - m)
    tiles.p.index(even).store((p * rescale[:, None]).to(tiles.p.dtype))
    fence_async_shared()
    mbarrier.arrive(bars.weight_even, count=1)
    l = l * rescale
    o = o * gl.convert_layout(rescale, ROW)[:, None]
    mbarrier.wait(bars.weight_odd, phase)
    if LAST:
        clear(tiles.left.index(odd), item.stored - (page + 1) * PAGE, ROUND)
    product = warpgroup_mma(tiles.p.index(odd), tiles.left.index(odd), o, is_async=True)
    if LAST:
        o = warpgroup_mma_wait(0, deps=[product])
        mbarrier.arrive(bars.left_free.index(1), count=1)
    else:
        s = begin_scores(q_rope, phase ^ 1, tiles, bars, 0, SCORES)
        o = warpgroup_mma_wait(2, deps=[product])  # while the two products of the scores go on
        mbarrier.arrive(bars.left_free.index(1), count=1)
        s = finish_scores(s, phase ^ 1, tiles, bars, 0)
    return o, l, m, s


@gluon.jit
def even_half(
    job, tiles, bars,
    CAUSAL: gl.constexpr, SCORES: gl.constexpr, RESULT: gl.constexpr, ROUND: gl.constexpr,
):  # fmt: skip
    """Even pages' scores and the left half of the result."""
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    row = gl.program_id(0) * ROWS + gl.arange(0, ROWS, ROW)
    step = 0
    for number in range(job.begin, job.end):
        item = read_item(job, number)
        turn = (number - job.begin) & 1
        border = visible(job, item, row, CAUSAL)
        edge = visible(job, item, gl.program_id(0) * ROWS, CAUSAL)
        o = gl.zeros([ROWS, HALF], gl.float32, RESULT)
        l = gl.zeros([ROWS], gl.float32, ROW)
        m = gl.full([ROWS], LOWEST, gl.float32, ROW)
        mbarrier.wait(bars.q_full, turn)
        q_rope = tiles.p.index(1).load(gl.DotOperandLayout(0, SCORES, 2))
        s = begin_scores(q_rope, step & 1, tiles, bars, 0, SCORES)
        s = finish_scores(s, step & 1, tiles, bars, 0)
        for page in range(item.first, item.stop - 2, 2):
            o, l, m, s = even_step(
                o, l, m, s, page, step & 1, q_rope, border, edge, item, job.scale, tiles, bars,
                False, SCORES, RESULT, ROUND,
            )  # fmt: skip
            step += 1
        last = item.first + (item.stop - item.first - 1) // 2 * 2
        o, l, m, s = even_step(
            o, l, m, s, last, step & 1, q_rope, border, edge, item, job.scale, tiles, bars,
            True, SCORES, RESULT, ROUND,
        )  # fmt: skip
        step += 1
        mbarrier.arrive(bars.q_free, count=1)
        mbarrier.wait(bars.sum_odd, turn)
        l = l + tiles.sum_odd.load(ROW)
        tiles.sum_all.store(l)
        mbarrier.arrive(bars.sum_all, count=1)
        store_result(job, item, number, o, l, 0, RESULT)
        store_lse(job, item, number, l, m, row)


@gluon.jit
def odd_step(
    o, l, m, page, phase, q_rope, border, edge, item, scale, tiles, bars,
    SCORES: gl.constexpr, RESULT: gl.constexpr, ROUND: gl.constexpr,
):  # fmt: skip
    """A step of odd_half; ``page`` is the even one."""
    ROW: gl.constexpr = gl.SliceLayout(1, RESULT)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, RESULT, 2)
    even, odd = opaque(0), opaque(1)
    s = begin_scores(q_rope, phase, tiles, bars, 1, SCORES)
    s = finish_scores(s, phase, tiles, bars, 1)
    s = hide(s * scale, border, edge, (page + 1) * PAGE, SCORES)
    peak = gl.max(s, 1)
    mbarrier.wait(bars.max_even, phase)
    m_odd = gl.maximum(tiles.max_even.load(gl.SliceLayout(1, SCORES)), peak)
    tiles.max_odd.store(m_odd)
    mbarrier.arrive(bars.max_odd, count=1)
    rescale = gl.exp2(m - m_odd)
    p = gl.exp2(s - m_odd[:, None])
    l = l * rescale + gl.sum(p, 1)
    o = o * gl.convert_layout(rescale, ROW)[:, None]
    weights = p.to(tiles.p.dtype)
    tiles.p.index(odd).store(weights)
    fence_async_shared()
    mbarrier.arrive(bars.weight_odd, count=1)
    clear(tiles.right.index(odd), item.stored - (page + 1) * PAGE, ROUND)
    clear(tiles.right.index(even), item.stored - page * PAGE, ROUND)
    weights = gl.convert_layout(weights, WEIGHTS)
    mbarrier.wait(bars.weight_even, phase)
    product = warpgroup_mma(tiles.p.index(even), tiles.right.index(even), o, is_async=True)
    product = warpgroup_mma(weights, tiles.right.index(odd), product, is_async=True)
    product = warpgroup_mma_wait(1, deps=[product])  # the first of the two
    mbarrier.arrive(bars.right_free.index(0), count=1)
    o = warpgroup_mma_wait(0, deps=[product])
    mbarrier.arrive(bars.right_free.index(1), count=1)
    return o, l, m_odd


@gluon.jit
def odd_half(
    job, tiles, bars,
    CAUSAL: gl.constexpr, SCORES: gl.constexpr, RESULT: gl.constexpr, ROUND: gl.constexpr,
):  # fmt: skip
    """Odd pages' scores and the right half of the result."""
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    row = gl.program_id(0) * ROWS + gl.arange(0, ROWS, ROW)
    step = 0
    for number in range(job.begin, job.end):
        item = read_item(job, number)
        turn = (number - job.begin) & 1
        border = visible(job, item, row, CAUSAL)
        edge = visible(job, item, gl.program_id(0) * ROWS, CAUSAL)
        o = gl.zeros([ROWS, HALF], gl.float32, RESULT)
        l = gl.zeros([ROWS], gl.float32, ROW)
        m = gl.full([ROWS], LOWEST, gl.float32, ROW)
        mbarrier.wait(bars.q_full, turn)
        q_rope = tiles.p.index(1).load(gl.DotOperandLayout(0, SCORES, 2))
        for page in range(item.first, item.stop, 2):
            o, l, m = odd_step(
                o, l, m, page, step & 1, q_rope, border, edge, item, job.scale, tiles, bars,
                SCORES, RESULT, ROUND,
            )  # fmt: skip
            step += 1
        mbarrier.arrive(bars.q_free, count=1)
        tiles.sum_odd.store(l)
        mbarrier.arrive(bars.sum_odd, count=1)
        mbarrier.wait(bars.sum_all, turn)
        l = tiles.sum_all.load(ROW)
        store_result(job, item, number, o, l, HALF, RESULT)


@gluon.jit
def store_result(job, item, number, o, l, COLUMN: gl.constexpr, RESULT: gl.constexpr):
    """Normalise half a result and store it: in its final place, or beside its sequence's others."""
    ROW: gl.constexpr = gl.SliceLayout(1, RESULT)
    row = gl.program_id(0) * ROWS + gl.arange(0, ROWS, ROW)
    column = (COLUMN + gl.arange(0, HALF, gl.SliceLayout(0, RESULT)))[None, :]
    real = (row < job.queries * job.group)[:, None]
    o = o * gl.convert_layout(1.0 / gl.where(l == 0.0, 1.0, l), ROW)[:, None]
    if item.whole != 0:
        at = final_row(job, item, row)[:, None] * RANK + column
        gl.store(job.out + at, o.to(job.out.dtype.element_ty), mask=real)
    else:
        at = partial_row(job, number, row)[:, None] * RANK + column
        gl.store(job.partial_out + at, o, mask=real)


@gluon.jit(do_not_specialize=["queries", "group", "capacity", "table_stride"])
def seesaw(
    cache_half, cache_rope, q_half, q_rope, table, lengths, part_items, items, out, lse,
    partial_out, partial_lse, scale, queries, group, capacity, page_rows, head_columns,
    table_stride, entry_stride, length_stride, CAUSAL: gl.constexpr,
):  # fmt: skip
    """One thread block of one part; 4 warps, to which it adds 4, 1 and 1."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PAGE, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    ROUND: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    VECTOR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    dtype: gl.constexpr = cache_half.dtype
    tiles = Tiles(
        gl.allocate_shared_memory(dtype, [2, ROWS, HALF], TILE),
        gl.allocate_shared_memory(dtype, [2, ROWS, PAGE], TILE),
        gl.allocate_shared_memory(dtype, [2, PAGE, HALF], TILE),
        gl.allocate_shared_memory(dtype, [2, PAGE, HALF], TILE),
        gl.allocate_shared_memory(dtype, [2, PAGE, ROPE], TILE),
        gl.allocate_shared_memory(gl.float32, [ROWS], VECTOR),
        gl.allocate_shared_memory(gl.float32, [ROWS], VECTOR),
        gl.allocate_shared_memory(gl.float32, [ROWS], VECTOR),
        gl.allocate_shared_memory(gl.float32, [ROWS], VECTOR),
    )
    one = allocate_barriers(7, 1)
    q_free = allocate_barriers(1, 2)
    bars = Barriers(
        one.index(0), q_free.index(0), one.index(1), one.index(2), one.index(3), one.index(4),
        one.index(5), one.index(6), allocate_barriers(2, 1), allocate_barriers(2, 1),
        allocate_barriers(2, 1), allocate_barriers(2, 1),
    )  # fmt: skip
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
            (even_half, (job, tiles, bars, CAUSAL, SCORES, RESULT, ROUND)),
            (odd_half, (job, tiles, bars, CAUSAL, SCORES, RESULT, ROUND)),
            (producer, (descriptors, job, tiles, bars, 0)),
            (producer, (descriptors, job, tiles, bars, 1)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )
