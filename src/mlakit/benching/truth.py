"""What the answer is: float64 on any device, fast enough for shapes that are measured.

``ops.reference`` is the readable loop; this is the same attention with one matrix product per
sequence, and the judgement of a result against it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlakit.benching.problem import Problem
from mlakit.ops import CacheFormat

GATHERED_NUMBERS = 2**27
"""float64 numbers gathered at a time for selected rows: 1 GiB."""


@dataclass(frozen=True)
class Tolerance:
    """How far off a result may be; the numbers are those of FlashMLA's tests.

    Attributes:
        out: largest absolute error of an output ...
        out_relative: ... or relative error, whichever allows more.
        cosine: largest ``1 - 2 <x, y> / (<x, x> + <y, y>)`` over all outputs.
        lse: largest absolute error of lse ...
        lse_relative: ... or relative error.
    """

    out: float
    out_relative: float
    cosine: float
    lse: float
    lse_relative: float


DENSE = Tolerance(8e-4, 2.01 / 128, 5e-6, 1e-6, 8.01 / 65536)
SPARSE = Tolerance(1e-3, 2.01 / 128, 5e-6, 1e-6, 8.01 / 65536)
PREFILL = Tolerance(8e-4, 3.01 / 128, 7e-6, 1e-6, 2.01 / 65536)
FULL = Tolerance(1e-5, 1e-4, 1e-9, 1e-5, 1e-5)
"""For float32: sums of some thousand products round off by 2^-24 each."""


def tolerance_of(dtype: torch.dtype) -> Tolerance:
    """What dense decode is held to."""
    return FULL if dtype == torch.float32 else DENSE


@dataclass(frozen=True)
class Judgement:
    """A result against the truth.

    Attributes:
        wrong: what is wrong with it; empty if it is right.
        largest_error: of an output, absolute.
    """

    wrong: str
    largest_error: float


def judge(
    out: Tensor, true_out: Tensor, lse: Tensor | None, true_lse: Tensor, allowed: Tolerance
) -> Judgement:
    """Compares a result with the truth; ``lse`` may be None for kernels that return none."""
    wrong = []
    x, y = out.double(), true_out.double()
    if x.shape != y.shape:
        return Judgement(f"out has shape {list(x.shape)} instead of {list(y.shape)}", math.inf)
    error = (x - y).abs()
    largest = error.max().item() if error.numel() else 0.0
    if not bool(x.isfinite().all()):
        wrong.append("out is not finite")
    elif not bool(((error < allowed.out) | (error < allowed.out_relative * y.abs())).all()):
        wrong.append(f"out is off by up to {largest:.2g}")
    elif (norm := ((x * x).sum() + (y * y).sum()).item()) > 0:
        cosine = 1 - 2 * (x * y).sum().item() / norm
        if cosine > allowed.cosine:
            wrong.append(f"out has a cosine difference of {cosine:.2g}")
    if lse is not None:
        reason = differs(lse, true_lse, allowed.lse, allowed.lse_relative)
        wrong += [f"lse {reason}"] if reason else []
    return Judgement("; ".join(wrong), largest)


def differs(value: Tensor, truth: Tensor, absolute: float, relative: float) -> str:
    """Why two tensors are not the same, infinities included; empty if they are."""
    x, y = value.double(), truth.double()
    if x.shape != y.shape:
        return f"has shape {list(x.shape)} instead of {list(y.shape)}"
    if not torch.equal(x.isposinf(), y.isposinf()) or not torch.equal(x.isneginf(), y.isneginf()):
        return "is infinite in other places"
    finite = y.isfinite()
    error = (x[finite] - y[finite]).abs()
    if bool(x.isnan().any()):
        return "is not a number somewhere"
    if not bool(((error < absolute) | (error < relative * y[finite].abs())).all()):
        return f"is off by up to {error.max().item():.2g}"
    return ""


def dense_truth(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    kv_lora_rank: int,
    *,
    softmax_scale: float,
    causal: bool,
    cache_format: CacheFormat | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sequences: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense decode in float64; arguments as ``mla_decode``'s.

    Args:
        q: ``[B, S, H, W]``.
        pages: the cache, G kv heads.
        block_table: int32 ``[B, max_blocks]``.
        cache_seqlens: int32 ``[B]``.
        kv_lora_rank: value columns.
        softmax_scale: factor on the scores.
        causal: query i sees keys before ``seqlen - (S - 1 - i)``.
        cache_format: of quantised pages.
        sliding_window: keys that a query sees, itself included.
        soft_cap: bound on the scores.
        sequences: only these; all by default.

    Returns:
        ``out [n, S, H, C]`` and ``lse [n, H, S]``, float64.
    """
    lengths = cache_seqlens.tolist()
    chosen = range(len(lengths)) if sequences is None else sequences
    _, queries, heads, width = q.shape
    size, groups = pages.shape[1:3]
    outs, lses = [], []
    for b in chosen:
        length = lengths[b]
        used = block_table[b, : math.ceil(length / size)].long()
        if cache_format is None:
            rows = pages[used].flatten(0, 1)[:length].double().transpose(0, 1)  # [G, T, row]
        else:
            offset = torch.arange(size, device=q.device)
            slots = (used[:, None] * size + offset).flatten()[:length]
            rows = cache_format.read(pages, slots, torch.float64)[None]
        group = q[b].double().view(queries, groups, heads // groups, width).transpose(0, 1)
        scores = group.flatten(1, 2) @ rows[..., rows.shape[-1] - width :].transpose(1, 2)
        scores = _capped(scores * softmax_scale, soft_cap)
        scores = scores.view(groups, queries, heads // groups, length)
        seen = _visible(queries, length, causal, sliding_window, q.device)
        scores = scores.masked_fill(~seen[:, None], -math.inf)
        weights = torch.softmax(scores, -1).nan_to_num(0.0)
        out = weights.flatten(1, 2) @ rows[..., :kv_lora_rank]
        outs.append(out.view(groups, queries, -1, kv_lora_rank).transpose(0, 1).flatten(1, 2))
        lse = torch.logsumexp(scores, -1).masked_fill(~seen.any(-1)[:, None], math.inf)
        lses.append(lse.transpose(1, 2).flatten(0, 1))
    return torch.stack(outs), torch.stack(lses)


def _capped(scores: Tensor, soft_cap: float | None) -> Tensor:
    return scores if soft_cap is None else soft_cap * torch.tanh(scores / soft_cap)


def _visible(
    queries: int, length: int, causal: bool, window: int | None, device: torch.device
) -> Tensor:
    """Which keys each query sees ``[S, T]``."""
    key = torch.arange(length, device=device)
    if not causal:
        return torch.ones(queries, length, dtype=torch.bool, device=device)
    position = length - queries + torch.arange(queries, device=device)[:, None]
    seen = key <= position
    return seen if window is None else seen & (key > position - window)


def sample_truth(problem: Problem) -> tuple[list[int], Tensor, Tensor]:
    """The truth of the shortest, a middle and the longest sequence of a problem.

    Returns:
        Which sequences, ``out [n, S, H, C]`` and ``lse [n, H, S]``.
    """
    lengths = problem.shape.lengths
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    chosen = sorted({order[0], order[len(order) // 2], order[-1]})
    out, lse = dense_truth(
        problem.q,
        problem.pages,
        problem.block_table,
        problem.cache_seqlens,
        problem.shape.kv_lora_rank,
        softmax_scale=problem.softmax_scale,
        causal=problem.causal,
        cache_format=problem.cache_format,
        sequences=chosen,
    )
    return chosen, out, lse


def selected_truth(
    q: Tensor,
    caches: Sequence[tuple[Tensor, CacheFormat, Tensor, Tensor | None]],
    kv_lora_rank: int,
    *,
    softmax_scale: float,
    attn_sink: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sparse decode in float64.

    Args:
        q: ``[B, S, H, W]``.
        caches: per cache its pages, their format, indices ``[B, S, K]`` and how many of them
            count: ``[B]`` or ``[B, S]``, or None for all.
        kv_lora_rank: value columns.
        softmax_scale: factor on the scores.
        attn_sink: ``[H]``, the score of a key without a value.

    Returns:
        ``out [B, S, H, C]``, ``lse`` and the largest score ``[B, H, S]``, float64.
    """
    batch, queries, heads, width = q.shape
    flat = q.flatten(0, 1)
    numbers = sum(indices.shape[2] * fmt.width for _, fmt, indices, _ in caches)
    step = max(1, GATHERED_NUMBERS // max(1, numbers))
    outs, lses, tops = [], [], []
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        found = [_gather(cache, part, queries) for cache in caches]
        rows = torch.cat([rows for rows, _ in found], 1)
        seen = torch.cat([seen for _, seen in found], 1)[:, None]
        scores = flat[part].double() @ rows[..., rows.shape[-1] - width :].transpose(1, 2)
        scores = (scores * softmax_scale).masked_fill(~seen, -math.inf)
        weights = torch.softmax(scores, -1).nan_to_num(0.0)
        outs.append(weights @ rows[..., :kv_lora_rank])
        lses.append(torch.logsumexp(scores, -1).masked_fill(~seen.any(-1), math.inf))
        tops.append(scores.amax(-1))
    out, lse, top = torch.cat(outs), torch.cat(lses), torch.cat(tops)
    if attn_sink is not None:
        share = torch.sigmoid(lse - attn_sink.double())
        out = out * share.masked_fill(lse == math.inf, 1.0)[..., None]
    shape = (batch, queries, heads)
    return (
        out.view(*shape, kv_lora_rank),
        lse.view(shape).transpose(1, 2),
        top.view(shape).transpose(1, 2),
    )


def _gather(
    cache: tuple[Tensor, CacheFormat, Tensor, Tensor | None], part: slice, queries: int
) -> tuple[Tensor, Tensor]:
    """Rows ``[n, K, C + R]`` that some queries selected, zeros for none, and which count."""
    pages, fmt, indices, counts = cache
    slots = indices.flatten(0, 1)[part].long()
    seen = (slots >= 0) & (slots < pages.shape[0] * pages.shape[1])
    if counts is not None:
        each = counts if counts.dim() == 2 else counts[:, None].expand(-1, queries)
        seen &= torch.arange(slots.shape[1], device=slots.device) < each.reshape(-1)[part, None]
    rows = fmt.read(pages, slots.masked_fill(~seen, 0), torch.float64)
    return rows.masked_fill(~seen[..., None], 0.0), seen
