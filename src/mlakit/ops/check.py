"""What the operators ask of their arguments, checked once per call, with messages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlakit.errors import UsageError
from mlakit.ops.cache_format import PLAIN, CacheFormat

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
    heads, width = q.shape[2:]
    block_size, kv_heads, row = k_cache.shape[1:]
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
    check_table(q, block_table, cache_seqlens)
    _check_memory(q, k_cache, "k_cache")


def check_stored(
    q: Tensor, pages: Tensor, cache_format: CacheFormat, kv_lora_rank: int, name: str = "k_cache"
) -> None:
    """Refuse queries and pages of a cache format that do not fit together.

    Raises:
        UsageError: naming the argument, what it is and what it should be.
    """
    if q.dim() != 4 or q.dtype not in DTYPES:
        raise UsageError(
            f"q is {q.dtype} of shape {list(q.shape)}; it should be [B, S, H, W] of bfloat16, "
            "float16, float32 or float64"
        )
    cache_format.check(pages, name)
    if cache_format.kind in PLAIN and q.dtype != pages.dtype:
        raise UsageError(f"q is {q.dtype} and {name} is {pages.dtype}; both should be the same")
    row = cache_format.width
    if not 1 <= q.shape[3] <= row:
        raise UsageError(
            f"q is {q.shape[3]} wide and a cache row {row}; q should have 1 to {row} columns "
            "(fewer than the row: scores over its last columns only)"
        )
    if not 1 <= kv_lora_rank <= row:
        raise UsageError(f"kv_lora_rank is {kv_lora_rank}; a cache row of {row} allows 1 to {row}")
    _check_memory(q, pages, name)


def check_table(q: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> None:
    """Refuse a block table or lengths that are not this batch's, on q's device, in int32."""
    batch = q.shape[0]
    if block_table.dim() != 2 or block_table.shape[0] != batch:
        raise UsageError(
            f"block_table has shape {list(block_table.shape)}; it should be [{batch}, max_blocks]"
        )
    check_vector("block_table", block_table, q, [tuple(block_table.shape)], torch.int32)
    check_vector("cache_seqlens", cache_seqlens, q, [(batch,)], torch.int32)


def check_vector(
    name: str, tensor: Tensor, q: Tensor, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
) -> None:
    """Refuse a tensor that has none of the shapes, another dtype, or is not on q's device."""
    if tuple(tensor.shape) not in shapes:
        allowed = " or ".join(str(list(shape)) for shape in shapes)
        raise UsageError(f"{name} has shape {list(tensor.shape)}; it should be {allowed}")
    if tensor.dtype != dtype:
        raise UsageError(f"{name} is {tensor.dtype}; it should be {str(dtype).split('.')[1]}")
    _check_device(q, tensor, name)


def _check_device(q: Tensor, tensor: Tensor, name: str) -> None:
    if tensor.device != q.device:
        raise UsageError(f"{name} is on {tensor.device} and q on {q.device}; use one device")


def _check_memory(q: Tensor, pages: Tensor, pages_name: str) -> None:
    _check_device(q, pages, pages_name)
    for name, tensor in (("q", q), (pages_name, pages)):
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise UsageError(
                f"{name} is not contiguous in its last dimension",
                remedy=f"Pass {name}.contiguous().",
            )
