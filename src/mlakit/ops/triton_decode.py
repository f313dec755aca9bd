"""The Triton path: any GPU that Triton compiles for, any heads, rank, page size and cache format.

Nothing here waits for the device or reads a length on the host: how a sequence is cut is computed
by a kernel, and the grid depends on shapes only, so a CUDA graph captures the call. Imported when
it is chosen, because it imports Triton.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from mlakit.ops.cache_format import PLAIN, QUANTISED, CacheFormat
from mlakit.ops.call import DenseCall, SparseCall
from mlakit.ops.triton_kernels import attend, combine
from mlakit.ops.triton_plan import plan
from mlakit.ops.triton_rows import Layout
from mlakit.ops.triton_tiles import Tile, choose_tile

WAVES = 2
"""Items per processor to aim for; more even out the load, fewer spare partial results."""

PIECES, LEAST = 16, 512
"""With batch invariance, a sequence is cut into so many items at most, of so many tokens at least.

Then its own length alone says where it is cut.
"""

LOG2_E = 1 / math.log(2.0)
PLAN_LANES, COMBINE_ITEMS = 256, 32

FUSION = {"enable_fp_fusion": True}
"""Multiply-adds fused, whatever the version's default: Triton 3.10 switches them off, and the
exponentials' arguments and the rescaling would take twice the instructions, rounded once more."""


@dataclass(frozen=True)
class _Rows:
    """Cache rows of sequences: their memory, and for each sequence a line of a table and a length.

    Attributes:
        pages: plain numbers, or bytes.
        strides: of pages and kv heads, in units of ``layout.unit`` elements.
        table: page numbers, or slots.
        lengths: tokens of each sequence, or slots that count.
        capacity: what a line of the table has room for.
        room: rows in the cache.
        layout: what is built into the kernel.
    """

    pages: Tensor
    strides: tuple[int, int]
    table: Tensor
    lengths: Tensor
    capacity: int
    room: int
    layout: Layout


def why_not(call: DenseCall | SparseCall) -> str:
    """Why these kernels cannot run a call; empty if they can."""
    if isinstance(call, DenseCall):
        caches = [(call.k_cache, call.cache_format)]
    else:
        caches = [(some.pages, some.cache_format) for some in call.selections]
    if len({cache_format for _, cache_format in caches}) > 1:
        return "its two caches have different formats"
    for pages, cache_format in caches:
        quantised = cache_format is not None and cache_format.kind not in PLAIN
        if quantised and any(n % 4 for n in (pages.data_ptr(), *pages.stride()[:2])):
            return "its quantised tokens do not start at multiples of 4 bytes"
    return ""


def decode(call: DenseCall) -> tuple[Tensor, Tensor]:
    """``mla_decode`` for tensors of at most 32 bits, summed in float32.

    A length above what the table has room for counts as all of it.
    """
    block_size, kv_heads = call.k_cache.shape[1:3]
    group = call.q.shape[1] // kv_heads
    source = _rows(
        call.k_cache, call.cache_format, call.kv_lora_rank, call.block_table, call.cache_seqlens,
        block_size=block_size,
    )  # fmt: skip
    # Batch invariance: a tile that suits the queries of the batch's longest would depend on it.
    rows = group if call.batch_invariant else group * call.max_seqlen_q
    out, lse, _ = _launch(
        call, [source], rows, call.batch_size, call.max_seqlen_q, kv_heads, False,
        starts=call.cu_seqlens_q, causal=call.causal, window=call.sliding_window,
        soft_cap=call.soft_cap,
    )  # fmt: skip
    return out, lse


def decode_selected(call: SparseCall) -> tuple[Tensor, Tensor, Tensor]:
    """``mla_sparse_decode`` without the sink, and the largest score."""
    sources = [
        _rows(pages, cache_format, call.kv_lora_rank, slots, counts)
        for pages, cache_format, slots, counts in call.selections
    ]
    queries, heads = call.q.shape[:2]
    return _launch(call, sources, heads, queries, 1, 1, True)


def _rows(
    pages: Tensor,
    cache_format: CacheFormat | None,
    rank: int,
    table: Tensor,
    lengths: Tensor,
    block_size: int = 0,
) -> _Rows:
    """A cache as the kernels take it; ``block_size`` where the table holds pages, not slots."""
    pages = pages.detach()
    count, page = pages.shape[:2]
    room, capacity = count * page, table.shape[1] * (block_size or 1)
    if cache_format is None or cache_format.kind in PLAIN:
        page_stride, token_stride = pages.stride()[:2]
        kv_head_stride = pages.stride(2) if pages.shape[2] > 1 else 0
        if not block_size and (count == 1 or page_stride == page * token_stride):
            page, page_stride = 1, token_stride  # a slot is its own address: one kernel for all
        unit = math.gcd(16, page_stride, token_stride, kv_head_stride)
        layout = Layout("plain", page, pages.shape[3], rank, token_stride, unit)
    else:
        pages = pages.view(torch.uint8)
        values, *scales = cache_format.part_widths
        codes = cache_format.code_bytes
        page_stride, kv_head_stride = pages.stride(0), 0
        token_stride = values if scales else pages.stride(1)
        unit = math.gcd(16, page_stride, token_stride)
        scale_bytes = QUANTISED[cache_format.kind].scale_dtype.itemsize * cache_format.groups
        layout = Layout(
            cache_format.kind, page, cache_format.width, cache_format.kv_lora_rank, token_stride,
            unit, cache_format.group, page * values if scales else codes,
            scales[0] if scales else 0, codes if scales else codes + scale_bytes,
        )  # fmt: skip
    strides = (page_stride // unit, kv_head_stride // unit)
    return _Rows(pages, strides, table.contiguous(), lengths.contiguous(), capacity, room, layout)


def _launch(
    call: DenseCall | SparseCall,
    sources: list[_Rows],
    rows: int,
    batch: int,
    queries: int,
    kv_heads: int,
    selected: bool,
    *,
    starts: Tensor | None = None,
    causal: bool = False,
    window: int = 0,
    soft_cap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plan, attend and combine.

    Args:
        call: has the queries, the scale and the rank.
        sources: one cache, or two that are attended to as one.
        rows: query rows of a kv head that the tile is to suit.
        batch: sequences.
        queries: most queries of one sequence.
        kv_heads: G.
        selected: the tables hold slots.
        starts: of ragged queries.
        causal: see ``DenseCall``, also for the rest.
        window: 0 for none.
        soft_cap: 0.0 for none.
    """
    q, rank = call.q.detach(), call.kv_lora_rank
    heads, width = q.shape[1:]
    group = heads // kv_heads
    out = q.new_empty(len(q), heads, rank)
    lse = q.new_empty(len(q), heads, dtype=torch.float32)
    top = torch.empty_like(lse)  # memory of its own: an operator's results may not share any
    if not len(q):
        return out, lse, top
    target, processors = _device(q.device)
    whole = selected or sources[0].layout.page % 32 == 0
    lean = whole and group % 16 == 0 and not soft_cap
    tile = _tile(q, sources, rows, rank, target, lean)
    row_tiles = math.ceil(queries * group / tile.rows)
    tiles = row_tiles * kv_heads * (1 if tile.shared else math.ceil(rank / tile.values))
    parts = max(1, WAVES * processors // tiles)
    blocks = sum(math.ceil(source.capacity / tile.tokens) for source in sources)
    least = math.ceil(LEAST / tile.tokens)
    if call.batch_invariant:
        cuts = batch
        items = batch * max(1, min(PIECES, math.ceil(blocks / least)))
        slots = items
    else:
        cuts = min(batch, parts)
        items = min(batch + parts, batch * max(1, blocks))
        slots = min(items, 2 * parts)
    schedule = q.new_empty(2 * batch + cuts + items + 2, dtype=torch.int32)
    first, slot, cut, owner = schedule.split([batch + 1, batch, cuts + 1, items])
    partial_out = q.new_empty(slots, heads * queries, rank, dtype=torch.float32)
    partial_lse = q.new_empty(slots, heads * queries, 1 + selected, dtype=torch.float32)
    one, two = sources[0], sources[-1]
    ragged, extra = starts is not None, len(sources) > 1
    starts = one.lengths if starts is None else starts.contiguous()
    scale, cap = call.softmax_scale * LOG2_E, 0.0
    if soft_cap:
        scale, cap = call.softmax_scale / soft_cap, soft_cap * LOG2_E
    with torch.cuda.device_of(q):
        plan[(1,)](
            one.lengths, two.lengths, starts, first, slot, cut, owner, batch, parts, queries,
            window, one.capacity, two.capacity, TOKENS=tile.tokens, LANES=PLAN_LANES,
            RAGGED=ragged, WINDOW=window > 0, EXTRA=extra,
            PIECES=PIECES if call.batch_invariant else 0, LEAST=least, **FUSION,
        )  # fmt: skip
        attend[(items * tiles,)](
            q, out, lse, top, starts, first, slot, owner, partial_out, partial_lse,
            one.pages, one.table, one.lengths, two.pages, two.table, two.lengths,
            scale, cap, window, queries, group, kv_heads, row_tiles, batch,
            one.capacity, one.room, two.capacity, two.room, *q.stride()[:2],
            *one.strides, one.table.stride(0), two.strides[0], two.table.stride(0),
            RANK=rank, WIDTH=width, CAUSAL=causal, WINDOW=window > 0, CAP=soft_cap > 0,
            RAGGED=ragged, SLOTS=selected, LAYOUT=one.layout, EXTRA=two.layout if extra else None,
            TILE=tile, num_warps=tile.warps, num_stages=tile.stages, **FUSION,
        )  # fmt: skip
        combine[(cuts * queries * heads,)](
            out, lse, top, starts, first, slot, cut, partial_out, partial_lse, queries, heads,
            group, RANK=rank, COLUMNS=triton.next_power_of_2(rank), ITEMS=COMBINE_ITEMS,
            RAGGED=ragged, SLOTS=selected, **FUSION,
        )  # fmt: skip
    return out, lse, top


def _tile(q: Tensor, sources: list[_Rows], rows: int, rank: int, target: str, lean: bool) -> Tile:
    """The tile that suits ``rows`` query rows of a kv head and the memory of the caches."""
    layout = sources[0].layout
    aligned = not any(
        source.pages.data_ptr() % 16 or source.layout.unit * source.pages.itemsize % 16
        for source in sources
    )
    return choose_tile(
        target, q.dtype, layout.kind, rows, rank, q.shape[2], layout.latent, layout.row, aligned,
        len(sources), lean,
    )  # fmt: skip


def _device(device: torch.device) -> tuple[str, int]:
    """Target of a device as the table of tiles names it, and its processors."""
    if device.type != "cuda":  # Triton's interpreter
        return "sm_80", 4
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return "hip", properties.multi_processor_count
    return f"sm_{properties.major}{properties.minor}", properties.multi_processor_count
