"""What is timed side by side: our implementations, and other people's where they are installed.

A contender takes a problem and returns a function that computes it, with everything prepared that
a serving engine prepares once per step or once per model; or it raises ``Absent`` with the reason
why it cannot. None of them ever stands for another: a figure is one of the named kernel or none.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mlakit.benching.problem import Problem
from mlakit.ops import mla_decode
from mlakit.ops.call import dense_call
from mlakit.ops.choose import why_not

Run = Callable[[], tuple[Tensor, Tensor | None]]
"""Computes ``out [B, S, H, C]`` and, where the kernel gives one, ``lse [B, H, S]``."""

Contender = Callable[[Problem], Run]

OVERRIDE = "MLAKIT_KERNEL"
FLASHINFER_WORKSPACE = 128 * 2**20
TRITON_MLA_SPLITS = 4


class Absent(Exception):
    """Why a contender does not take part."""


@contextmanager
def only(name: str) -> Iterator[None]:
    """``mla_decode`` runs this implementation, or refuses."""
    before = os.environ.get(OVERRIDE)
    os.environ[OVERRIDE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[OVERRIDE]
        else:
            os.environ[OVERRIDE] = before


def ours(name: str) -> Contender:
    """One of our implementations, through the public operator."""

    def prepare(problem: Problem) -> Run:
        inputs = (problem.q, problem.pages, problem.block_table, problem.cache_seqlens)
        rank = problem.shape.kv_lora_rank
        options: dict[str, Any] = {
            "softmax_scale": problem.softmax_scale,
            "causal": problem.causal,
            "cache_format": problem.cache_format,
        }
        try:
            reason = why_not(name, dense_call(*inputs, rank, **options))
        except ImportError as error:
            reason = str(error)
        if reason:
            raise Absent(reason)

        def run() -> tuple[Tensor, Tensor]:
            with only(name):
                return mla_decode(*inputs, rank, **options)

        return run

    return prepare


def sdpa(problem: Problem) -> Run:
    """torch's own attention in MQA form: all query heads as rows over one contiguous key.

    The pages are gathered beforehand, which is to its advantage.
    """
    shape = problem.shape
    if problem.cache_format:
        raise Absent("torch's attention reads no quantised cache")
    longest = max(shape.lengths)
    pages = math.ceil(longest / shape.page_size)
    rows = problem.pages[problem.block_table[:, :pages].long()].flatten(1, 3)
    key = rows.view(shape.batch, 1, -1, shape.row)[:, :, :longest]
    query = problem.q.reshape(shape.batch, 1, -1, shape.width)
    mask = None
    if problem.causal or shape.varlen:
        position = torch.arange(longest, device=key.device)
        behind = torch.arange(shape.queries - 1, -1, -1, device=key.device)
        end = problem.cache_seqlens[:, None] - behind  # [B, S]
        mask = (position < end[:, :, None])[:, None].repeat_interleave(shape.heads, 2)

    def run() -> tuple[Tensor, None]:
        out = torch.nn.functional.scaled_dot_product_attention(
            query,
            key[..., shape.row - shape.width :],
            key[..., : shape.kv_lora_rank],
            attn_mask=mask,
            scale=problem.softmax_scale,
        )
        return out.view(shape.batch, shape.queries, shape.heads, -1), None

    return run


def flash_mla(problem: Problem) -> Run:
    """DeepSeek's FlashMLA, dense; its schedule is made beforehand, as its own benchmark does."""
    module = _import("flash_mla")
    _require(problem, pages=64, ranks={(512, 64)}, dtypes=("bfloat16", "float16"))
    shape = problem.shape
    # The newer interface ignores the arguments and returns an object that the first call fills.
    schedule, splits = module.get_mla_metadata(
        problem.cache_seqlens, shape.queries * shape.heads, 1
    )

    def run() -> tuple[Tensor, Tensor]:
        return module.flash_mla_with_kvcache(
            problem.q,
            problem.pages,
            problem.block_table,
            problem.cache_seqlens,
            shape.kv_lora_rank,
            schedule,
            splits,
            softmax_scale=problem.softmax_scale,
            causal=problem.causal,
        )

    return run


def flashinfer(problem: Problem) -> Run:
    """FlashInfer's paged MLA wrapper; planned beforehand, as its interface asks."""
    module = _import("flashinfer.mla")
    _require(problem, ranks={(512, 64)}, dtypes=("bfloat16", "float16"))
    shape, device = problem.shape, problem.q.device
    workspace = torch.empty(FLASHINFER_WORKSPACE, dtype=torch.int8, device=device)
    wrapper = module.BatchMLAPagedAttentionWrapper(workspace, backend="auto")
    used = (problem.cache_seqlens + shape.page_size - 1) // shape.page_size
    starts = torch.nn.functional.pad(used.cumsum(0), (1, 0)).int()
    column = torch.arange(problem.block_table.shape[1], device=device)
    pages = problem.block_table[column < used[:, None]]
    queries = torch.arange(shape.batch + 1, device=device, dtype=torch.int32) * shape.queries
    wrapper.plan(
        queries, starts, pages, problem.cache_seqlens, shape.heads, shape.kv_lora_rank,
        shape.qk_rope_head_dim, shape.page_size, problem.causal, problem.softmax_scale,
        problem.q.dtype, problem.pages.dtype,
    )  # fmt: skip
    rank = shape.kv_lora_rank
    flat = problem.q.flatten(0, 1)
    nope, rope = flat[..., :rank].contiguous(), flat[..., rank:].contiguous()
    latent, turned = (problem.pages[:, :, 0, :rank], problem.pages[:, :, 0, rank:])

    def run() -> tuple[Tensor, Tensor]:
        out, lse = wrapper.run(nope, rope, latent, turned, return_lse=True)
        lse = lse.view(shape.batch, shape.queries, shape.heads).transpose(1, 2)
        return out.view(shape.batch, shape.queries, shape.heads, rank), lse * math.log(2.0)

    return run


def vllm_triton(problem: Problem) -> Run:
    """vLLM's Triton MLA: one row per token, so several queries become so many requests."""
    try:
        module = _import("vllm.v1.attention.ops.triton_decode_attention")
    except Absent:
        module = _import("vllm.attention.ops.triton_decode_attention")
    _require(problem, dtypes=("bfloat16", "float16"))
    shape = problem.shape
    if shape.rope_scores:
        raise Absent("its scores are over the whole row")
    behind = torch.arange(shape.queries - 1, -1, -1, device=problem.q.device)
    lengths = (problem.cache_seqlens[:, None] - behind).flatten().int()
    table = problem.block_table.repeat_interleave(shape.queries, 0)
    q = problem.q.flatten(0, 1)
    out = q.new_empty(*q.shape[:2], shape.kv_lora_rank)
    lse = q.new_empty(q.shape[:2])
    partial = q.new_empty(
        *q.shape[:2], TRITON_MLA_SPLITS, shape.kv_lora_rank + 1, dtype=torch.float32
    )
    values = problem.pages[..., : shape.kv_lora_rank]

    def run() -> tuple[Tensor, None]:
        module.decode_attention_fwd(
            q, problem.pages, values, out, lse, table, lengths, partial, TRITON_MLA_SPLITS,
            problem.softmax_scale, shape.page_size,
        )  # fmt: skip
        return out.view(shape.batch, shape.queries, shape.heads, -1), None

    return run


def tilelang(problem: Problem) -> Run:
    """TileLang's paged MLA, an example of its repository: ``examples/deepseek_mla`` on the path."""
    _import("tilelang")
    module = _import("example_mla_decode_paged", "its example is not on PYTHONPATH")
    _require(problem, ranks={(512, 64)}, dtypes=("float16",))
    shape = problem.shape
    if shape.queries > 1:
        raise Absent("it takes one query per sequence")
    rank, padded = shape.kv_lora_rank, problem.block_table.shape[1] * shape.page_size
    if problem.pages.shape[0] * shape.page_size != shape.batch * padded:
        raise Absent("it wants as many pages for every sequence")
    rows = min(64, shape.heads)
    kernel = module.mla_decode_tilelang(
        shape.batch, shape.heads, 1, padded, rank, shape.qk_rope_head_dim, 64, rows, 1,
        shape.page_size, problem.softmax_scale,
    )  # fmt: skip
    q, rows_of = problem.q[:, 0], problem.pages.view(-1, 1, shape.row)
    inputs = [part.contiguous() for x in (q, rows_of) for part in (x[..., :rank], x[..., rank:])]
    lse = q.new_empty(shape.batch, shape.heads, 1)
    partial = q.new_empty(shape.batch, shape.heads, 1, rank)

    def run() -> tuple[Tensor, None]:
        out = kernel(*inputs, problem.block_table, problem.cache_seqlens, lse, partial)
        return out.view(shape.batch, 1, shape.heads, rank), None

    return run


RIVALS: dict[str, Contender] = {
    "FlashMLA": flash_mla,
    "FlashInfer": flashinfer,
    "vLLM Triton": vllm_triton,
    "TileLang": tilelang,
    "torch SDPA": sdpa,
}


def _import(name: str, absence: str = "") -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = absence or f"{name.partition('.')[0]} is not installed"
        if error.name and not name.startswith(error.name):
            missing = f"{name} needs {error.name}, which is not installed"
        raise Absent(missing) from error
    except Exception as error:  # other people's packages fail to import in their own ways
        raise Absent(f"importing {name} failed: {type(error).__name__}: {error}") from error


def _require(
    problem: Problem,
    *,
    pages: int | None = None,
    ranks: set[tuple[int, int]] | None = None,
    dtypes: tuple[str, ...],
) -> None:
    """What rivals on GPUs have in common, with the words for what does not fit."""
    shape = problem.shape
    if problem.q.device.type != "cuda":
        raise Absent("it runs on CUDA only")
    if problem.cache_format:
        raise Absent(f"it does not read our {shape.cache_format} pages")
    if shape.dtype not in dtypes:
        raise Absent(f"it takes {' and '.join(dtypes)}, not {shape.dtype}")
    if pages is not None and shape.page_size != pages:
        raise Absent(f"it takes pages of {pages} tokens")
    if shape.rope_scores or (
        ranks is not None and (shape.kv_lora_rank, shape.qk_rope_head_dim) not in ranks
    ):
        raise Absent(f"it does not take {shape.kv_lora_rank} + {shape.qk_rope_head_dim} columns")
