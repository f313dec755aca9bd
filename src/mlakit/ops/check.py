"""What ``mla_decode`` asks of its arguments, checked once per call, with messages."""

from __future__ import annotations

import torch
from torch import Tensor

from mlakit.errors import UsageError

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_decode(
    q: Tensor, k_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, kv_lora_rank: int
) -> None:
    """Refuse shapes, dtypes and devices that do not fit together.

    Only metadata is read, never a value, so the check costs microseconds and traces.

    Raises:
        UsageError: naming the argument, what it is and what it should be.
    """
    if q.dim() != 4:
        raise UsageError(f"q has shape {list(q.shape)}; it should be [B, S, H, W]")
    if k_cache.dim() != 4:
        raise UsageError(
            f"k_cache has shape {list(k_cache.shape)}; it should be [num_blocks, P, G, row]",
            remedy="A cache without a kv-head axis gets one by k_cache.unsqueeze(2).",
        )
    batch, _, heads, width = q.shape
    _, block_size, kv_heads, row = k_cache.shape
    if q.dtype not in DTYPES or q.dtype != k_cache.dtype:
        raise UsageError(
            f"q is {q.dtype} and k_cache is {k_cache.dtype}; both should be the same of "
            "bfloat16, float16, float32 and float64"
        )
    if block_size < 1 or kv_heads < 1 or heads % kv_heads:
        raise UsageError(
            f"k_cache has pages of {block_size} tokens and {kv_heads} kv heads for {heads} query "
            "heads; it needs at least one of each, and query heads divisible by kv heads"
        )
    if not 1 <= width <= row:
        raise UsageError(
            f"q is {width} wide and a cache row {row}; q should have 1 to {row} columns "
            "(fewer than the row: scores over its last columns only)"
        )
    if not 1 <= kv_lora_rank <= row:
        raise UsageError(f"kv_lora_rank is {kv_lora_rank}; a cache row of {row} allows 1 to {row}")
    if block_table.dim() != 2 or block_table.shape[0] != batch:
        raise UsageError(
            f"block_table has shape {list(block_table.shape)}; it should be [{batch}, max_blocks]"
        )
    if cache_seqlens.dim() != 1 or cache_seqlens.shape[0] != batch:
        raise UsageError(
            f"cache_seqlens has shape {list(cache_seqlens.shape)}; it should be [{batch}]"
        )
    for name, tensor in (("block_table", block_table), ("cache_seqlens", cache_seqlens)):
        if tensor.dtype != torch.int32:
            raise UsageError(f"{name} is {tensor.dtype}; it should be int32")
    for name, tensor in (
        ("k_cache", k_cache),
        ("block_table", block_table),
        ("cache_seqlens", cache_seqlens),
    ):
        if tensor.device != q.device:
            raise UsageError(f"{name} is on {tensor.device} and q on {q.device}; use one device")
    for name, tensor in (("q", q), ("k_cache", k_cache)):
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise UsageError(
                f"{name} is not contiguous in its last dimension",
                remedy=f"Pass {name}.contiguous().",
            )
