"""``mla_quantised_decode``: dense decode over pages of a cache format, see ``cache_format``."""

from __future__ import annotations

import torch
from torch import Tensor

from mlakit.ops import cpu, sparse_torch
from mlakit.ops.cache_format import CacheFormat, Selection
from mlakit.ops.check import check_stored, check_table


def mla_quantised_decode(
    q: Tensor,
    k_cache: Tensor,
    cache_format: CacheFormat,
    block_table: Tensor,
    cache_seqlens: Tensor,
    kv_lora_rank: int,
    *,
    softmax_scale: float,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Absorbed MLA attention of S new queries per sequence over a paged, quantised latent cache.

    Rows are dequantised some at a time, next to where they are used; never the whole cache.

    Args:
        q: as in ``mla_decode``.
        k_cache: pages of ``cache_format``.
        cache_format: how they hold their tokens.
        block_table: as in ``mla_decode``.
        cache_seqlens: as in ``mla_decode``.
        kv_lora_rank: columns of a row that are its value, from the left; may include the rope part,
            as MODEL1's do.
        softmax_scale: factor on the scores.
        causal: query i sees keys before ``seqlen - (S - 1 - i)``; otherwise every key.

    Returns:
        ``out [B, S, H, kv_lora_rank]`` in q's dtype and ``lse [B, H, S]``, as ``mla_decode``.

    Raises:
        UsageError: if shapes, dtypes or devices do not fit.
    """
    check_stored(q, k_cache, cache_format, kv_lora_rank)
    check_table(q, block_table, cache_seqlens)
    return _decode(
        q, k_cache, block_table, cache_seqlens, kv_lora_rank, float(softmax_scale), bool(causal),
        cache_format.kind, cache_format.kv_lora_rank, cache_format.qk_rope_head_dim,
        cache_format.group,
    )  # fmt: skip


@torch.library.custom_op("mlakit::mla_quantised_decode", mutates_args=())
def _decode(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    kv_lora_rank: int,
    softmax_scale: float,
    causal: bool,
    kind: str,
    format_rank: int,
    format_rope: int,
    group: int,
) -> tuple[Tensor, Tensor]:
    cache_format = CacheFormat(kind, format_rank, format_rope, group)
    with torch.autocast(q.device.type, enabled=False):
        if q.device.type == "cpu" and q.dtype != torch.float64:
            out, lse = cpu.decode(
                q, k_cache, block_table, cache_seqlens, kv_lora_rank, softmax_scale, causal,
                cache_format,
            )  # fmt: skip
        else:
            selection = _visible_rows(
                k_cache, cache_format, block_table, cache_seqlens, q.shape[1], causal
            )
            out, lse, _ = sparse_torch.decode_selected(q, [selection], kv_lora_rank, softmax_scale)
            lse = lse.transpose(1, 2)
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
    kind: str,
    format_rank: int,
    format_rope: int,
    group: int,
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    out = q.new_empty(batch, queries, heads, kv_lora_rank)
    return out, q.new_empty(batch, heads, queries, dtype=torch.float32)


def _visible_rows(
    k_cache: Tensor,
    cache_format: CacheFormat,
    block_table: Tensor,
    cache_seqlens: Tensor,
    queries: int,
    causal: bool,
) -> Selection:
    """The rows a block table names, in order, and how many of them each query sees."""
    block_size = k_cache.shape[1]
    offset = torch.arange(block_size, device=block_table.device)
    slots = (block_table.long()[:, :, None] * block_size + offset).flatten(1)[:, None]
    behind = torch.arange(queries - 1, -1, -1, device=block_table.device)
    counts = cache_seqlens[:, None] - (behind if causal else torch.zeros_like(behind))
    return Selection(k_cache, cache_format, slots, counts)
