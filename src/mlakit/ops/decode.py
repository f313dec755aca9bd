"""``mla_decode``: the one attention operator that every decoded token passes through."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from mlakit.ops.cache_format import CacheFormat
from mlakit.ops.call import DenseCall, dense_call
from mlakit.ops.choose import choose, implementation


def mla_decode(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    kv_lora_rank: int,
    *,
    softmax_scale: float,
    causal: bool = True,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    cache_format: CacheFormat | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """Absorbed MLA attention of S new queries per sequence over a paged latent cache.

    Args:
        q: absorbed queries ``[B, S, H, W]``, bfloat16, float16, float32 or float64. ``W`` is the
            row width C + R (``q_nope W_UK`` beside ``q_rope``), or less: then the scores use the
            last W columns of a row only (R, for keys without a latent part). With
            ``cu_seqlens_q`` it is ``[N, H, W]``, the sequences' queries one after the other.
        k_cache: pages ``[num_blocks, P, G, C + R]`` in q's dtype, ``[c_kv | k_rope]`` per token;
            G is 1 for MLA, else query head h reads kv head ``h // (H / G)``. Or pages of
            ``cache_format``. Rows that no sequence uses are never read and may hold NaN.
        block_table: page numbers ``[B, max_blocks]``, int32; entries past a sequence's last page
            may hold anything.
        cache_seqlens: tokens visible ``[B]``, int32, the S new ones included; 0 is allowed.
        kv_lora_rank: C; the first C columns of a row are its value.
        softmax_scale: factor on the scores.
        causal: query i sees keys before ``seqlen - (S - 1 - i)``; otherwise every key.
        sliding_window: a causal query sees so many keys, itself included; None for all.
        soft_cap: scores become ``soft_cap tanh(score / soft_cap)`` (Gemma 2, arXiv 2408.00118,
            section 2); None for as they are.
        cu_seqlens_q: for sequences with different numbers of queries, where each one's start in
            N, int32 ``[B + 1]`` from 0 to N.
        max_seqlen_q: then, the most queries of one sequence; a larger number only
            costs time and memory.
        cache_format: how quantised pages hold their tokens; rows are dequantised where they are
            used, never the whole cache. ``kv_lora_rank`` may include its rope part, as MODEL1's
            does.
        batch_invariant: a sequence's result does not depend on its neighbours, bit for bit. Without
            it, results are the same in every run, but how a sequence is cut, and so how its sum is
            rounded, may depend on the batch.

    Returns:
        ``out [B, S, H, C]`` in q's dtype and ``lse [B, H, S]``, float32, natural logarithm; of
        packed queries ``[N, H, C]`` and ``[H, N]``. A row that sees no key has out 0 and lse +inf.

    Raises:
        UsageError: if shapes, dtypes or devices do not fit; on the CPU, where looking costs no
            wait for a device, also if lengths, page numbers or ``cu_seqlens_q`` point outside.

    The layout, the order of the arguments and the treatment of empty rows are FlashMLA's. Forward
    only: training uses the expanded form.
    """
    call = dense_call(
        q, k_cache, block_table, cache_seqlens, kv_lora_rank, softmax_scale=softmax_scale,
        causal=causal, sliding_window=sliding_window, soft_cap=soft_cap, cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q, cache_format=cache_format, batch_invariant=batch_invariant,
    )  # fmt: skip
    out, lse = _decode(*call.flat())
    if q.dim() == 4:
        out, lse = out.view(*q.shape[:3], kv_lora_rank), lse.view(q.shape[:3])
    return out, lse.mT.contiguous()


def _run(*fields: Any) -> tuple[Tensor, Tensor]:
    call = DenseCall.from_flat(*fields)
    choice = choose(call, os.environ.get("MLAKIT_KERNEL"))
    with torch.autocast(call.q.device.type, enabled=False):
        out, lse = implementation(choice.name).decode(call)
    return out.to(call.q.dtype).contiguous(), lse.float().contiguous()


# One argument per field of DenseCall: out [N, H, C] and lse [N, H] of packed queries.
_decode = torch.library.custom_op(
    "mlakit::mla_decode",
    _run,
    mutates_args=(),
    schema="(Tensor q, Tensor k_cache, Tensor block_table, Tensor cache_seqlens, "
    "Tensor? cu_seqlens_q, SymInt max_seqlen_q, SymInt kv_lora_rank, float softmax_scale, "
    "bool causal, SymInt sliding_window, float soft_cap, bool batch_invariant, str cache_format) "
    "-> (Tensor, Tensor)",
)


@_decode.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:2], rest[5]), q.new_empty(q.shape[:2], dtype=torch.float32)
