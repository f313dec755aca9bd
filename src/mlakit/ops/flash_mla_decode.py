"""The original: calls handed to an installed ``flash_mla``, in either generation of its interface.

Only what was asked for by name comes here (``MLAKIT_KERNEL=flash_mla``): to compare, or to trust.
Its schedule is made anew in every call, because an operator's call knows nothing of the step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mlakit.ops.call import DenseCall, Selection, SparseCall

SPARSE_HEADS = (64, 128)
SPARSE_FORMATS = {"fp8:512+64/128": 576, "model1:448+64/64": 512}
"""Cache formats of sparse attention, and how wide q is; the value is always 512 wide."""

TOPK_MULTIPLE = 128
"""Indices per query come in multiples of this."""


def why_not(call: DenseCall | SparseCall) -> str:
    """Why ``flash_mla`` cannot run a call; empty if it can."""
    if find_spec("flash_mla") is None:
        return "flash_mla is not installed"
    dense = isinstance(call, DenseCall)
    reason = _why_not_dense(call) if isinstance(call, DenseCall) else _why_not_sparse(call)
    if reason:
        return reason
    if call.batch_invariant:
        return "how it cuts a sequence depends on the batch"
    capabilities = [(9, 0)] if dense else [(9, 0), (10, 0)]
    if call.q.device.type != "cuda" or torch.version.hip:
        return "it is for NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability(call.q.device)
    if (major, minor) not in capabilities:
        names = " and ".join(f"{a}.{b}" for a, b in capabilities)
        return f"it is for GPUs of compute capability {names}, not {major}.{minor}"
    return ""


def _why_not_dense(call: DenseCall) -> str:
    if call.cache_format is not None:
        return "its dense attention is for caches that are not quantised"
    if call.q.dtype not in (torch.bfloat16, torch.float16):
        return f"it is for bfloat16 and float16, not {call.q.dtype}"
    widths = (call.kv_lora_rank, call.q.shape[2], call.row)
    if widths != (512, 576, 576):
        return (
            "it is for kv_lora_rank 512 and 576 columns in q and in the cache, not "
            f"{widths[0]}, {widths[1]} and {widths[2]}"
        )
    if call.k_cache.shape[1] != 64:
        return f"it is for pages of 64 tokens, not {call.k_cache.shape[1]}"
    if call.cu_seqlens_q is not None:
        return "it is for the same number of queries in every sequence"
    if call.sliding_window or call.soft_cap:
        return "it has no sliding window and no soft cap"
    return ""


def _why_not_sparse(call: SparseCall) -> str:
    heads, width = call.q.shape[1:]
    name = call.selections[0].cache_format.name
    if name not in SPARSE_FORMATS:
        return f"its sparse attention is for {' and '.join(SPARSE_FORMATS)} caches, not {name}"
    if call.q.dtype != torch.bfloat16:
        return f"its sparse attention is for bfloat16, not {call.q.dtype}"
    if (call.kv_lora_rank, width) != (512, SPARSE_FORMATS[name]):
        return f"it is for kv_lora_rank 512 and q {SPARSE_FORMATS[name]} wide with this cache"
    if heads not in SPARSE_HEADS:
        return f"its sparse attention is for 64 and 128 heads, not {heads}"
    taken = inspect.signature(_installed().flash_mla_with_kvcache).parameters
    needed = ("indices", "extra_k_cache")[: len(call.selections)]
    if missing := [argument for argument in needed if argument not in taken]:
        return f"the flash_mla that is installed is too old: it knows no {missing[0]}"
    return ""


def decode(call: DenseCall) -> tuple[Tensor, Tensor]:
    """``flash_mla_with_kvcache`` of a call that ``why_not`` has nothing against.

    Returns:
        out ``[N, H, 512]`` in q's dtype and lse float32 ``[N, H]``.
    """
    flash_mla, batch, queries = _installed(), call.batch_size, call.max_seqlen_q
    heads, kv_heads = call.q.shape[1], call.k_cache.shape[2]
    schedule = _schedule(
        flash_mla.get_mla_metadata, call.cache_seqlens, queries * heads // kv_heads, kv_heads
    )
    out, lse = flash_mla.flash_mla_with_kvcache(
        call.q.unflatten(0, (batch, queries)), call.k_cache, call.block_table, call.cache_seqlens,
        call.kv_lora_rank, *schedule, softmax_scale=call.softmax_scale, causal=call.causal,
    )  # fmt: skip
    return out.flatten(0, 1), lse.mT.flatten(0, 1)


def decode_selected(call: SparseCall) -> tuple[Tensor, Tensor, Tensor]:
    """The same with ``indices``; every query is a sequence of its own.

    Returns:
        out ``[N, H, 512]`` in q's dtype, lse and the largest score float32 ``[N, H]``. The last is
        NaN: FlashMLA does not say.
    """
    flash_mla, (rows, heads) = _installed(), call.q.shape[:2]
    indices = [_indices(each) for each in call.selections]
    lengths = indices[0].new_full((rows,), indices[0].shape[2])
    new = _takes_anything(flash_mla.get_mla_metadata)
    schedule = _schedule(
        flash_mla.get_mla_metadata, lengths, heads, 1, heads, True, indices[0].shape[2]
    )
    extra: dict[str, Any] = {}
    if len(indices) > 1:
        extra["extra_k_cache"] = call.selections[1].pages
        extra["extra_indices_in_kvcache"] = indices[1]
    out, lse = flash_mla.flash_mla_with_kvcache(
        call.q.unsqueeze(1), call.selections[0].pages, None if new else lengths.view(rows, 1),
        None if new else lengths, call.kv_lora_rank, *schedule, softmax_scale=call.softmax_scale,
        is_fp8_kvcache=True, indices=indices[0], **extra,
    )  # fmt: skip
    lse = lse.mT.flatten(0, 1)
    return out.flatten(0, 1), lse, torch.full_like(lse, torch.nan)


def _indices(selected: Selection) -> Tensor:
    """Slots as FlashMLA takes them, int32 ``[N, 1, topk]``: what does not count is -1."""
    slots = selected.slots
    counts = torch.arange(slots.shape[1], device=slots.device) < selected.counts[:, None]
    inside = (slots >= 0) & (slots < selected.room)
    slots = slots.masked_fill(~(counts & inside), -1).int()
    missing = -slots.shape[1] % TOPK_MULTIPLE
    return torch.nn.functional.pad(slots, (0, missing), value=-1).unsqueeze(1)


def _installed() -> Any:
    return import_module("flash_mla")


def _takes_anything(function: Callable) -> bool:
    """Whether ``get_mla_metadata`` is of 2026, which ignores its arguments."""
    kinds = {each.kind for each in inspect.signature(function).parameters.values()}
    return inspect.Parameter.VAR_POSITIONAL in kinds


def _schedule(function: Callable, *arguments: Any) -> tuple[Any, Any]:
    """The metadata and the splits: two tensors in 2025, an object and None since."""
    metadata, splits = function() if _takes_anything(function) else function(*arguments)
    return metadata, splits
