"""The tensors of one correctness case, how to run it, and how to judge what came out.

Every case is poisoned: cache rows that no sequence uses are NaN, table entries past a sequence's
last page name pages that do not exist.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlakit.benching.problem import GARBAGE, Shape, make_problem
from mlakit.benching.truth import (
    PREFILL,
    SPARSE,
    Judgement,
    Tolerance,
    dense_truth,
    differs,
    judge,
    selected_truth,
    tolerance_of,
)
from mlakit.ops import CacheFormat, flash_mla_sparse_fwd, mla_decode, mla_sparse_decode
from mlakit.ops.cache_format import plain_format

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Trial:
    """One call and what it should give.

    Attributes:
        run: the call; three runs must agree bit for bit.
        judge: its outputs against the truth.
    """

    run: Callable[[], Outputs]
    judge: Callable[[Outputs], Judgement]


def lengths_of(batch: int, length: int, queries: int, varlen: bool, seed: int = 0) -> list[int]:
    """As FlashMLA's tests draw them: fixed, or N(length, length / 2) and at least S."""
    draw = random.Random(seed)
    if not varlen:
        return [length] * batch
    return [max(queries, round(draw.gauss(length, length / 2))) for _ in range(batch)]


def dense_tensors(
    lengths: Sequence[int],
    queries: int,
    heads: int,
    *,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    kv_heads: int = 1,
    row: int = 576,
    width: int = 576,
    page_size: int = 64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q ``[B, S, H, W]``, pages ``[blocks, P, G, row]``, block table and lengths, poisoned."""
    used = [math.ceil(length / page_size) for length in lengths]
    blocks = max(1, sum(used)) + 1  # one page that belongs to nobody
    table = torch.full((len(lengths), max(1, *used)), GARBAGE, dtype=torch.int32)
    order = torch.randperm(blocks, dtype=torch.int32)
    valid = torch.zeros(blocks * page_size, dtype=torch.bool)
    place = 0
    for b, (count, length) in enumerate(zip(used, lengths)):
        table[b, :count] = order[place : place + count]
        slots = (table[b, :count].long()[:, None] * page_size + torch.arange(page_size)).flatten()
        valid[slots[:length]] = True
        place += count
    pages = torch.randn(blocks, page_size, kv_heads, row, device=device, dtype=dtype)
    pages = pages.div_(10).clamp_(-1, 1)
    pages.view(blocks * page_size, -1)[~valid.to(device)] = math.nan
    q = torch.randn(len(lengths), queries, heads, width, device=device, dtype=dtype)
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
    return q.div_(10).clamp_(-1, 1), pages, table.to(device), seqlens


def dense_trial(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    rank: int,
    causal: bool,
    allowed: Tolerance | None = None,
    **options: Any,
) -> Trial:
    """``mla_decode``, with ``options`` that the truth understands too."""
    scale = tensors[0].shape[-1] ** -0.5

    def run() -> Outputs:
        return mla_decode(*tensors, rank, softmax_scale=scale, causal=causal, **options)

    def check(outputs: Outputs) -> Judgement:
        true = dense_truth(*tensors, rank, softmax_scale=scale, causal=causal, **options)
        limit = allowed or tolerance_of(tensors[0].dtype)
        return judge(outputs[0], true[0], outputs[1], true[1], limit)

    return Trial(run, check)


def packed_trial(device: str) -> Trial:
    """Sequences with different numbers of new tokens, packed; the truth takes them one by one."""
    counts, lengths, heads = [1, 4, 2, 3], [70, 300, 2, 1025], 16
    q, pages, table, seqlens = dense_tensors(lengths, 4, heads, device=device)
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32, device=device)
    packed = torch.cat([q[b, :count] for b, count in enumerate(counts)])
    scale = q.shape[-1] ** -0.5

    def run() -> Outputs:
        return mla_decode(
            packed, pages, table, seqlens, 512, softmax_scale=scale, causal=True,
            cu_seqlens_q=starts, max_seqlen_q=4,
        )  # fmt: skip

    def check(outputs: Outputs) -> Judgement:
        found = [
            dense_truth(
                q[b : b + 1, :count], pages, table[b : b + 1], seqlens[b : b + 1], 512,
                softmax_scale=scale, causal=True,
            )
            for b, count in enumerate(counts)
        ]  # fmt: skip
        out = torch.cat([out[0] for out, _ in found])
        lse = torch.cat([lse[0] for _, lse in found], 1)
        return judge(outputs[0], out, outputs[1], lse, tolerance_of(q.dtype))

    return Trial(run, check)


def alone_trial(device: str) -> Trial:
    """With ``batch_invariant`` a sequence alone gives the bits it gives among neighbours."""
    q, pages, table, seqlens = dense_tensors([4097, 33, 900, 0, 2048], 2, 16, device=device)
    options = {"softmax_scale": 0.04, "causal": True, "batch_invariant": True}

    def run() -> Outputs:
        return mla_decode(q, pages, table, seqlens, 512, **options)

    def check(outputs: Outputs) -> Judgement:
        for b in range(len(q)):
            one = slice(b, b + 1)
            out, lse = mla_decode(q[one], pages, table[one], seqlens[one], 512, **options)
            if not (torch.equal(out, outputs[0][one]) and torch.equal(lse, outputs[1][one])):
                return Judgement(f"sequence {b} alone differs from itself in the batch", 0.0)
        return Judgement("", 0.0)

    return Trial(run, check)


def quantised_trial(
    kind: str, batch: int, queries: int, length: int, heads: int, varlen: bool, device: str
) -> Trial:
    """Dense decode of quantised pages against float64 of what they hold."""
    rank = 448 if kind == "model1" else 512
    shape = Shape(heads, length, batch, queries, varlen, kv_lora_rank=rank, cache_format=kind)
    p = make_problem(shape, torch.device(device), poison=True)
    tensors = (p.q, p.pages, p.block_table, p.cache_seqlens)
    # MODEL1's value includes its rope part.
    value = shape.row if kind == "model1" else rank
    return dense_trial(tensors, value, queries > 1, SPARSE, cache_format=p.cache_format)


def _cache(fmt: CacheFormat, tokens: int, page_size: int, device: str) -> tuple[Tensor, int]:
    """Pages that hold ``tokens`` tokens, the rest of the last page poisoned."""
    blocks = math.ceil(tokens / page_size)
    pages = fmt.allocate(blocks, page_size, device)
    plain = pages.dtype.is_floating_point
    pages.fill_(math.nan if plain else 255)
    for start in range(0, tokens, 2**18):
        slots = torch.arange(start, min(tokens, start + 2**18), device=device)
        rows = torch.randn(len(slots), fmt.width, device=device) / 10
        fmt.append(pages, slots, rows.clamp_(-1, 1))
    return pages, tokens


def _selection(batch: int, queries: int, topk: int, tokens: int, room: int, device: str) -> Tensor:
    """Random rows ``[B, S, topk]``, one in ten missing: -1, or outside of the cache."""
    indices = torch.randint(0, tokens, (batch, queries, topk), device=device)
    fate = torch.rand(batch, queries, topk, device=device)
    return indices.masked_fill(fate < 0.05, -1).masked_fill(fate > 0.95, room + 7).int()


def sparse_trial(
    kind: str,
    heads: int,
    sizes: tuple[int, int, int],
    batch: int,
    queries: int,
    features: Sequence[str],
    device: str,
) -> Trial:
    """``mla_sparse_decode``: any cache format, ``topk_length``, ``attn_sink``, an extra cache."""
    length, topk, page_size = sizes
    fmt = CacheFormat(kind, 448 if kind == "model1" else 512, 64)
    rank = fmt.width if kind == "model1" else fmt.kv_lora_rank
    pages, tokens = _cache(fmt, length * batch, page_size, device)
    room = pages.shape[0] * page_size
    q = torch.randn(batch, queries, heads, fmt.width, device=device, dtype=torch.bfloat16)
    q = q.div_(10).clamp_(-1, 1)
    indices = _selection(batch, queries, topk, tokens, room, device)
    options: dict[str, Any] = {}
    caches: list[tuple[Tensor, CacheFormat, Tensor, Tensor | None]] = [(pages, fmt, indices, None)]
    if "topk_length" in features:
        counts = torch.randint(0, topk + 1, (batch,), device=device, dtype=torch.int32)
        options["topk_length"] = counts
        caches[0] = (pages, fmt, indices, counts)
    if "sink" in features:
        sink = torch.randn(heads, device=device)
        sink[0], sink[-1] = math.inf, -math.inf
        options["attn_sink"] = sink
    if "extra" in features:
        extra, more = _cache(fmt, 3 * page_size + 1, page_size, device)
        chosen = _selection(batch, queries, 64, more, extra.shape[0] * page_size, device)
        options |= {"extra_k_cache": extra, "extra_indices": chosen}
        caches.append((extra, fmt, chosen, None))
    quantised = None if pages.dtype.is_floating_point else fmt

    def run() -> Outputs:
        return mla_sparse_decode(
            q, pages, indices, rank, softmax_scale=0.05, cache_format=quantised, **options
        )

    def check(outputs: Outputs) -> Judgement:
        true = selected_truth(
            q, caches, rank, softmax_scale=0.05, attn_sink=options.get("attn_sink")
        )
        return _with_top(outputs, true, SPARSE)

    return Trial(run, check)


def prefill_trial(
    heads: int, queries: int, tokens: int, topk: int, features: Sequence[str], device: str
) -> Trial:
    """``flash_mla_sparse_fwd``."""
    q = torch.randn(queries, heads, 576, device=device, dtype=torch.bfloat16)
    q = q.div_(10).clamp_(-1, 1)
    kv = torch.randn(tokens, 1, 576, device=device, dtype=torch.bfloat16).div_(10).clamp_(-1, 1)
    indices = _selection(1, queries, topk, tokens, tokens, device)[0][:, None]
    options: dict[str, Tensor] = {}
    if "topk_length" in features:
        options["topk_length"] = torch.randint(
            0, topk + 1, (queries,), device=device, dtype=torch.int32
        )
    if "sink" in features:
        options["attn_sink"] = torch.randn(heads, device=device)

    def run() -> Outputs:
        out, top, lse = flash_mla_sparse_fwd(q, kv, indices, 0.05, 512, **options)
        return out, lse, top

    def check(outputs: Outputs) -> Judgement:
        pages = kv[None]
        counts = options.get("topk_length")
        cache = (pages, plain_format(pages, 512), indices[None, :, 0],
                 None if counts is None else counts[None])  # fmt: skip
        out, lse, top = selected_truth(
            q[None], [cache], 512, softmax_scale=0.05, attn_sink=options.get("attn_sink")
        )
        return _with_top(outputs, (out[0], lse[0].T, top[0].T), PREFILL)

    return Trial(run, check)


def _with_top(outputs: Outputs, true: Outputs, allowed: Tolerance) -> Judgement:
    found = judge(outputs[0], true[0], outputs[1], true[1], allowed)
    reason = differs(outputs[2], true[2], allowed.lse, allowed.lse_relative)
    wrong = "; ".join([part for part in (found.wrong, reason and f"max_logits {reason}") if part])
    return Judgement(wrong, found.largest_error)


def graph_trial(device: str) -> Trial:
    """A captured CUDA graph, replayed with other lengths, gives what the eager call gives."""
    lengths = [4096, 1, 700, 64, 0, 2000]
    q, pages, table, seqlens = dense_tensors([4096] * 6, 2, 16, device=device)
    options = {"softmax_scale": 0.04, "causal": True}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        mla_decode(q, pages, table, seqlens, 512, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = mla_decode(q, pages, table, seqlens, 512, **options)
    seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))

    def run() -> Outputs:
        graph.replay()
        torch.cuda.synchronize()
        return tuple(tensor.clone() for tensor in captured)

    def check(outputs: Outputs) -> Judgement:
        eager = mla_decode(q, pages, table, seqlens, 512, **options)
        same = all(torch.equal(a, b) for a, b in zip(outputs, eager))
        return Judgement("" if same else "a replayed graph differs from the eager call", 0.0)

    return Trial(run, check)


def compile_trial(device: str) -> Trial:
    """``torch.compile(fullgraph=True)`` passes through; on the CPU without its C++ compiler."""
    tensors = dense_tensors([300, 5, 64], 1, 16, device=device)

    def attend(*inputs: Tensor) -> Outputs:
        out, lse = mla_decode(*inputs, 512, softmax_scale=0.04, causal=True)
        return out * 2, lse

    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(attend, fullgraph=True, backend=backend)

    def run() -> Outputs:
        return compiled(*tensors)

    def check(outputs: Outputs) -> Judgement:
        same = all(torch.equal(a, b) for a, b in zip(outputs, attend(*tensors)))
        return Judgement("" if same else "compiled and eager calls differ", 0.0)

    return Trial(run, check)
