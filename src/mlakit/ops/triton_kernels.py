"""The three Triton kernels of a decode call: plan the splits, attend, combine.

Work is cut into items, each some consecutive blocks of one sequence. ``plan`` cuts on the device,
so nothing waits for the lengths; ``attend`` runs one program per item, tile of query rows, tile
of value columns and kv head; ``combine`` joins sequences that were cut. All sums have a fixed
order. A row of a tile is one query of one head of a kv head's group, packed query-major.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl


# A launch compiles anew for an argument that is 1 or divisible by 16, which strides gain from. What
# differs from step to step is exempt.
@triton.jit(do_not_specialize=["batch", "parts", "capacity"])
def plan(
    lengths,
    first,
    owner,
    batch,
    parts,
    capacity,
    length_stride,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cut every sequence into items of at most 1/parts of all blocks; one program.

    Item numbers of a sequence are consecutive: sequence b has ``first[b]`` to ``first[b + 1]``,
    and ``owner[item]`` is its sequence. There are at most ``batch + parts`` items.
    """
    lane = tl.arange(0, BLOCK)
    total = 0
    for start in range(0, batch, BLOCK):
        total += tl.sum(_blocks(lengths, start + lane, batch, capacity, length_stride, TOKENS))
    share = tl.maximum(tl.cdiv(total, parts), 1)
    done = 0
    for start in range(0, batch, BLOCK):
        sequence = start + lane
        blocks = _blocks(lengths, sequence, batch, capacity, length_stride, TOKENS)
        items = tl.cdiv(blocks, share)
        begin = done + tl.cumsum(items) - items
        tl.store(first + sequence, begin, mask=sequence < batch)
        for item in range(tl.max(items)):
            tl.store(owner + begin + item, sequence, mask=item < items)
        done += tl.sum(items)
    tl.store(first + batch, done)


@triton.jit
def _blocks(lengths, sequence, batch, capacity, length_stride, TOKENS: tl.constexpr):
    """Blocks of TOKENS tokens in some sequences; 0 past the batch."""
    length = tl.load(lengths + sequence * length_stride, mask=sequence < batch, other=0)
    return tl.cdiv(tl.minimum(tl.maximum(length, 0), capacity), TOKENS)


@triton.jit
def _offset(
    table,
    entry_stride,
    block,
    stop,
    page_stride,
    token_stride,
    PAGE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Where in the cache a block starts, or where each of its tokens is if it spans pages.

    Nothing is read at ``stop`` and after.
    """
    if PAGE % TOKENS == 0:
        start = block * TOKENS
        page = tl.load(table + start // PAGE * entry_stride, mask=start < stop, other=0)
        offset = page.to(tl.int64) * page_stride + start % PAGE * token_stride
    else:
        token = block * TOKENS + tl.arange(0, TOKENS)[:, None]
        page = tl.load(table + token // PAGE * entry_stride, mask=token < stop, other=0)
        offset = page.to(tl.int64) * page_stride + token % PAGE * token_stride
    return offset


@triton.jit(do_not_specialize=["batch", "capacity", "table_stride"])
def attend(
    q,
    cache,
    table,
    lengths,
    first,
    owner,
    out,
    lse,
    partial_out,
    partial_lse,
    scale,
    batch,
    queries,
    group,
    kv_heads,
    row_tiles,
    capacity,
    q_batch_stride,
    q_query_stride,
    q_head_stride,
    page_stride,
    token_stride,
    kv_head_stride,
    table_stride,
    entry_stride,
    length_stride,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    KEY_START: tl.constexpr,
    CAUSAL: tl.constexpr,
    PAGE: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    VALUES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Online softmax over one item for one tile of rows and of value columns.

    SHARED: a cache row's first RANK columns are loaded once, as the start of the key and as the
    value; VALUES >= RANK, and KEYS covers what is left of the key (0: nothing). Otherwise the key
    is the columns from KEY_START on, taken KEYS at a time, and the value comes by itself.

    ``partial_out`` ``[items, G, S * H / G, C]`` and ``partial_lse`` (base 2, -inf if empty) hold
    items of sequences that were cut; a sequence in one item goes to ``out`` and ``lse`` directly.
    """
    value_tiles: tl.constexpr = (RANK + VALUES - 1) // VALUES
    tile = tl.program_id(0) % (row_tiles * value_tiles)
    kv_head = tl.program_id(0) // (row_tiles * value_tiles) % kv_heads
    item = tl.program_id(0) // (row_tiles * value_tiles * kv_heads)
    if item >= tl.load(first + batch):
        return
    sequence = tl.load(owner + item)
    first_item = tl.load(first + sequence)
    items = tl.load(first + sequence + 1) - first_item
    length = tl.load(lengths + sequence * length_stride)
    stop = tl.minimum(length, capacity)
    blocks = tl.cdiv(stop, TOKENS)
    share = tl.cdiv(blocks, items)
    begin = (item - first_item) * share
    end = tl.minimum(begin + share, blocks)

    row = tile // value_tiles * ROWS + tl.arange(0, ROWS)
    query = row // group
    head = kv_head * group + row % group
    real = row < queries * group
    visible = length - (queries - 1 - query) if CAUSAL else length + 0 * query
    q += sequence.to(tl.int64) * q_batch_stride
    q += (query * q_query_stride + head * q_head_stride)[:, None]
    cache += kv_head.to(tl.int64) * kv_head_stride
    table += sequence.to(tl.int64) * table_stride
    value_column = (tile % value_tiles * VALUES + tl.arange(0, VALUES))[None, :]
    real_value = value_column < RANK
    if SHARED:
        q_value = tl.load(q + value_column, mask=real[:, None] & real_value, other=0.0)
        if KEYS > 0:
            rest = RANK + tl.arange(0, KEYS)[None, :]
            q_rest = tl.load(q + rest, mask=real[:, None] & (rest < WIDTH), other=0.0)

    peak = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, VALUES], tl.float32)
    lane = tl.arange(0, TOKENS)
    within = (lane * token_stride)[:, None] if PAGE % TOKENS == 0 else 0
    # The table is read one block ahead: an address that waits for no load lets the compiler keep
    # as many blocks in flight as it has stages.
    ahead = _offset(table, entry_stride, begin, stop, page_stride, token_stride, PAGE, TOKENS)
    for block in range(begin, end):
        rows = cache + ahead + within
        ahead = _offset(
            table, entry_stride, block + 1, stop, page_stride, token_stride, PAGE, TOKENS
        )
        token = block * TOKENS + lane
        stored = (token < stop)[:, None]  # rows after the last may hold NaN
        value = tl.load(rows + value_column, mask=stored & real_value, other=0.0)
        if SHARED:
            scores = tl.dot(q_value, tl.trans(value), input_precision="ieee")
            if KEYS > 0:
                key = tl.load(rows + rest, mask=stored & (rest < WIDTH), other=0.0)
                scores = tl.dot(q_rest, tl.trans(key), scores, input_precision="ieee")
        else:
            scores = tl.zeros([ROWS, TOKENS], tl.float32)
            for start in range(0, WIDTH, KEYS):
                column = start + tl.arange(0, KEYS)[None, :]
                q_part = tl.load(q + column, mask=real[:, None] & (column < WIDTH), other=0.0)
                mask = stored & (column < WIDTH)
                key = tl.load(rows + KEY_START + column, mask=mask, other=0.0)
                scores = tl.dot(q_part, tl.trans(key), scores, input_precision="ieee")
        seen = token[None, :] < tl.minimum(visible, stop)[:, None]
        scores = tl.where(seen, scores * scale, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        level = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # finite where all is masked
        weights = tl.exp2(scores - level[:, None])
        rescale = tl.exp2(peak - level)
        total = total * rescale + tl.sum(weights, 1)
        result = result * rescale[:, None]
        result = tl.dot(weights.to(value.dtype), value, result, input_precision="ieee")
        peak = new_peak

    empty = total == 0.0
    level = peak + tl.log2(tl.where(empty, 1.0, total))
    result = result / tl.where(empty, 1.0, total)[:, None]
    store = real[:, None] & real_value
    lse_here = tile % value_tiles == 0  # the same in every tile of value columns
    if items == 1:
        heads = kv_heads * group
        at = (sequence.to(tl.int64) * queries + query) * heads + head
        tl.store(out + at[:, None] * RANK + value_column, result.to(out.dtype.element_ty), store)
        level = tl.where(empty, float("inf"), level * 0.6931471805599453)
        if lse_here:
            tl.store(lse + (sequence * heads + head) * queries + query, level, real)
    else:
        at = (item * kv_heads + kv_head).to(tl.int64) * queries * group + row
        tl.store(partial_out + at[:, None] * RANK + value_column, result, store)
        if lse_here:
            tl.store(partial_lse + at, level, real)


@triton.jit
def combine(
    out,
    lse,
    partial_out,
    partial_lse,
    first,
    queries,
    heads,
    group,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """Join the items of one row of one sequence, in order; a sequence without any gets 0, +inf."""
    head = tl.program_id(0) % heads
    query = tl.program_id(0) // heads % queries
    sequence = tl.program_id(0) // (heads * queries)
    first_item = tl.load(first + sequence)
    stop = tl.load(first + sequence + 1)
    if stop - first_item == 1:
        return
    row = (head // group * queries + query) * group + head % group
    rows = heads * queries
    peak = -float("inf")
    for start in range(first_item, stop, ITEMS):
        item = start + tl.arange(0, ITEMS)
        at = item.to(tl.int64) * rows + row
        levels = tl.load(partial_lse + at, mask=item < stop, other=-float("inf"))
        peak = tl.maximum(peak, tl.max(levels))
    level = tl.where(peak == -float("inf"), 0.0, peak)
    column = tl.arange(0, COLUMNS)
    result = tl.zeros([COLUMNS], tl.float32)
    total = 0.0
    at = first_item.to(tl.int64) * rows + row
    for _ in range(first_item, stop):
        weight = tl.exp2(tl.load(partial_lse + at) - level)
        result += weight * tl.load(partial_out + at * RANK + column, mask=column < RANK, other=0.0)
        total += weight
        at += rows
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    at = (sequence.to(tl.int64) * queries + query) * heads + head
    result = (result / total).to(out.dtype.element_ty)
    tl.store(out + at * RANK + column, result, mask=column < RANK)
    level = tl.where(empty, float("inf"), (level + tl.log2(total)) * 0.6931471805599453)
    tl.store(lse + (sequence * heads + head) * queries + query, level)
