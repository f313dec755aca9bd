"""FlashMLA's decode functions, on top of our operators, in both generations of its interface.

* 2025: ``get_mla_metadata(cache_seqlens, s_q * h_q // h_kv, h_kv)`` returns two tensors, the tile
  schedule and the cumulative number of splits, which every layer's call hands on.
* 2026: ``get_mla_metadata()`` returns a schedule object and None. The first call fills the object
  and later calls must ask for the same problem.

Covered are dense and sparse decode over bfloat16, float16, float32 and fp8 caches, for any page
size, latent rank, rope size and head count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mlakit.errors import UsageError
from mlakit.ops.cache_format import CacheFormat
from mlakit.ops.decode import mla_decode
from mlakit.ops.sparse import mla_sparse_decode

TILE_ROWS = 64
"""Query rows of one kv head that one part works on at a time."""

SPLIT_COST = 5
"""What starting on a request costs a part, in blocks of 64 tokens."""

SPLIT_BLOCK = 64
"""Tokens per block that the schedule counts in."""

MODEL1_ROPE = 64
"""Columns of MODEL1's rows that are not quantised."""


@dataclass
class TileSchedule:
    """The 2026 generation's schedule: one object per decoding step, shared by its layers.

    Attributes:
        problem: what the first call asked for; None before it.
    """

    problem: dict[str, int | bool | None] | None = None


def get_mla_metadata(
    cache_seqlens: Tensor | None = None,
    num_heads_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
    *,
    num_q_tokens_per_head_k: int | None = None,
) -> tuple[Tensor, Tensor] | tuple[TileSchedule, None]:
    """Plan a decoding step; call it once per step and hand the result to every layer.

    Args:
        cache_seqlens: tokens visible ``[B]``, int32.
        num_heads_per_head_k: query rows per kv head, ``s_q * h_q // h_kv``.
        num_heads_k: kv heads.
        num_heads_q: query heads; has no influence.
        is_fp8_kvcache: whether the cache is fp8; has no influence.
        topk: indices per query of sparse attention, which replace the lengths.
        num_q_tokens_per_head_k: what FlashMLA calls ``num_heads_per_head_k`` since September 2025.

    Returns:
        Without arguments ``(TileSchedule(), None)``. With the first three
        ``(tile_scheduler_metadata int32 [parts, 8], num_splits int32 [B + 1])`` on the device of
        ``cache_seqlens``: per part its first request and block, its last request and the block
        after its last, the number of the split that its first request is in, and three zeros (the
        last request of a part without work comes before its first); and the number of splits
        before each request. A part is a streaming multiprocessor, on the CPU a torch thread
        (in compiled code, which cannot ask how many there are, all of them). A CUDA graph captures
        the call: nothing is read on the host.

    Raises:
        UsageError: if only some of the arguments are given, or they are out of range.
    """
    if num_heads_per_head_k is None:
        num_heads_per_head_k = num_q_tokens_per_head_k
    if cache_seqlens is None and num_heads_per_head_k is None and num_heads_k is None:
        return TileSchedule(), None
    if cache_seqlens is None or num_heads_per_head_k is None or num_heads_k is None:
        raise UsageError(
            "get_mla_metadata was given some of its arguments",
            remedy="Pass cache_seqlens, s_q * h_q // h_kv and h_kv, or none of them.",
        )
    if cache_seqlens.dim() != 1 or cache_seqlens.dtype != torch.int32:
        raise UsageError(
            f"cache_seqlens is {cache_seqlens.dtype} of shape {list(cache_seqlens.shape)}; it "
            "should be int32 [B]"
        )
    if num_heads_per_head_k < 1 or num_heads_k < 1:
        raise UsageError(
            f"{num_heads_per_head_k} query rows per kv head and {num_heads_k} kv heads; both "
            "should be at least 1"
        )
    tiles = math.ceil(num_heads_per_head_k / TILE_ROWS)
    parts = max(1, _processors(cache_seqlens.device) // num_heads_k // tiles)
    lengths = cache_seqlens if topk is None else torch.full_like(cache_seqlens, topk)
    return tile_schedule(lengths, parts)


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: Tensor | TileSchedule,
    num_splits: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Absorbed MLA decode over a paged cache, called as FlashMLA is called.

    Args:
        q: ``[b, s_q, h_q, d]``.
        k_cache: ``[num_blocks, page_block_size, h_k, d]``, q's dtype; or fp8 pages, h_k 1.
        block_table: int32 ``[b, max_blocks]``; not looked at, and may be None, with ``indices``.
        cache_seqlens: int32 ``[b]``; the same.
        head_dim_v: columns of a cache row that are its value; ``kv_lora_rank``.
        tile_scheduler_metadata: from ``get_mla_metadata``: the tensor or the schedule object.
        num_splits: from ``get_mla_metadata``: the tensor, or None beside a schedule object.
        softmax_scale: factor on the scores; ``d ** -0.5`` if None.
        causal: query i sees keys before ``seqlen - (s_q - 1 - i)``; not with ``indices``.
        is_fp8_kvcache: the caches are in one of FlashMLA's fp8 layouts, told apart by the bytes per
            token: 656, or 584 in MODEL1 (d and head_dim_v 512); see ``cache_format`` for others.
        indices: rows that each query attends to instead of a sequence, ``page * page_block_size +
            offset``, int32 ``[b, s_q, topk]``; -1 for none.
        attn_sink: float32 ``[h_q]``, with indices: ``out *= exp(lse) / (exp(lse) + exp(sink))``.
        extra_k_cache: a second cache attended to together with the first, in the same layout.
        extra_indices_in_kvcache: rows in it, int32 ``[b, s_q, extra_topk]``.
        topk_length: int32 ``[b]``: only so many indices count, from the left.
        extra_topk_length: the same for the extra cache.

    Returns:
        ``out [b, s_q, h_q, head_dim_v]`` in q's dtype and ``lse [b, h_q, s_q]``, float32, natural
        logarithm; a row without a key has out 0 and lse +inf. How the schedule cuts the work has
        no influence on either: the implementations there are so far cut it themselves.

    Raises:
        UsageError: if shapes or dtypes do not fit, or the schedule is another problem's.
    """
    problem = _problem(
        q, k_cache, causal, is_fp8_kvcache, indices, extra_k_cache, extra_indices_in_kvcache
    )
    _check_schedule(problem, tile_scheduler_metadata, num_splits)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    cache_format = _fp8_format(q, k_cache, head_dim_v) if is_fp8_kvcache else None
    if indices is not None:
        if causal:
            raise UsageError(
                "causal is set beside indices, which already say what each query sees",
                remedy="Leave causal at False.",
            )
        out, lse, _ = mla_sparse_decode(
            q, k_cache, indices, head_dim_v, softmax_scale=scale, cache_format=cache_format,
            topk_length=topk_length, attn_sink=attn_sink, extra_k_cache=extra_k_cache,
            extra_indices=extra_indices_in_kvcache, extra_topk_length=extra_topk_length,
        )  # fmt: skip
        return out, lse
    for name, given in (
        ("attn_sink", attn_sink),
        ("extra_k_cache", extra_k_cache),
        ("extra_indices_in_kvcache", extra_indices_in_kvcache),
        ("topk_length", topk_length),
        ("extra_topk_length", extra_topk_length),
    ):
        if given is not None:
            raise UsageError(f"{name} is for sparse attention and indices is None")
    if block_table is None or cache_seqlens is None:
        raise UsageError("block_table and cache_seqlens may be None only beside indices")
    return mla_decode(
        q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale=scale, causal=causal,
        cache_format=cache_format,
    )  # fmt: skip


def tile_schedule(lengths: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Cut requests of the given lengths into ``parts`` pieces of even cost, in order.

    The requests lie in a row, each as long as its blocks and ``SPLIT_COST`` before them, and the
    row is cut into equal shares. Computed where the lengths are, without waiting for them.

    Args:
        lengths: int32 ``[B]``.
        parts: how many pieces.

    Returns:
        ``tile_scheduler_metadata`` and ``num_splits``, see ``get_mla_metadata``.
    """
    if not len(lengths):
        nothing = lengths.new_tensor([0, 0, -1, 0, 0, 0, 0, 0])
        return nothing.expand(parts, 8).contiguous(), lengths.new_zeros(1)
    blocks = (lengths + SPLIT_BLOCK - 1) // SPLIT_BLOCK
    cost = blocks.clamp_min(1) + SPLIT_COST  # an empty request is somebody's, too
    end = cost.cumsum(0, dtype=torch.int32)
    place = end - cost + SPLIT_COST  # of a request's first block in the row
    share = (end[-1] + parts - 1) // parts
    first_part, last_part = place // share, (end - 1) // share
    splits = torch.nn.functional.pad((last_part - first_part + 1).cumsum(0), (1, 0))
    part = torch.arange(parts, dtype=torch.int32, device=lengths.device)
    begin = torch.searchsorted(last_part, part)
    last = torch.searchsorted(first_part, part, right=True) - 1
    at, to = begin.clamp_max(len(lengths) - 1), last.clamp_min(0)
    starts = (part * share - place[at]).clamp_min(0)
    stops = torch.minimum((part + 1) * share - place[to], blocks[to])
    numbers = (begin, starts, last, stops, (part - first_part[at]).clamp_min(0))
    rows = torch.zeros(parts, 8, dtype=torch.int32, device=lengths.device)
    rows[:, :5] = torch.stack(numbers, 1)
    return rows, splits.to(torch.int32)


def _processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1 if torch.compiler.is_compiling() else torch.get_num_threads()


def _fp8_format(q: Tensor, k_cache: Tensor, head_dim_v: int) -> CacheFormat:
    """The fp8 layout that has so many bytes per token: the 656-byte one or MODEL1, generalised."""
    width, row = q.shape[3], k_cache.shape[3]
    formats = []
    if 1 <= head_dim_v <= width:
        formats.append(CacheFormat("fp8", head_dim_v, width - head_dim_v))
    if head_dim_v == width > MODEL1_ROPE:
        formats.append(CacheFormat("model1", width - MODEL1_ROPE, MODEL1_ROPE))
    for cache_format in formats:
        if cache_format.bytes_per_token == row:
            return cache_format
    sizes = " or ".join(str(cache_format.bytes_per_token) for cache_format in formats)
    raise UsageError(
        f"k_cache has {row} bytes per token; fp8 with q {width} wide and head_dim_v {head_dim_v} "
        f"has {sizes or 'no layout'}"
    )


def _problem(
    q: Tensor,
    k_cache: Tensor,
    causal: bool,
    is_fp8_kvcache: bool,
    indices: Tensor | None,
    extra_k_cache: Tensor | None,
    extra_indices: Tensor | None,
) -> dict[str, int | bool | None]:
    """What a schedule object is for, in the names of FlashMLA's configuration."""
    extra = extra_k_cache
    if q.dim() != 4 or k_cache.dim() != 4 or (extra is not None and extra.dim() != 4):
        raise UsageError(
            f"q has shape {list(q.shape)} and k_cache {list(k_cache.shape)}; both should have 4 "
            "dimensions, and so should an extra_k_cache"
        )
    return {
        "b": q.shape[0],
        "s_q": q.shape[1],
        "h_q": q.shape[2],
        "page_block_size": k_cache.shape[1],
        "h_k": k_cache.shape[2],
        "causal": causal,
        "is_fp8_kvcache": is_fp8_kvcache,
        "topk": None if indices is None else indices.shape[-1],
        "extra_page_block_size": None if extra is None else extra.shape[1],
        "extra_topk": None if extra_indices is None else extra_indices.shape[-1],
    }


def _check_schedule(
    problem: dict[str, int | bool | None],
    schedule: Tensor | TileSchedule,
    num_splits: Tensor | None,
) -> None:
    if isinstance(schedule, Tensor):
        batch = int(problem["b"] or 0)
        fits = schedule.shape[1:] == (8,) and schedule.dtype == torch.int32
        if num_splits is None or num_splits.shape != (batch + 1,) or not fits:
            raise UsageError(
                f"the schedule is not one for a batch of {batch}: tile_scheduler_metadata "
                "should be int32 [parts, 8] and num_splits int32 [b + 1]",
                remedy="Pass both results of get_mla_metadata(cache_seqlens, ...) of this step.",
            )
        return
    if not isinstance(schedule, TileSchedule) or num_splits is not None:
        raise UsageError(
            "tile_scheduler_metadata and num_splits are not what get_mla_metadata returns",
            remedy="Pass both of its results: two tensors, or a TileSchedule and None.",
        )
    if schedule.problem is None:
        schedule.problem = problem
    elif schedule.problem != problem:
        raise UsageError(
            f"the schedule was first used for {schedule.problem} and now for {problem}",
            remedy="Call get_mla_metadata() once per decoding step.",
        )
