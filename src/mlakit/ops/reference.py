"""Readable truth: attention over a latent cache written as the papers write it, one loop a line.

Everything here is slow on purpose. The fast paths are tested against ``reference_decode``; the
two functions below it spell out the pseudocode that FlashMLA is explained with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def reference_decode(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    kv_lora_rank: int,
    softmax_scale: float,
    causal: bool = True,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Absorbed MLA decode over a paged cache, computed naively; shapes as in ``mla_decode``.

    Args:
        q: absorbed queries ``[B, S, H, W]``; they meet the last W columns of a cache row.
        k_cache: pages ``[num_blocks, P, G, row]``; head h reads kv head ``h // (H / G)``.
        block_table: int32 ``[B, max_blocks]``.
        cache_seqlens: int32 ``[B]``.
        kv_lora_rank: columns of a row that are its value, from the left.
        softmax_scale: factor on the scores.
        causal: query i sees keys before ``seqlen - (S - 1 - i)``.
        dtype: precision of the computation and of the result.

    Returns:
        ``out [B, S, H, kv_lora_rank]`` and ``lse [B, H, S]`` (natural logarithm), both in
        ``dtype``; a row that sees no key has out 0 and lse +inf.
    """
    batch, queries, heads, width = q.shape
    block_size, kv_heads = k_cache.shape[1], k_cache.shape[2]
    out = torch.zeros(batch, queries, heads, kv_lora_rank, dtype=dtype, device=q.device)
    lse = torch.full((batch, heads, queries), math.inf, dtype=dtype, device=q.device)
    for b in range(batch):
        length = int(cache_seqlens[b])
        pages = block_table[b, : math.ceil(length / block_size)].long()
        rows = k_cache[pages].flatten(0, 1)[:length].to(dtype)  # [length, G, row]
        for s in range(queries):
            visible = length - (queries - 1 - s) if causal else length
            if visible <= 0:
                continue
            for h in range(heads):
                row = rows[:visible, h // (heads // kv_heads)]
                key, value = row[:, row.shape[1] - width :], row[:, :kv_lora_rank]
                scores = key @ q[b, s, h].to(dtype) * softmax_scale
                out[b, s, h] = torch.softmax(scores, dim=0) @ value
                lse[b, h, s] = torch.logsumexp(scores, dim=0)
    return out, lse


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
