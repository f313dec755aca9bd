"""Readable truth: attention over a latent cache written as the papers write it, one loop a line.

Everything here is slow on purpose. The fast paths are tested against ``decode`` and
``decode_selected``; the two functions below them spell out the pseudocode that FlashMLA is
explained with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mlakit.ops.call import DenseCall, SparseCall


def decode(call: DenseCall, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """``mla_decode`` computed naively, one query at a time.

    Args:
        call: what is to be computed.
        dtype: precision of the computation and of the result.

    Returns:
        ``out [N, H, kv_lora_rank]`` and ``lse [N, H]`` (natural logarithm), both in ``dtype``; a
        row that sees no key has out 0 and lse +inf.
    """
    queries, heads, width = call.q.shape
    group = heads // call.k_cache.shape[2]
    out = torch.zeros(queries, heads, call.kv_lora_rank, dtype=dtype, device=call.q.device)
    lse = torch.full((queries, heads), math.inf, dtype=dtype, device=call.q.device)
    starts, pages = call.query_starts(), call.used_pages()
    for b, length in enumerate(call.cache_seqlens.tolist()):
        rows = _rows(call, pages[b], length, dtype)
        for n in range(starts[b], starts[b + 1]):
            stop = length - (starts[b + 1] - 1 - n) if call.causal else length
            first = max(0, stop - call.sliding_window) if call.sliding_window else 0
            if stop <= 0:
                continue
            for g in range(heads // group):
                row, these = rows[first:stop, g], slice(g * group, (g + 1) * group)
                scores = call.q[n, these].to(dtype) @ row[:, row.shape[1] - width :].T
                scores = scores * call.softmax_scale
                if call.soft_cap:
                    scores = call.soft_cap * torch.tanh(scores / call.soft_cap)
                out[n, these] = torch.softmax(scores, dim=1) @ row[:, : call.kv_lora_rank]
                lse[n, these] = torch.logsumexp(scores, dim=1)
    return out, lse


def decode_selected(
    call: SparseCall, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """``mla_sparse_decode`` computed naively, without the sink; also the largest score."""
    queries, heads, width = call.q.shape
    out = torch.zeros(queries, heads, call.kv_lora_rank, dtype=dtype, device=call.q.device)
    lse = torch.full((queries, heads), math.inf, dtype=dtype, device=call.q.device)
    top = torch.full((queries, heads), -math.inf, dtype=dtype, device=call.q.device)
    for n in range(queries):
        parts = []
        for pages, cache_format, slots, counts in call.selections:
            room = pages.shape[0] * pages.shape[1]
            some = slots[n, : max(0, int(counts[n]))]
            parts.append(cache_format.read(pages, some[(some >= 0) & (some < room)], dtype))
        rows = torch.cat(parts)
        if not len(rows):
            continue
        scores = call.q[n].to(dtype) @ rows[:, rows.shape[1] - width :].T * call.softmax_scale
        out[n] = torch.softmax(scores, dim=1) @ rows[:, : call.kv_lora_rank]
        lse[n], top[n] = torch.logsumexp(scores, dim=1), scores.amax(dim=1)
    return out, lse, top


def _rows(call: DenseCall, used: list[int], length: int, dtype: torch.dtype) -> Tensor:
    """The rows of a sequence that uses these pages, ``[length, G, row]``."""
    block_size = call.k_cache.shape[1]
    pages = torch.tensor(used, dtype=torch.int64, device=call.k_cache.device)
    if call.cache_format is None:
        return call.k_cache[pages].flatten(0, 1)[:length].to(dtype)
    slots = pages[:, None] * block_size + torch.arange(block_size, device=pages.device)
    return call.cache_format.read(call.k_cache, slots.flatten()[:length], dtype)[:, None]


def online_softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, *, softmax_scale: float, block_size: int = 64
) -> Tensor:
    """Attention one block of keys at a time, without ever holding a whole row of scores.

    For block i the algorithm keeps the running maximum ``m_i``, the running sum ``l_i`` of
    ``exp(scores - m_i)`` and the running, not yet normalised, output ``O_i``. Whenever the maximum
    rises, what was summed before is rescaled by ``exp(m_{i-1} - m_i)``; after the last block O is
    divided by l. Pseudocode that leaves out these two steps is wrong as soon as there are two
    blocks (Milakov and Gimelshein, arXiv 1805.02867, algorithm 3; Dao et al., FlashAttention,
    arXiv 2205.14135, algorithm 1).

    Args:
        query: ``[S, d]``.
        key: ``[T, d]``, T at least 1.
        value: ``[T, V]``.
        softmax_scale: factor on the scores.
        block_size: keys per block.

    Returns:
        ``softmax(query key^T softmax_scale) value``, ``[S, V]``.
    """
    m = query.new_full((query.shape[0], 1), -math.inf)
    l = query.new_zeros(query.shape[0], 1)
    O = query.new_zeros(query.shape[0], value.shape[1])
    for start in range(0, key.shape[0], block_size):
        block = slice(start, start + block_size)
        scores = query @ key[block].T * softmax_scale
        m_i = torch.maximum(m, scores.amax(dim=1, keepdim=True))
        rescale = torch.exp(m - m_i)
        weights = torch.exp(scores - m_i)
        l = l * rescale + weights.sum(dim=1, keepdim=True)
        O = O * rescale + weights @ value[block]
        m = m_i
    return O / l


def latent_attention(
    Q: Tensor, K: Tensor, W_DKV: Tensor, W_UK: Tensor, W_UV: Tensor, *, softmax_scale: float
) -> Tensor:
    """One head of MLA in three lines: latent ``L = f(K)``, scores ``A = g(Q, L)``, output ``O``.

    The rotary part is left out; ``mla_decode`` has it. Only L would be cached: the query is
    carried into the latent space (``Q W_UK``) instead of the keys out of it, and the values leave
    it after the blend (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).

    Args:
        Q: queries ``[S, N]``.
        K: what keys and values are made of, the hidden states ``[T, D]``.
        W_DKV: down-projection ``[C, D]``.
        W_UK: key up-projection ``[N, C]``.
        W_UV: value up-projection ``[V, C]``.
        softmax_scale: factor on the scores.

    Returns:
        ``O [S, V]``, equal to ordinary attention with keys ``K W_DKV^T W_UK^T`` and values
        ``K W_DKV^T W_UV^T``.
    """
    L = K @ W_DKV.T
    A = torch.softmax(Q @ W_UK @ L.T * softmax_scale, dim=-1)
    return A @ L @ W_UV.T
