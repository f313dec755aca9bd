"""The Hopper path: DeepSeek's shape, 512 + 64 in pages of 64 tokens, on the tensor cores of sm_90.

Three launches, which overlap where one may start before another ends: ``plan`` shares out the work
on the device, ``seesaw`` or ``swapped`` attends, ``combine`` joins sequences that were cut. Nothing
waits for the device or reads a length on the host, so a CUDA graph captures a call. Imported when
it is chosen, because it imports Triton.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mlakit.ops.call import DenseCall, SparseCall
from mlakit.ops.gluon_plan import STEP, combine, plan
from mlakit.ops.gluon_seesaw import seesaw
from mlakit.ops.gluon_swapped import swapped

RANK, ROPE, PAGE = 512, 64, 64
WIDTH = RANK + ROPE

SWAPPED_ROWS = 32
"""The most query rows of a kv head that the swapped kernel is for."""

FIXED_STEPS = 16
"""Steps of every item of a batch-invariant call: 2048 tokens."""

PLAN_BLOCK, COMBINE_ITEMS = 64, 16

LAUNCH: dict[str, Any] = {"launch_pdl": True, "enable_fp_fusion": True}
"""Options: start before the launch before has ended; multiply and add in one (3.10 asks for it)."""

TILE = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
"""How the tensor cores want 64 columns of 16 bits in shared memory."""


class Plan(NamedTuple):
    """How a call's work is shared out; depends on its lengths and shapes only.

    A decoding step's layers may share one.

    Attributes:
        first: int32 ``[B + 1]``, the items of each sequence.
        items: int32 ``[items, 4]``, see ``gluon_plan.plan``; as many as there can be.
        part_items: int32 ``[parts + 1]``, the items of each part.
    """

    first: Tensor
    items: Tensor
    part_items: Tensor


def why_not(call: DenseCall | SparseCall) -> str:
    """Why this path cannot run a call; empty if it can."""
    if isinstance(call, SparseCall):
        return "it has no sparse attention"
    q, cache = call.q, call.k_cache
    widths = (call.kv_lora_rank, q.shape[2], call.row)
    if call.cache_format is not None:
        return "it is for caches that are not quantised"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it is for bfloat16 and float16, not {q.dtype}"
    if widths != (RANK, WIDTH, WIDTH):
        return (
            f"it is for kv_lora_rank {RANK} and {WIDTH} columns in q and in the cache, not "
            f"{widths[0]}, {widths[1]} and {widths[2]}"
        )
    if cache.shape[1] != PAGE:
        return f"it is for pages of {PAGE} tokens, not {cache.shape[1]}"
    if call.cu_seqlens_q is not None:
        return "it is for the same number of queries in every sequence"
    if call.sliding_window or call.soft_cap:
        return "it has no sliding window and no soft cap"
    if reason := _why_not_memory(cache):
        return reason
    if q.device.type != "cuda" or torch.version.hip:
        return "it is for GPUs of compute capability 9.0"
    major, minor = torch.cuda.get_device_capability(q.device)
    if (major, minor) != (9, 0):
        return f"it is for GPUs of compute capability 9.0, not {major}.{minor}"
    return ""


def _why_not_memory(cache: Tensor) -> str:
    """Why the tensor memory accelerator cannot fetch a cache's pages; empty if it can.

    To it the cache is a table of rows one token stride apart, in which pages start every so many
    rows and kv heads every so many columns.
    """
    page, token, head = cache.stride()[:3]
    if cache.data_ptr() % 16 or token % 8 or (cache.shape[2] > 1 and head % 8):
        return "the cache's rows do not start at multiples of 16 bytes"
    if token < WIDTH + (cache.shape[2] - 1) * head:
        return "a token's kv heads are not beside one another"
    if cache.shape[0] > 1 and page % token:
        return f"the cache's pages start every {page} numbers, no multiple of a row's {token}"
    return ""


def decode(call: DenseCall) -> tuple[Tensor, Tensor]:
    """Attend as ``mla_decode`` says, summed in float32.

    A length above what the table has room for counts as all of it.

    Args:
        call: one that ``why_not`` has nothing against.

    Returns:
        out ``[N, H, 512]`` in q's dtype and lse float32 ``[N, H]``.
    """
    out = call.q.new_empty(*call.q.shape[:2], RANK)
    lse = call.q.new_empty(call.q.shape[:2], dtype=torch.float32)
    if not call.k_cache.shape[0] or not call.capacity:
        return out.zero_(), lse.fill_(math.inf)
    if out.numel():
        attend(call, make_plan(call), out, lse)
    return out, lse


def make_plan(call: DenseCall) -> Plan:
    """Share out a call's work, on the device."""
    batch = call.batch_size
    group = call.q.shape[1] // call.k_cache.shape[2]
    tiles = math.ceil(call.max_seqlen_q * group / _rows(call)) * call.k_cache.shape[2]
    parts = max(1, _processors(call.q.device) // tiles)
    steps = math.ceil(call.capacity / STEP.value)
    fixed = FIXED_STEPS if call.batch_invariant else 0
    items = batch * math.ceil(steps / fixed) if fixed else min(batch + parts, batch * steps)
    numbers = call.cache_seqlens.new_empty
    made = Plan(numbers(batch + 1), numbers(items, 4), numbers(parts + 1))
    with torch.cuda.device_of(call.q):
        plan[(1,)](
            call.cache_seqlens, *made, batch, call.capacity, parts, call.cache_seqlens.stride(0),
            FIXED=fixed, BLOCK=PLAN_BLOCK, PARTS=triton.next_power_of_2(parts + 1), num_warps=8,
            enable_fp_fusion=True,
        )  # fmt: skip
    return made


def attend(call: DenseCall, made: Plan, out: Tensor, lse: Tensor) -> None:
    """Compute ``out`` and ``lse`` by a plan for the call's lengths and shapes."""
    queries, (heads, kv_heads) = call.max_seqlen_q, (call.q.shape[1], call.k_cache.shape[2])
    group, rows = heads // kv_heads, _rows(call)
    parts, items = len(made.part_items) - 1, len(made.items)
    partial_out = out.new_empty(items, queries * heads, RANK, dtype=torch.float32)
    partial_lse = lse.new_empty(items, queries * heads)
    cache, page_rows = _cache_rows(call.k_cache)
    q = _query_rows(call)
    arguments = [
        _boxes(cache, PAGE, PAGE * 4), _boxes(cache, PAGE, ROPE), _boxes(q, rows, PAGE * 4),
        _boxes(q, rows, ROPE), call.block_table, call.cache_seqlens, made.part_items, made.items,
        out, lse, partial_out, partial_lse, call.softmax_scale / math.log(2.0), queries, group,
        call.capacity, page_rows, call.k_cache.stride(2), *call.block_table.stride(),
        call.cache_seqlens.stride(0),
    ]  # fmt: skip
    grid = (math.ceil(queries * group / rows), kv_heads, parts)
    causal = call.causal and queries > 1
    each = math.ceil(call.batch_size * queries * heads / (16 * _processors(call.q.device)))
    with torch.cuda.device_of(call.q):
        if rows > SWAPPED_ROWS:
            seesaw[grid](*arguments, CAUSAL=causal, num_warps=4, **LAUNCH)
        else:
            swapped[grid](*arguments, CAUSAL=causal, ROWS=rows, num_warps=8, **LAUNCH)
        combine[(math.ceil(queries * heads / each), call.batch_size)](
            out, lse, partial_out, partial_lse, made.first, queries, group, heads, each,
            RANK=RANK, ITEMS=COMBINE_ITEMS, **LAUNCH,
        )  # fmt: skip


def _rows(call: DenseCall) -> int:
    """Query rows of a tile: 16 and 32 are the swapped kernel's."""
    rows = call.max_seqlen_q * call.q.shape[1] // call.k_cache.shape[2]
    return 16 if rows <= 16 else 32 if rows <= SWAPPED_ROWS else 64


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _cache_rows(cache: Tensor) -> tuple[Tensor, int]:
    """The cache as ``[rows, columns]``, and the rows from one page to the next."""
    blocks, (page, token, head) = cache.shape[0], cache.stride()[:3]
    page_rows = page // token if blocks > 1 else PAGE
    columns = WIDTH + (cache.shape[2] - 1) * head
    shape = ((blocks - 1) * page_rows + PAGE, columns)
    return cache.detach().as_strided(shape, (token, 1)), page_rows


def _query_rows(call: DenseCall) -> Tensor:
    """The queries as rows ``[B * G * S * H / G, 576]``, those of a kv head together."""
    q, kv_heads = call.q.detach(), call.k_cache.shape[2]
    if kv_heads > 1 and call.max_seqlen_q > 1:
        q = q.unflatten(0, (-1, call.max_seqlen_q)).unflatten(2, (kv_heads, -1))
        q = q.transpose(1, 2).flatten(0, 2)
    even = q.stride(0) == q.shape[1] * q.stride(1) and q.stride(1) >= WIDTH
    if not even or q.stride(1) % 8 or q.data_ptr() % 16:
        q = q.clone(memory_format=torch.contiguous_format)
    return q.flatten(0, 1)


def _boxes(rows: Tensor, height: int, width: int) -> TensorDescriptor:
    """What the tensor memory accelerator needs to fetch boxes of a matrix."""
    return TensorDescriptor.from_tensor(rows, [height, width], TILE)
