"""Sparse decode: each query attends to the cache rows that an index picked for it.

``mla_sparse_decode`` is the operator, ``flash_mla_sparse_fwd`` FlashMLA's name for it over keys and
values that are not paged. Any head count, page size, rank and cache format.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from mlakit.errors import UsageError
from mlakit.ops.cache_format import CacheFormat
from mlakit.ops.call import Selection, SparseCall, check_vector, selection
from mlakit.ops.choose import choose, implementation


def mla_sparse_decode(
    q: Tensor,
    k_cache: Tensor,
    indices: Tensor,
    kv_lora_rank: int,
    *,
    softmax_scale: float,
    cache_format: CacheFormat | None = None,
    topk_length: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Absorbed MLA attention of every query to its own selection of cache rows.

    Args:
        q: absorbed queries ``[B, S, H, W]``, bfloat16, float16, float32 or float64; W is the
            cache's row width, or less: then the scores use the last W columns only.
        k_cache: pages ``[num_blocks, P, 1, C + R]`` in q's dtype, or of ``cache_format``.
        indices: rows of each query, ``page * P + offset``, int32 ``[B, S, topk]``; -1 and anything
            else outside of the cache is not attended to. A row named twice counts twice.
        kv_lora_rank: columns of a row that are its value, from the left.
        softmax_scale: factor on the scores.
        cache_format: of quantised pages, both caches'; None for numbers in q's dtype.
        topk_length: int32 ``[B]``, or ``[B, S]`` for each query: only so many indices count, from
            the left.
        attn_sink: float32 ``[H]``, the score of a key without a value: ``out`` is multiplied by
            ``exp(lse) / (exp(lse) + exp(sink))``, so +inf makes it 0 and -inf changes nothing.
        extra_k_cache: a second cache attended to together with the first; its page size is its own.
        extra_indices: rows in it, int32 ``[B, S, extra_topk]``.
        extra_topk_length: as ``topk_length``, for ``extra_indices``.
        batch_invariant: a query's result does not depend on its neighbours, bit for bit.

    Returns:
        ``out [B, S, H, kv_lora_rank]`` in q's dtype, ``lse`` and the largest score, float32
        ``[B, H, S]``, natural logarithm, without the sink. A query without a row has out 0, lse
        +inf and largest score -inf.

    Raises:
        UsageError: if shapes, dtypes or devices do not fit.
    """
    first = selection(q, k_cache, indices, topk_length, cache_format, kv_lora_rank)
    second: tuple[Tensor | None, ...] = (None, None, None)
    if (extra_k_cache is None) != (extra_indices is None):
        raise UsageError("an extra cache and indices into it come together; one of them is missing")
    if extra_k_cache is not None and extra_indices is not None:
        fmt = first.cache_format
        extra = selection(
            q, extra_k_cache, extra_indices, extra_topk_length, fmt, kv_lora_rank, "extra_"
        )
        second = (extra.pages, extra.slots, extra.counts)
    elif extra_topk_length is not None:
        raise UsageError("extra_topk_length is given without an extra cache")
    if attn_sink is not None:
        check_vector("attn_sink", attn_sink, q, [(q.shape[2],)], torch.float32)
    out, *levels = _sparse(
        q.flatten(0, 1), first.pages, first.slots, first.counts, *second, kv_lora_rank,
        float(softmax_scale), attn_sink, first.cache_format.name, bool(batch_invariant),
    )  # fmt: skip
    batch, queries, heads = q.shape[:3]
    lse, top = (x.view(batch, queries, heads).transpose(1, 2).contiguous() for x in levels)
    return out.view(batch, queries, heads, kv_lora_rank), lse, top


def flash_mla_sparse_fwd(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sparse attention over keys and values that are not paged, called as FlashMLA's is.

    Args:
        q: ``[s_q, h_q, d]``.
        kv: ``[s_kv, 1, d]`` in q's dtype; the first ``d_v`` columns are the value.
        indices: int32 ``[s_q, 1, topk]``; -1 and anything from ``s_kv`` on is not attended to.
        sm_scale: factor on the scores.
        d_v: columns of a row that are its value.
        attn_sink: float32 ``[h_q]``, see ``mla_sparse_decode``.
        topk_length: int32 ``[s_q]``: only so many indices of a query count, from the left.

    Returns:
        ``out [s_q, h_q, d_v]`` in q's dtype, ``max_logits`` and ``lse``, float32 ``[s_q, h_q]``,
        natural logarithm; 0, -inf and +inf for a query without a row.

    Raises:
        UsageError: if shapes or dtypes do not fit.
    """
    if not q.dim() == kv.dim() == indices.dim() == 3 or kv.shape[1] != 1 or indices.shape[1] != 1:
        raise UsageError(
            f"q has shape {list(q.shape)}, kv {list(kv.shape)} and indices {list(indices.shape)}; "
            "they should be [s_q, h_q, d], [s_kv, 1, d] and [s_q, 1, topk]"
        )
    if topk_length is not None:
        check_vector("topk_length", topk_length, q, [(q.shape[0],)], torch.int32)
        topk_length = topk_length[None]
    out, lse, top = mla_sparse_decode(
        q[None], kv[None], indices[None, :, 0], d_v, softmax_scale=sm_scale, attn_sink=attn_sink,
        topk_length=topk_length,
    )  # fmt: skip
    return out[0], top[0].T.contiguous(), lse[0].T.contiguous()


def _run(
    q: Tensor,
    pages: Tensor,
    slots: Tensor,
    counts: Tensor,
    extra_pages: Tensor | None,
    extra_slots: Tensor | None,
    extra_counts: Tensor | None,
    kv_lora_rank: int,
    softmax_scale: float,
    attn_sink: Tensor | None,
    cache_format: str,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    fmt = CacheFormat.parse(cache_format)
    selections = [Selection(pages, fmt, slots, counts)]
    if extra_pages is not None and extra_slots is not None and extra_counts is not None:
        selections.append(Selection(extra_pages, fmt, extra_slots, extra_counts))
    call = SparseCall(q, tuple(selections), kv_lora_rank, softmax_scale, batch_invariant)
    choice = choose(call, os.environ.get("MLAKIT_KERNEL"))
    with torch.autocast(q.device.type, enabled=False):
        out, lse, top = implementation(choice.name).decode_selected(call)
        if attn_sink is not None:  # exp(lse) / (exp(lse) + exp(sink)); without a row out is 0
            share = torch.sigmoid(lse - attn_sink).masked_fill(lse == math.inf, 1)
            out = out * share[..., None]
    return out.to(q.dtype).contiguous(), lse.float().contiguous(), top.float().contiguous()


# Queries packed, [N, H, W]; out [N, H, C], lse and the largest score [N, H].
_sparse = torch.library.custom_op("mlakit::mla_sparse_decode", _run, mutates_args=())


@_sparse.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    row = q.new_empty(q.shape[:2], dtype=torch.float32)
    return q.new_empty(*q.shape[:2], rest[6]), row, torch.empty_like(row)
