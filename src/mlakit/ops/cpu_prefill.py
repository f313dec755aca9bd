"""Attention of many queries over keys and values of every head, on the CPU.

A block of queries of one head at a time, over all its keys: two products and a softmax, the scores
in the CPU's caches. It stands for torch's attention where that has to widen values to the width of
keys, as latent attention's are narrower, and where it leaves a CPU's bfloat16 products unused.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from mlakit.ops.cpu import precision, products

BLOCK = 256
"""Queries at a time; fewer, and a product's operands are fetched more often than they need be."""


def prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    softmax_scale: float,
    visible: Tensor | None = None,
) -> Tensor:
    """``softmax(softmax_scale query key^T) value`` for each head; forward only.

    Args:
        query: ``[B, H, S, E]``.
        key: ``[B, H, T, E]``, T >= S.
        value: ``[B, H, T, V]``.
        softmax_scale: factor on the scores.
        visible: which keys each query sees, bool ``[B or 1, 1, S, T]``; by default query i sees
            keys 0 to i. A query that sees none gets some finite numbers.

    Returns:
        ``[B, S, H, V]`` in query's dtype: sums in float32 of weights in query's dtype, or in
        float32 where the CPU has no products in it.
    """
    inputs = (query, key, value)
    if has_torch_function(inputs):  # seen by a TorchFunctionMode, as torch's own attention is
        seen: Tensor = handle_torch_function(
            prefill, inputs, *inputs, softmax_scale=softmax_scale, visible=visible
        )
        return seen
    batch, heads, length, _ = query.shape
    out = query.new_empty(batch, length, heads, value.shape[-1])
    dtype = precision(query.dtype)
    query, key, value = query.to(dtype), key.to(dtype).mT, value.to(dtype)
    later = _hidden(torch.ones(BLOCK, BLOCK, dtype=torch.bool).tril_())
    for b, start in product(range(batch), range(0, length, BLOCK)):
        stop = min(start + BLOCK, length)
        last, hidden = stop, later[: stop - start, : stop - start]
        if visible is not None:
            last, hidden = (
                key.shape[-1],
                _hidden(visible[b % len(visible), 0, start:stop]),
            )
        for h in range(heads):
            scores = products(query[b, h, start:stop], key[b, h, :, :last]).mul_(softmax_scale)
            scores[:, last - hidden.shape[1] :].add_(hidden)
            weights = torch.softmax(scores, dim=-1, out=scores)
            out[b, start:stop, h] = weights.to(dtype) @ value[b, h, :last]
    return out


def _hidden(visible: Tensor) -> Tensor:
    """What is added to scores ``[S, T]``: the lowest number where a key is not seen."""
    hidden = torch.zeros(visible.shape)
    return hidden.masked_fill_(~visible, torch.finfo(hidden.dtype).min)
