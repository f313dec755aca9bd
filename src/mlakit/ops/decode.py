"""``mla_decode``: the one attention operator that every decoded token passes through."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from mlakit.ops import cpu, torch_decode
from mlakit.ops.check import check_decode
from mlakit.ops.choose import choose
from mlakit.ops.reference import reference_decode


def _triton(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    kv_lora_rank: int,
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    from mlakit.ops import triton_decode  # imports Triton, which need not be installed

    return triton_decode.decode(
        q, k_cache, block_table, cache_seqlens, kv_lora_rank, softmax_scale, causal
    )


IMPLEMENTATIONS = {
    "cpu": cpu.decode,
    "triton": _triton,
    "torch": torch_decode.decode,
    "reference": reference_decode,
}


def mla_decode(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    kv_lora_rank: int,
    *,
    softmax_scale: float,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Absorbed MLA attention of S new queries per sequence over a paged latent cache.

    Args:
        q: absorbed queries ``[B, S, H, W]``, bfloat16, float16, float32 or float64. ``W`` is the
            row width C + R (``q_nope W_UK`` beside ``q_rope``), or less: then the scores use the
            last W columns of a row only (R, for keys without a latent part).
        k_cache: pages ``[num_blocks, P, G, C + R]`` in q's dtype, ``[c_kv | k_rope]`` per token;
            G is 1 for MLA, else query head h reads kv head ``h // (H / G)``. Rows that no sequence
            uses are never read and may hold NaN.
        block_table: page numbers ``[B, max_blocks]``, int32; entries past a sequence's last page
            may hold anything.
        cache_seqlens: tokens visible ``[B]``, int32, the S new ones included; 0 is allowed.
        kv_lora_rank: C; the first C columns of a row are its value.
        softmax_scale: factor on the scores.
        causal: query i sees keys before ``seqlen - (S - 1 - i)``; otherwise every key.

    Returns:
        ``out [B, S, H, C]`` in q's dtype and ``lse [B, H, S]``, float32, natural logarithm. A row
        that sees no key has out 0 and lse +inf.

    Raises:
        UsageError: if shapes, dtypes or devices do not fit.

    The layout, the order of the arguments and the treatment of empty rows are FlashMLA's. Forward
    only: training uses the expanded form.
    """
    check_decode(q, k_cache, block_table, cache_seqlens, kv_lora_rank)
    return _decode(
        q, k_cache, block_table, cache_seqlens, kv_lora_rank, float(softmax_scale), bool(causal)
    )


@torch.library.custom_op("mlakit::mla_decode", mutates_args=())
def _decode(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    kv_lora_rank: int,
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    choice = choose(q.device.type, q.dtype, os.environ.get("MLAKIT_KERNEL"))
    with torch.autocast(q.device.type, enabled=False):
        out, lse = IMPLEMENTATIONS[choice.name](
            q, k_cache, block_table, cache_seqlens, kv_lora_rank, softmax_scale, causal
        )
    return out.to(q.dtype).contiguous(), lse.float().contiguous()


@_decode.register_fake
def _(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    kv_lora_rank: int,
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    out = q.new_empty(batch, queries, heads, kv_lora_rank)
    return out, q.new_empty(batch, heads, queries, dtype=torch.float32)
