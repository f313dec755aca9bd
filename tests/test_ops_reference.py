"""The readable references against dense softmax attention."""

from __future__ import annotations

import torch

from mlakit.ops.reference import latent_attention, online_softmax_attention


def test_online_softmax_equals_dense():
    random = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(n, d, generator=random, dtype=torch.float64)
        for n, d in [(5, 8), (150, 8), (150, 6)]
    )
    k[100] *= 30  # the maximum rises late: the rescale matters
    want = torch.softmax(q @ k.T * 0.3, -1) @ v
    for block_size in (1, 7, 64, 150, 1000):
        got = online_softmax_attention(q, k, v, softmax_scale=0.3, block_size=block_size)
        # float64 rounding, 2^-53, of some hundred products
        torch.testing.assert_close(got, want, atol=1e-13, rtol=1e-12)


def test_latent_attention_equals_expanded():
    random = torch.Generator().manual_seed(0)
    Q, K, W_DKV, W_UK, W_UV = (
        torch.randn(n, d, generator=random, dtype=torch.float64)
        for n, d in [(3, 8), (20, 16), (6, 16), (8, 6), (5, 6)]
    )
    keys, values = K @ W_DKV.T @ W_UK.T, K @ W_DKV.T @ W_UV.T
    want = torch.softmax(Q @ keys.T * 0.2, -1) @ values
    got = latent_attention(Q, K, W_DKV, W_UK, W_UV, softmax_scale=0.2)
    # float64 rounding, 2^-53, through a chain of three products
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
