"""Where each sequence is cut, computed on the device: no launch waits for the lengths.

Work is cut into items, each some consecutive blocks of one sequence. A selection of cache rows is
a sequence too, of its slots; two selections that are attended to as one follow each other.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl


# A launch compiles anew for an argument that is 1 or divisible by 16, which strides gain from. What
# differs from step to step is exempt.
@triton.jit(do_not_specialize=["batch", "parts", "queries", "window", "capacity", "extra_capacity"])
def plan(
    lengths,
    extra_lengths,
    starts,
    first,
    slot,
    cut,
    owner,
    batch,
    parts,
    queries,
    window,
    capacity,
    extra_capacity,
    TOKENS: tl.constexpr,
    LANES: tl.constexpr,
    RAGGED: tl.constexpr,
    WINDOW: tl.constexpr,
    EXTRA: tl.constexpr,
    PIECES: tl.constexpr,
    LEAST: tl.constexpr,
):
    """Cut every sequence into items; one program.

    Without PIECES an item has at most 1/parts of all blocks: at most ``batch + parts`` items, at
    most ``parts`` sequences are cut, into at most ``2 parts`` items together. With PIECES a
    sequence is cut into at most so many items, of at least LEAST blocks, by its own length alone.

    Item numbers of a sequence are consecutive: sequence b has ``first[b]`` to ``first[b + 1]``, one
    at least, and ``owner[item]`` is its sequence. ``cut[0]`` sequences are cut, ``cut[1:]``; the
    partial results of sequence b's items then start at ``slot[b]``.
    """
    lane = tl.arange(0, LANES)
    total = 0
    if PIECES == 0:
        for start in range(0, batch, LANES):
            total += tl.sum(
                _blocks(
                    lengths, extra_lengths, starts, start + lane, batch, queries, window, capacity,
                    extra_capacity, TOKENS, RAGGED, WINDOW, EXTRA,
                )
            )  # fmt: skip
    share = tl.maximum(tl.cdiv(total, parts), 1)
    done = 0
    spare = 0
    cuts = 0
    for start in range(0, batch, LANES):
        sequence = start + lane
        blocks = _blocks(
            lengths, extra_lengths, starts, sequence, batch, queries, window, capacity,
            extra_capacity, TOKENS, RAGGED, WINDOW, EXTRA,
        )  # fmt: skip
        if PIECES > 0:
            items = tl.cdiv(blocks, tl.maximum(tl.cdiv(blocks, PIECES), LEAST))
        else:
            items = tl.cdiv(blocks, share)
        items = tl.where(sequence < batch, tl.maximum(items, 1), 0)
        begin = done + tl.cumsum(items) - items
        tl.store(first + sequence, begin, mask=sequence < batch)
        for item in range(tl.max(items)):
            tl.store(owner + begin + item, sequence, mask=item < items)
        done += tl.sum(items)
        divided = (items > 1).to(tl.int32)
        pieces = items * divided
        tl.store(slot + sequence, spare + tl.cumsum(pieces) - pieces, mask=divided > 0)
        spare += tl.sum(pieces)
        tl.store(cut + cuts + tl.cumsum(divided), sequence, mask=divided > 0)
        cuts += tl.sum(divided)
    tl.store(first + batch, done)
    tl.store(cut, cuts)


@triton.jit
def _blocks(
    lengths,
    extra_lengths,
    starts,
    sequence,
    batch,
    queries,
    window,
    capacity,
    extra_capacity,
    TOKENS: tl.constexpr,
    RAGGED: tl.constexpr,
    WINDOW: tl.constexpr,
    EXTRA: tl.constexpr,
):
    """Blocks of some sequences; 0 past the batch."""
    real = sequence < batch
    count = queries
    if RAGGED:
        count = tl.load(starts + sequence + 1, mask=real, other=0)
        count -= tl.load(starts + sequence, mask=real, other=0)
    length = tl.load(lengths + sequence, mask=real, other=0)
    begin, end = span(length, count, window, capacity, TOKENS, WINDOW)
    blocks = end - begin
    if EXTRA:
        length = tl.load(extra_lengths + sequence, mask=real, other=0)
        blocks += span(length, count, window, extra_capacity, TOKENS, WINDOW)[1]
    return tl.where(real, blocks, 0)


@triton.jit
def span(length, queries, window, capacity, TOKENS: tl.constexpr, WINDOW: tl.constexpr):
    """The first block that a sequence's queries see, and the one after the last."""
    end = tl.cdiv(tl.minimum(tl.maximum(length, 0), capacity), TOKENS)
    begin = end * 0
    if WINDOW:  # the first query's first key
        begin = tl.minimum(tl.maximum(length - (queries - 1) - window, 0) // TOKENS, end)
    return begin, end
