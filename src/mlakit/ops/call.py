"""What one decode call asks for: the nouns that every implementation takes.

``dense_call`` and ``selection`` check what a user passed, once, with messages that say what, where
and what to try. They read metadata only, never a value, so they cost microseconds and trace.
Queries are packed: all of them in one axis N, sequence after sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlakit.errors import UsageError
from mlakit.ops.cache_format import PLAIN, CacheFormat, plain_format

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class DenseCall:
    """Attention of the new queries of B sequences to their own pages.

    Sequence b has the tokens before ``cache_seqlens[b]``, its S_b new ones included. Its query i
    sees keys before ``cache_seqlens[b] - (S_b - 1 - i)`` if causal, else all of them.

    Attributes:
        q: ``[N, H, W]``.
        k_cache: pages ``[num_blocks, P, G, row]``, or pages of ``cache_format``, then G is 1.
        block_table: int32 ``[B, max_blocks]``.
        cache_seqlens: int32 ``[B]``.
        cu_seqlens_q: int32 ``[B + 1]``, where each sequence's queries start in N; None if each has
            ``max_seqlen_q`` of them.
        max_seqlen_q: S, the most queries of one sequence.
        kv_lora_rank: C, columns of a row that are its value.
        softmax_scale: factor on the scores.
        causal: queries see no later key.
        sliding_window: keys that a causal query sees, itself included; 0 for all of them.
        soft_cap: scores become ``soft_cap tanh(score / soft_cap)``; 0.0 for as they are.
        batch_invariant: a sequence's result does not depend on its neighbours, bit for bit.
        cache_format: how quantised pages hold their tokens; None for numbers in q's dtype.
    """

    q: Tensor
    k_cache: Tensor
    block_table: Tensor
    cache_seqlens: Tensor
    cu_seqlens_q: Tensor | None
    max_seqlen_q: int
    kv_lora_rank: int
    softmax_scale: float
    causal: bool
    sliding_window: int
    soft_cap: float
    batch_invariant: bool
    cache_format: CacheFormat | None

    @property
    def batch_size(self) -> int:
        """Sequences, B."""
        return self.block_table.shape[0]

    @property
    def row(self) -> int:
        """Columns of a cache row, C + R."""
        return self.cache_format.width if self.cache_format else self.k_cache.shape[3]

    @property
    def capacity(self) -> int:
        """Tokens that a sequence's line of the block table has room for."""
        return self.block_table.shape[1] * self.k_cache.shape[1]

    def flat(self) -> tuple[Any, ...]:
        """The fields as the operator takes them, the cache's format by its name."""
        *values, cache_format = (getattr(self, field.name) for field in fields(self))
        return (*values, cache_format.name if cache_format else "")

    def used_pages(self) -> list[list[int]]:
        """The page numbers each sequence uses, in order, the garbage after them cut off.

        Reads ``cache_seqlens`` and ``block_table``.

        Raises:
            UsageError: if a length or a page number points outside of the table or the cache.
        """
        num_blocks, block_size = self.k_cache.shape[:2]
        lengths = self.cache_seqlens.tolist()
        used = []
        for b, (table, length) in enumerate(zip(self.block_table.tolist(), lengths)):
            if not 0 <= length <= self.capacity:
                raise UsageError(
                    f"cache_seqlens[{b}] is {length}; block_table has room for 0 to "
                    f"{self.capacity} tokens"
                )
            pages = table[: -(-length // block_size)]
            if pages and not 0 <= min(pages) <= max(pages) < num_blocks:
                raise UsageError(
                    f"block_table[{b}] uses pages {min(pages)} to {max(pages)}; k_cache has "
                    f"{num_blocks}, counted from 0"
                )
            used.append(pages)
        return used

    @classmethod
    def from_flat(cls, *values: Any) -> DenseCall:
        """The inverse of ``flat``."""
        given = dict(zip((field.name for field in fields(cls)), values, strict=True))
        name = given["cache_format"]
        return cls(**given | {"cache_format": CacheFormat.parse(name) if name else None})

    def query_starts(self) -> list[int]:
        """Where each sequence's queries start, ``[B + 1]``; reads ``cu_seqlens_q``.

        Raises:
            UsageError: if it does not rise from 0 to N in steps of at most ``max_seqlen_q``.
        """
        if self.cu_seqlens_q is None:
            return [b * self.max_seqlen_q for b in range(self.batch_size + 1)]
        starts = self.cu_seqlens_q.tolist()
        steps = [after - before for before, after in pairwise(starts)]
        fits = all(0 <= step <= self.max_seqlen_q for step in steps)
        if starts[0] != 0 or starts[-1] != self.q.shape[0] or not fits:
            raise UsageError(
                f"cu_seqlens_q is {starts[:9]}...; it should rise from 0 to the {self.q.shape[0]} "
                f"queries there are, by at most max_seqlen_q, {self.max_seqlen_q}, a sequence"
            )
        return starts


class Selection(NamedTuple):
    """Rows of a cache that queries attend to.

    Attributes:
        pages: the cache.
        cache_format: its format.
        slots: ``page * block_size + offset``, integers ``[N, K]``; what is outside of the cache,
            -1 for example, is left out.
        counts: for each query, how many of its slots count, from the left, ``[N]``.
    """

    pages: Tensor
    cache_format: CacheFormat
    slots: Tensor
    counts: Tensor

    @property
    def room(self) -> int:
        """Rows in the cache."""
        return self.pages.shape[0] * self.pages.shape[1]


@dataclass(frozen=True)
class SparseCall:
    """Attention of every query to its own selection of cache rows.

    Attributes:
        q: ``[N, H, W]``; meets the last W columns of a row.
        selections: the rows, of one cache or of two, attended to as one.
        kv_lora_rank: columns of a row that are its value, from the left.
        softmax_scale: factor on the scores.
        batch_invariant: a query's result does not depend on its neighbours, bit for bit.
    """

    q: Tensor
    selections: tuple[Selection, ...]
    kv_lora_rank: int
    softmax_scale: float
    batch_invariant: bool


def dense_call(
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
) -> DenseCall:
    """Check and pack the arguments of ``mla_decode``, which says what they are.

    Raises:
        UsageError: naming the argument, what it is and what it should be.
    """
    queries = _check_queries(q, cu_seqlens_q, max_seqlen_q)
    if cache_format is None:
        _check_plain(q, k_cache)
    else:
        _check_stored(q, k_cache, cache_format)
    row = k_cache.shape[3] if cache_format is None else cache_format.width
    if cache_format is not None and cache_format.kind in PLAIN:
        cache_format = None
    _check_widths(q, row, kv_lora_rank)
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    if block_table.dim() != 2 or block_table.shape[0] != batch:
        raise UsageError(
            f"block_table has shape {list(block_table.shape)}; it should be [{batch}, max_blocks]"
        )
    check_vector("block_table", block_table, q, [tuple(block_table.shape)], torch.int32)
    check_vector("cache_seqlens", cache_seqlens, q, [(batch,)], torch.int32)
    if sliding_window is not None and (sliding_window < 1 or not causal):
        raise UsageError(
            f"sliding_window is {sliding_window} and causal {causal}; a window is the number of "
            "keys that a causal query sees, itself included",
            remedy="Pass None for no window, or a number from 1 on with causal=True.",
        )
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise UsageError(f"soft_cap is {soft_cap}; it should be above 0, or None for none")
    return DenseCall(
        q.flatten(0, 1) if q.dim() == 4 else q, k_cache, block_table, cache_seqlens, cu_seqlens_q,
        queries, kv_lora_rank, float(softmax_scale), bool(causal), sliding_window or 0,
        float(soft_cap or 0.0), bool(batch_invariant), cache_format,
    )  # fmt: skip


def selection(
    q: Tensor,
    pages: Tensor,
    indices: Tensor,
    length: Tensor | None,
    cache_format: CacheFormat | None,
    kv_lora_rank: int,
    prefix: str = "",
) -> Selection:
    """Check and pack one cache of ``mla_sparse_decode`` and the indices into it.

    Args:
        q: ``[B, S, H, W]``.
        pages: the cache.
        indices: int32 ``[B, S, topk]``.
        length: int32 ``[B]`` or ``[B, S]``, or None for all of them.
        cache_format: of quantised pages; None for numbers in q's dtype.
        kv_lora_rank: columns of a row that are its value.
        prefix: of the arguments' names in messages.

    Raises:
        UsageError: naming the argument, what it is and what it should be.
    """
    _check_queries(q, None, None)
    fmt = cache_format or plain_format(pages, kv_lora_rank)
    _check_stored(q, pages, fmt, f"{prefix}k_cache")
    _check_widths(q, fmt.width, kv_lora_rank)
    batch, queries = q.shape[:2]
    name = f"{prefix}indices"
    if indices.dim() != 3:
        raise UsageError(f"{name} has shape {list(indices.shape)}; it should be [B, S, topk]")
    topk = indices.shape[2]
    check_vector(name, indices, q, [(batch, queries, topk)], torch.int32)
    if length is None:
        counts = indices.new_full((batch * queries,), topk)
    else:
        shapes = [(batch,), (batch, queries)]
        check_vector(f"{prefix}topk_length", length, q, shapes, torch.int32)
        per_query = length if length.dim() == 2 else length[:, None]
        counts = per_query.expand(batch, queries).reshape(-1)
    return Selection(pages, fmt, indices.reshape(batch * queries, topk), counts)


def check_vector(
    name: str, tensor: Tensor, q: Tensor, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
) -> None:
    """Refuse a tensor that has none of the shapes, another dtype, or is not on q's device."""
    if tuple(tensor.shape) not in shapes:
        allowed = " or ".join(str(list(shape)) for shape in shapes)
        raise UsageError(f"{name} has shape {list(tensor.shape)}; it should be {allowed}")
    if tensor.dtype != dtype:
        raise UsageError(
            f"{name} is {tensor.dtype}; it should be {str(dtype).split('.')[1]}",
            remedy=f"Pass {name}.to({dtype}).",
        )
    _check_device(q, tensor, name)


def _check_queries(q: Tensor, cu_seqlens_q: Tensor | None, max_seqlen_q: int | None) -> int:
    """Refuse queries that are no queries; returns S."""
    if (cu_seqlens_q is None) != (max_seqlen_q is None):
        raise UsageError("cu_seqlens_q and max_seqlen_q come together; one of them is missing")
    packed = cu_seqlens_q is not None
    shape = "[N, H, W] beside cu_seqlens_q" if packed else "[B, S, H, W]"
    if q.dim() != (3 if packed else 4) or q.dtype not in DTYPES:
        raise UsageError(
            f"q has shape {list(q.shape)} and is {q.dtype}; it should be {shape}, of bfloat16, "
            "float16, float32 or float64"
        )
    if q.stride(-1) != 1 and q.shape[-1] > 1:
        raise UsageError("q is not contiguous in its last dimension", remedy="Pass q.contiguous().")
    if cu_seqlens_q is None or max_seqlen_q is None:
        return q.shape[1]
    if cu_seqlens_q.dim() != 1 or not cu_seqlens_q.shape[0]:
        raise UsageError(f"cu_seqlens_q has shape {list(cu_seqlens_q.shape)}; it should be [B + 1]")
    check_vector("cu_seqlens_q", cu_seqlens_q, q, [tuple(cu_seqlens_q.shape)], torch.int32)
    if max_seqlen_q < 1:
        raise UsageError(f"max_seqlen_q is {max_seqlen_q}; it should be at least 1")
    return max_seqlen_q


def _check_plain(q: Tensor, k_cache: Tensor) -> None:
    """Refuse pages that do not hold numbers as q does, of any number of kv heads."""
    if k_cache.dim() != 4:
        raise UsageError(
            f"k_cache has shape {list(k_cache.shape)}; it should be [num_blocks, P, G, row]",
            remedy="A cache without a kv-head axis gets one by k_cache.unsqueeze(2).",
        )
    if q.dtype != k_cache.dtype:
        raise UsageError(
            f"q is {q.dtype} and k_cache is {k_cache.dtype}; both should be the same of "
            "bfloat16, float16, float32 and float64",
            remedy="Name the cache_format of a quantised cache.",
        )
    heads = q.shape[-2]
    block_size, kv_heads = k_cache.shape[1:3]
    if block_size < 1 or kv_heads < 1 or heads % kv_heads:
        raise UsageError(
            f"k_cache has pages of {block_size} tokens and {kv_heads} kv heads for {heads} query "
            "heads; it needs at least one of each, and query heads divisible by kv heads"
        )
    if k_cache.stride(-1) != 1 and k_cache.shape[-1] > 1:
        raise UsageError(
            "k_cache is not contiguous in its last dimension", remedy="Pass k_cache.contiguous()."
        )
    _check_device(q, k_cache, "k_cache")


def _check_stored(
    q: Tensor, pages: Tensor, cache_format: CacheFormat, name: str = "k_cache"
) -> None:
    """Refuse pages that are not of a format, or hold numbers of another dtype than q's."""
    cache_format.check(pages, name)
    if cache_format.kind in PLAIN and q.dtype != pages.dtype:
        raise UsageError(f"q is {q.dtype} and {name} is {pages.dtype}; both should be the same")
    _check_device(q, pages, name)


def _check_widths(q: Tensor, row: int, kv_lora_rank: int) -> None:
    if not 1 <= q.shape[-1] <= row:
        raise UsageError(
            f"q is {q.shape[-1]} wide and a cache row {row}; q should have 1 to {row} columns "
            "(fewer than the row: scores over its last columns only)"
        )
    if not 1 <= kv_lora_rank <= row:
        raise UsageError(f"kv_lora_rank is {kv_lora_rank}; a cache row of {row} allows 1 to {row}")


def _check_device(q: Tensor, tensor: Tensor, name: str) -> None:
    if tensor.device != q.device:
        raise UsageError(
            f"{name} is on {tensor.device} and q on {q.device}; both should be on one device",
            remedy=f"Pass {name}.to(q.device).",
        )
