"""The two Triton kernels of a decode call after ``plan``: attend to an item, combine items.

``attend`` runs one program per item, tile of query rows, tile of value columns and kv head;
``combine`` joins sequences that were cut. All sums have a fixed order. A row of a tile is one query
of one head of a kv head's group, packed query-major. For selected rows, a query is a sequence of
its own, and its slots are what its line of the table holds.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from mlakit.ops.triton_plan import span
from mlakit.ops.triton_rows import latent, locate, look_up, rope


@triton.jit(
    do_not_specialize=[
        "window", "queries", "row_tiles", "batch", "capacity", "room", "extra_capacity",
        "extra_room", "table_stride", "extra_table_stride",
    ]
)  # fmt: skip
def attend(
    q,
    out,
    lse,
    top,
    starts,
    first,
    slot,
    owner,
    partial_out,
    partial_lse,
    cache,
    table,
    lengths,
    extra_cache,
    extra_table,
    extra_lengths,
    scale,
    cap,
    window,
    queries,
    group,
    kv_heads,
    row_tiles,
    batch,
    capacity,
    room,
    extra_capacity,
    extra_room,
    q_stride,
    q_head_stride,
    page_stride,
    kv_head_stride,
    table_stride,
    extra_page_stride,
    extra_table_stride,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    RAGGED: tl.constexpr,
    SLOTS: tl.constexpr,
    LAYOUT: tl.constexpr,
    EXTRA: tl.constexpr,
    TILE: tl.constexpr,
):
    """Online softmax over one item for one tile of rows and of value columns.

    ``partial_out`` ``[slots, G, S * H / G, C]`` and ``partial_lse`` (base 2, -inf if empty; after
    it the largest scores, for SLOTS) hold items of sequences that were cut; a sequence in one item
    goes to ``out`` and ``lse`` directly.
    """
    ROWS: tl.constexpr = TILE.rows
    TOKENS: tl.constexpr = TILE.tokens
    COLUMNS: tl.constexpr = TILE.values
    value_tiles: tl.constexpr = 1 if TILE.shared else (RANK + TILE.values - 1) // TILE.values
    tile = tl.program_id(0) % (row_tiles * value_tiles)
    kv_head = tl.program_id(0) // (row_tiles * value_tiles) % kv_heads
    item = tl.program_id(0) // (row_tiles * value_tiles * kv_heads)
    if item >= tl.load(first + batch):
        return
    sequence = tl.load(owner + item)
    start = sequence.to(tl.int64) * queries
    count = queries
    if RAGGED:
        start = tl.load(starts + sequence).to(tl.int64)
        count = (tl.load(starts + sequence + 1) - start).to(tl.int32)
    row = tile // value_tiles * ROWS + tl.arange(0, ROWS)
    if tile // value_tiles * ROWS >= count * group:
        return

    first_item = tl.load(first + sequence)
    items = tl.load(first + sequence + 1) - first_item
    length = tl.load(lengths + sequence)
    stop = tl.minimum(length, capacity)
    skipped, blocks = span(length, count, window, capacity, TOKENS, WINDOW)
    own = blocks - skipped
    all_blocks = own
    if EXTRA is not None:
        extra_length = tl.load(extra_lengths + sequence)
        all_blocks += span(extra_length, count, window, extra_capacity, TOKENS, False)[1]
    share = tl.cdiv(all_blocks, items)
    begin = (item - first_item) * share
    end = tl.minimum(begin + share, all_blocks)

    query = row // group
    head = kv_head * group + row % group
    real = row < count * group
    seen_stop = length - (count - 1 - query) if CAUSAL else length + 0 * query
    seen_start = seen_stop - window
    seen_stop = tl.minimum(seen_stop, stop)
    q += ((start + query) * q_stride + head * q_head_stride)[:, None]
    value_start = tile % value_tiles * COLUMNS
    value_column = value_start + tl.arange(0, COLUMNS)[None, :]
    REST: tl.constexpr = max(TILE.keys, 1) if TILE.shared else 1
    rest = tl.arange(0, REST)[None, :]
    q_value = q
    q_rest = q
    if TILE.shared:
        mask = real[:, None] & (value_column < LAYOUT.latent)
        q_value = tl.load(q + value_column, mask=mask, other=0.0)
        mask = real[:, None] & (rest < WIDTH - LAYOUT.latent)
        if TILE.keys > 0:
            q_rest = tl.load(q + LAYOUT.latent + rest, mask=mask, other=0.0)

    peak = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    blend = tl.zeros([ROWS, COLUMNS], tl.float32)
    blend_rest = tl.zeros([ROWS, REST], tl.float32)
    cache += kv_head.to(tl.int64) * kv_head_stride * LAYOUT.unit
    table += sequence.to(tl.int64) * table_stride
    peak, total, blend, blend_rest = _scan(
        peak, total, blend, blend_rest, q, q_value, q_rest, real, value_start, cache, table,
        skipped + tl.minimum(begin, own), skipped + tl.minimum(end, own), stop, room,
        seen_start, seen_stop, scale, cap, page_stride,
        RANK, WIDTH, WINDOW, CAP, SLOTS, LAYOUT, TILE,
    )  # fmt: skip
    if EXTRA is not None:
        extra_table += sequence.to(tl.int64) * extra_table_stride
        peak, total, blend, blend_rest = _scan(
            peak, total, blend, blend_rest, q, q_value, q_rest, real, value_start, extra_cache,
            extra_table, tl.maximum(begin - own, 0), tl.maximum(end - own, 0),
            tl.minimum(extra_length, extra_capacity), extra_room, seen_start, seen_stop, scale,
            cap, extra_page_stride,
            RANK, WIDTH, WINDOW, CAP, SLOTS, EXTRA, TILE,
        )  # fmt: skip

    empty = total == 0.0
    level = peak + tl.log2(tl.where(empty, 1.0, total))
    divisor = tl.where(empty, 1.0, total)[:, None]
    blend = blend / divisor
    VALUES: tl.constexpr = min(RANK, LAYOUT.latent) if TILE.shared else RANK
    store = real[:, None] & (value_column < VALUES)
    store_rest = real[:, None] & (rest < RANK - VALUES)
    lse_here = tile % value_tiles == 0  # the same in every tile of value columns
    if items == 1:
        at = (start + query) * (kv_heads * group) + head
        dtype: tl.constexpr = out.dtype.element_ty
        tl.store(out + at[:, None] * RANK + value_column, blend.to(dtype), store)
        if RANK > VALUES:
            rest_out = (blend_rest / divisor).to(dtype)
            tl.store(out + at[:, None] * RANK + VALUES + rest, rest_out, store_rest)
        level = tl.where(empty, float("inf"), level * 0.6931471805599453)
        if lse_here:
            tl.store(lse + at, level, real)
            if SLOTS:
                tl.store(top + at, peak * 0.6931471805599453, real)
    else:
        place = tl.load(slot + sequence) + item - first_item
        at = (place * kv_heads + kv_head).to(tl.int64) * queries * group + row
        tl.store(partial_out + at[:, None] * RANK + value_column, blend, store)
        if RANK > VALUES:
            rest_place = at[:, None] * RANK + VALUES + rest
            tl.store(partial_out + rest_place, blend_rest / divisor, store_rest)
        if lse_here:
            if SLOTS:
                tl.store(partial_lse + 2 * at, level, real)
                tl.store(partial_lse + 2 * at + 1, peak, real)
            else:
                tl.store(partial_lse + at, level, real)


@triton.jit
def _scan(
    peak,
    total,
    blend,
    blend_rest,
    q,
    q_value,
    q_rest,
    real,
    value_start,
    cache,
    table,
    begin,
    end,
    stop,
    room,
    seen_start,
    seen_stop,
    scale,
    cap,
    page_stride,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    SLOTS: tl.constexpr,
    LAYOUT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Attend to some blocks of one cache; ``peak``, ``total`` and the blends are carried on.

    TILE.shared: a row's latent section is loaded once, as the start of the key and as the value,
    and the rope section ends the key and, where RANK includes it, the value. Otherwise the key is
    the last WIDTH columns, taken TILE.keys at a time, and the value comes by itself.
    """
    TOKENS: tl.constexpr = TILE.tokens
    COLUMNS: tl.constexpr = TILE.values
    KEYS: tl.constexpr = TILE.keys
    dtype: tl.constexpr = q.dtype.element_ty
    lane = tl.arange(0, TOKENS)
    # The table is read one block ahead: an address that waits for no load lets the compiler keep
    # as many blocks in flight as it has stages.
    found = look_up(table, begin, stop, room, TOKENS, LAYOUT, SLOTS)
    for block in range(begin, end):
        pages, inner = locate(cache, found, block, page_stride, TOKENS, LAYOUT, SLOTS)
        token = block * TOKENS + lane
        stored = found >= 0 if SLOTS else token < stop  # memory elsewhere may hold NaN
        found = look_up(table, block + 1, stop, room, TOKENS, LAYOUT, SLOTS)
        keep = stored[:, None]
        value = latent(pages, inner, keep, value_start, TILE.values, LAYOUT, dtype)
        if TILE.shared:
            scores = tl.dot(q_value, tl.trans(value), input_precision="ieee")
            if KEYS > 0:
                key = rope(pages, inner, keep, 0, KEYS, LAYOUT, dtype)
                scores = tl.dot(q_rest, tl.trans(key), scores, input_precision="ieee")
        else:
            if LAYOUT.latent < RANK:
                value += rope(
                    pages, inner, keep, value_start - LAYOUT.latent, COLUMNS, LAYOUT,
                    dtype,
                )  # fmt: skip
            scores = _scores(q, real, pages, inner, keep, WIDTH, LAYOUT, TILE)
        if SLOTS:
            seen = stored[None, :]
        else:
            seen = token[None, :] < seen_stop[:, None]
        if WINDOW:
            seen &= token[None, :] >= seen_start[:, None]
        scores *= scale
        if CAP:
            scores = _tanh(scores) * cap
        scores = tl.where(seen, scores, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        level = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # finite where all is masked
        weights = tl.exp2(scores - level[:, None])
        rescale = tl.exp2(peak - level)
        total = total * rescale + tl.sum(weights, 1)
        blend = blend * rescale[:, None]
        blend = tl.dot(weights.to(dtype), value, blend, input_precision="ieee")
        if TILE.shared and LAYOUT.latent < RANK:
            blend_rest = blend_rest * rescale[:, None]
            blend_rest = tl.dot(weights.to(dtype), key, blend_rest, input_precision="ieee")
        peak = new_peak
    return peak, total, blend, blend_rest


@triton.jit
def _scores(
    q,
    real,
    pages,
    inner,
    keep,
    WIDTH: tl.constexpr,
    LAYOUT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Scores over the last WIDTH columns of rows, some columns at a time."""
    KEYS: tl.constexpr = TILE.keys
    START: tl.constexpr = LAYOUT.row - WIDTH
    FAR: tl.constexpr = max(START - LAYOUT.latent, 0)
    scores = tl.zeros([real.shape[0], keep.shape[0]], tl.float32)
    for start in range(START // KEYS * KEYS, LAYOUT.latent, KEYS):
        column = start + tl.arange(0, KEYS)[None, :]
        mask = real[:, None] & (column >= START) & (column < LAYOUT.latent)
        part = tl.load(q + column - START, mask=mask, other=0.0)
        key = latent(pages, inner, keep, start, KEYS, LAYOUT, q.dtype.element_ty)
        scores = tl.dot(part, tl.trans(key), scores, input_precision="ieee")
    for start in range(FAR, LAYOUT.row - LAYOUT.latent, KEYS):
        column = start + LAYOUT.latent + tl.arange(0, KEYS)[None, :]
        mask = real[:, None] & (column < LAYOUT.row)
        part = tl.load(q + column - START, mask=mask, other=0.0)
        key = rope(pages, inner, keep, start, KEYS, LAYOUT, q.dtype.element_ty)
        scores = tl.dot(part, tl.trans(key), scores, input_precision="ieee")
    return scores


@triton.jit
def _tanh(x):
    """tanh to a few units of float32's last place: its series near 0, where 1 - 1 loses digits."""
    square = x * x
    series = (square * (62.0 / 2835) - 17.0 / 315) * square + 2.0 / 15
    series = x + x * square * (series * square - 1.0 / 3)
    decay = tl.exp2(-2.8853900817779268 * tl.abs(x))  # exp(-2 |x|)
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(square < 0.0625, series, tl.where(x < 0.0, -far, far))


@triton.jit(do_not_specialize=["queries"])
def combine(
    out,
    lse,
    top,
    starts,
    first,
    slot,
    cut,
    partial_out,
    partial_lse,
    queries,
    heads,
    group,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    ITEMS: tl.constexpr,
    RAGGED: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Join the items of one row of one sequence that was cut, in order."""
    head = tl.program_id(0) % heads
    query = tl.program_id(0) // heads % queries
    index = tl.program_id(0) // (heads * queries)
    if index >= tl.load(cut):
        return
    sequence = tl.load(cut + 1 + index)
    start = sequence.to(tl.int64) * queries
    if RAGGED:
        start = tl.load(starts + sequence).to(tl.int64)
        if start + query >= tl.load(starts + sequence + 1):
            return
    items = tl.load(first + sequence + 1) - tl.load(first + sequence)
    each: tl.constexpr = 2 if SLOTS else 1
    rows = heads * queries
    row = (head // group * queries + query) * group + head % group
    begin = tl.load(slot + sequence).to(tl.int64) * rows + row
    peak = -float("inf")
    highest = -float("inf")
    for item in range(0, items, ITEMS):
        lane = item + tl.arange(0, ITEMS)
        at = partial_lse + (begin + lane * rows) * each
        peak = tl.maximum(peak, tl.max(tl.load(at, mask=lane < items, other=-float("inf"))))
        if SLOTS:
            scores = tl.load(at + 1, mask=lane < items, other=-float("inf"))
            highest = tl.maximum(highest, tl.max(scores))
    level = tl.where(peak == -float("inf"), 0.0, peak)
    column = tl.arange(0, COLUMNS)
    result = tl.zeros([COLUMNS], tl.float32)
    total = 0.0
    at = begin
    for _ in range(items):
        weight = tl.exp2(tl.load(partial_lse + at * each) - level)
        result += weight * tl.load(partial_out + at * RANK + column, mask=column < RANK, other=0.0)
        total += weight
        at += rows
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    at = (start + query) * heads + head
    result = (result / total).to(out.dtype.element_ty)
    tl.store(out + at * RANK + column, result, mask=column < RANK)
    level = tl.where(empty, float("inf"), (level + tl.log2(total)) * 0.6931471805599453)
    tl.store(lse + at, level)
    if SLOTS:
        tl.store(top + at, highest * 0.6931471805599453)
