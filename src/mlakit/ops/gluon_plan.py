"""How the Hopper kernels share out a decode call, and how they join what was cut; plain Triton.

Work is counted in steps of ``STEP`` tokens and cut into items, consecutive steps of one sequence.
An item goes to a part, a set of thread blocks (one per tile of query rows and kv head) that stays
on its processors and works through its items in order. Everything is computed on the device and
only sizes depend on shapes, so a CUDA graph captures a call and replays it for other lengths.

The cut is FlashMLA's: imagine all sequences in a row, each costing its steps and ``COST`` more, and
cut that row into parts of equal length. Sums have a fixed order, so runs agree bit for bit. A fixed
length of items instead (``FIXED``) makes a sequence's result independent of its neighbours.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

STEP = tl.constexpr(128)
"""Tokens of a step: two pages, one for each warpgroup of the seesaw kernel."""

COST = tl.constexpr(3)
"""What starting on a sequence costs a part, in steps: loading the query, storing the result."""


@triton.jit(do_not_specialize=["batch", "capacity", "parts"])
def plan(
    lengths,
    first,
    items,
    part_items,
    batch,
    capacity,
    parts,
    length_stride,
    FIXED: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Cut the sequences into items and deal these to parts; one program.

    Sequence b has items ``first[b]`` to ``first[b + 1]``, part p has ``part_items[p]`` to
    ``part_items[p + 1]``, and an item is its sequence, its first step, the step after its last,
    and whether that is all of the sequence.

    FIXED: steps of every item; 0 to cut where parts meet. BLOCK: sequences read at once.
    PARTS: a power of two above ``parts``.
    """
    gdc_launch_dependents()
    lane = tl.arange(0, BLOCK)
    total = 0
    for start in range(0, batch, BLOCK):
        steps = _steps(lengths, start + lane, batch, capacity, length_stride)
        total += tl.sum(tl.where(steps > 0, steps + COST, 0))
    share = tl.maximum(tl.cdiv(total, parts), 1)
    part = tl.arange(0, PARTS)
    before = tl.zeros([PARTS], tl.int32)  # items of earlier parts
    done = 0
    cost = 0
    for start in range(0, batch, BLOCK):
        sequence = start + lane
        steps = _steps(lengths, sequence, batch, capacity, length_stride)
        price = tl.where(steps > 0, steps + COST, 0)
        place = cost + tl.cumsum(price, 0) - price + COST  # of the sequence's first step
        cost += tl.sum(price)
        if FIXED:
            pieces = tl.cdiv(steps, FIXED)
            ahead = tl.maximum(part[None, :] * share - place[:, None], 0)
            earlier = tl.minimum(tl.cdiv(ahead, FIXED), pieces[:, None])
        else:
            pieces = tl.where(steps > 0, (place + steps - 1) // share - place // share + 1, 0)
            ahead = tl.maximum(part[None, :] - (place // share)[:, None], 0)
            earlier = tl.minimum(ahead, pieces[:, None])
        before += tl.sum(earlier, 0)
        item = done + tl.cumsum(pieces, 0) - pieces
        done += tl.sum(pieces)
        tl.store(first + sequence, item, mask=sequence < batch)
        for piece in range(tl.max(pieces, 0)):
            if FIXED:
                begin = piece * FIXED + 0 * steps
                end = begin + FIXED
            else:
                begin = (place // share + piece) * share - place
                end = begin + share
            at = items + (item + piece) * 4
            real = piece < pieces
            tl.store(at, sequence, mask=real)
            tl.store(at + 1, tl.maximum(begin, 0), mask=real)
            tl.store(at + 2, tl.minimum(end, steps), mask=real)
            tl.store(at + 3, (pieces == 1).to(tl.int32), mask=real)
    tl.store(first + batch, done)
    tl.store(part_items + part, before, mask=part <= parts)


@triton.jit
def _steps(lengths, sequence, batch, capacity, length_stride):
    """Steps of some sequences; 0 past the batch."""
    length = tl.load(lengths + sequence * length_stride, mask=sequence < batch, other=0)
    return tl.cdiv(tl.minimum(tl.maximum(length, 0), capacity), STEP)


@triton.jit(do_not_specialize=["queries", "group", "heads", "each"])
def combine(
    out,
    lse,
    partial_out,
    partial_lse,
    first,
    queries,
    group,
    heads,
    each,
    RANK: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """Join the items of ``each`` rows of one sequence; one without any gets 0 and +inf.

    ``partial_out`` ``[items, G, S * H / G, RANK]`` is normalised and ``partial_lse`` is to base 2,
    -inf where no key was seen. ITEMS are read at once.
    """
    gdc_wait()
    sequence = tl.program_id(1)
    start = tl.load(first + sequence)
    stop = tl.load(first + sequence + 1)
    if stop - start == 1:  # was written directly
        return
    rows = queries * heads
    begin = tl.program_id(0) * each
    column = tl.arange(0, RANK)
    for row in range(begin, tl.minimum(begin + each, rows)):
        peak = float("-inf")
        for some in range(start, stop, ITEMS):
            item = some + tl.arange(0, ITEMS)
            at = item.to(tl.int64) * rows + row
            level = tl.load(partial_lse + at, mask=item < stop, other=float("-inf"))
            peak = tl.maximum(peak, tl.max(level, 0))
        empty = peak == float("-inf")
        peak = tl.where(empty, 0.0, peak)
        total = 0.0
        result = tl.zeros([RANK], tl.float32)
        for some in range(start, stop, ITEMS):
            item = some + tl.arange(0, ITEMS)
            at = item.to(tl.int64) * rows + row
            real = item < stop
            level = tl.load(partial_lse + at, mask=real, other=float("-inf"))
            weight = tl.exp2(level - peak)
            at = at[:, None] * RANK + column[None, :]
            partial = tl.load(partial_out + at, mask=real[:, None], other=0.0)
            result += tl.sum(weight[:, None] * partial, 0)
            total += tl.sum(weight, 0)
        total = tl.where(empty, 1.0, total)
        kv_head = row // (queries * group)
        query = row // group % queries
        head = kv_head * group + row % group
        at = (sequence.to(tl.int64) * queries + query) * heads + head
        tl.store(out + at * RANK + column, (result / total).to(out.dtype.element_ty))
        level = (peak + tl.log2(total)) * 0.6931471805599453
        tl.store(lse + at, tl.where(empty, float("inf"), level))
