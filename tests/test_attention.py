"""Attention as it is taught; the numbers name requirements (docs/requirements.md)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mlakit.errors import UsageError
from mlakit.nn.attention import (
    LatentAttention,
    MultiHeadAttention,
    SimpleCache,
    merge_key_value_heads,
    rotate,
)

# Two float64 computations of the same sums differ by a few units of 2^-52, times the sums' length.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}

heads_and_groups = st.integers(1, 8).flatmap(
    lambda H: st.tuples(st.just(H), st.sampled_from([g for g in range(1, H + 1) if H % g == 0]))
)
latent_sizes = st.fixed_dictionaries(
    {
        "kv_lora_rank": st.integers(1, 12),
        "qk_nope_head_dim": st.integers(1, 6),
        "qk_rope_head_dim": st.integers(1, 3).map(lambda pairs: 2 * pairs),
        "v_head_dim": st.integers(1, 6),
        "q_lora_rank": st.none() | st.integers(1, 6),
    }
)


def tokens(batch: int, length: int, hidden: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, hidden, generator=generator, dtype=torch.float64)


def mha(D: int, H: int, G: int | None = None, bias: bool = False) -> MultiHeadAttention:
    torch.manual_seed(1)
    return MultiHeadAttention(D, H, G, bias=bias).double()


def mla(D: int, H: int, **sizes: int | None) -> LatentAttention:
    torch.manual_seed(1)
    layer = LatentAttention(D, H, **sizes).double()
    for name, parameter in layer.named_parameters():  # norms that are not the identity
        if "layernorm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return layer


# A01, A03, B01-B03, B05-B10, B15, B16: the formula, head by head, with nothing but matrices.
@pytest.mark.parametrize("causal", [False, True])
@given(heads_and_groups, st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_is_the_formula(causal: bool, heads: tuple[int, int], d: int, S: int) -> None:
    H, G = heads
    layer, x = mha(H * d, H, G), tokens(1, S, H * d)
    Q, K, V = x[0] @ layer.W_Q, x[0] @ layer.W_K, x[0] @ layer.W_V  # B03
    found = []
    for h in range(H):
        own, shared = slice(h * d, h * d + d), slice(h * G // H * d, (h * G // H + 1) * d)  # B06
        scores = Q[:, own] @ K[:, shared].T / math.sqrt(d)  # B07, B09: d = D/H
        for i in range(S):
            found.append((h, i, scores[i, : i + 1 if causal else S].softmax(0), V[:, shared]))
    concat = torch.zeros(S, H * d, dtype=torch.float64)
    for h, i, weights, values in found:
        concat[i, h * d : h * d + d] = weights @ values[: len(weights)]  # A01: a blend of values
    output, _ = layer(x, causal=causal)
    torch.testing.assert_close(output[0], concat @ layer.W_0, **CLOSE)  # B10


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("G", [6, 3, 2, 1])  # MHA, GQA, GQA, MQA: A08, A14
def test_equals_torch_attention(G: int, causal: bool) -> None:
    layer, x = mha(48, 6, G), tokens(2, 7, 48)
    split = [p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj)]
    value = layer.v_proj(x).unflatten(-1, (-1, 8)).transpose(1, 2)
    heads = F.scaled_dot_product_attention(*split, value, is_causal=causal, enable_gqa=True)
    expected = layer.o_proj(heads.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, causal=causal)[0], expected, **CLOSE)


def test_equals_torch_multihead_module() -> None:
    layer, x = mha(24, 4, bias=True), tokens(2, 5, 24)
    other = torch.nn.MultiheadAttention(24, 4, batch_first=True, dtype=torch.float64)
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    other.in_proj_weight.data = torch.cat([p.weight for p in projections])
    other.in_proj_bias.data = torch.cat([p.bias for p in projections])
    other.out_proj.load_state_dict(layer.o_proj.state_dict())
    expected, expected_weights = other(x, x, x, average_attn_weights=False)
    output, weights = layer(x)
    torch.testing.assert_close(output, expected, **CLOSE)
    torch.testing.assert_close(weights, expected_weights, **CLOSE)  # A04: head by head


# B12: the same number of trained parameters for every H, in ours as in torch's.
@pytest.mark.parametrize("H", [1, 4, 8])
def test_parameters_do_not_depend_on_heads(H: int) -> None:
    layer = mha(128, H)
    assert sum(p.numel() for p in layer.parameters()) == 65_536
    other = torch.nn.MultiheadAttention(128, H, bias=False)
    assert sum(p.numel() for p in other.parameters()) == 65_536
    for matrix in (layer.W_Q, layer.W_K, layer.W_V, layer.W_0):
        assert matrix.shape == (128, 128)  # B15: D x D, cut only in the forward pass


def test_heads_are_a_partition() -> None:  # B06, B07
    x = tokens(2, 3, 24)
    parts = x.view(2, 3, 4, 6)
    assert torch.equal(torch.cat(parts.unbind(2), dim=-1), x)


def test_scale_follows_head_size() -> None:  # B09
    assert [mha(256, H).softmax_scale for H in (1, 4, 16)] == [1 / 16, 1 / 8, 1 / 4]


@pytest.mark.parametrize("D,H,nearest", [(128, 5, 4), (128, 7, 8), (100, 9, 10), (7, 3, 1)])
def test_error_names_both_numbers_and_the_nearest(D: int, H: int, nearest: int) -> None:  # B08
    with pytest.raises(
        UsageError, match=rf"hidden_size {D} .* num_attention_heads {H}\n"
    ) as caught:
        MultiHeadAttention(D, H)
    assert f"num_attention_heads {nearest}," in caught.value.remedy
    MultiHeadAttention(D, nearest)


@given(st.integers(1, 200), st.integers(-1, 201))
def test_every_head_count_works_or_is_refused(D: int, H: int) -> None:  # B08
    if H >= 1 and D % H == 0:
        assert MultiHeadAttention(D, H).head_dim * H == D
    else:
        with pytest.raises(UsageError):
            MultiHeadAttention(D, H)


def test_groups_must_divide_heads() -> None:
    with pytest.raises(UsageError, match=r"num_attention_heads 8 .* num_key_value_heads 3"):
        MultiHeadAttention(64, 8, 3)
    with pytest.raises(UsageError, match="qk_rope_head_dim 5"):
        LatentAttention(16, 2, 4, 4, 5, 4)


def test_projection_mixes_dimensions() -> None:  # B04
    layer, x = mha(8, 2), tokens(1, 1, 8)
    changed = x.clone()
    changed[..., 3] += 1.0
    assert torch.all(layer.q_proj(changed) != layer.q_proj(x))


def test_output_projection_is_linear() -> None:  # B11
    W_0 = mha(16, 4).o_proj
    a, b = tokens(1, 3, 16), tokens(1, 3, 16, seed=2)
    torch.testing.assert_close(W_0(2.5 * a - b), 2.5 * W_0(a) - W_0(b), **CLOSE)
    assert torch.linalg.matrix_rank(W_0.weight) == 16  # invertible: nothing a head found is lost


def test_layout_inside_the_products_is_batch_heads_tokens() -> None:  # B17
    _, weights = mha(32, 4)(tokens(2, 5, 32))
    assert weights.shape == (2, 4, 5, 5)


@given(heads_and_groups, st.integers(2, 9), st.integers(1, 8))
@settings(max_examples=20, deadline=None)
def test_cache_changes_nothing(heads: tuple[int, int], T: int, cut: int) -> None:  # A05
    H, G = heads
    layer, x, cut = mha(H * 2, H, G), tokens(2, T, H * 2), min(cut, T)
    cache = SimpleCache()
    first, _ = layer(x[:, :cut], causal=True, cache=cache)
    rest = [layer(x[:, i : i + 1], causal=True, cache=cache)[0] for i in range(cut, T)]
    torch.testing.assert_close(torch.cat([first, *rest], 1), layer(x, causal=True)[0], **CLOSE)
    assert cache.length == T
    assert cache.nbytes == 2 * T * (2 * G * 2) * 8  # batch * tokens * (K and V of G heads) * double


def test_cache_of_many_heads_is_huge_and_the_latent_small() -> None:  # A05, A11, A16
    held = {}
    for name, layer in {
        "MHA": mha(64, 8),
        "GQA": mha(64, 8, 2),
        "MQA": mha(64, 8, 1),
        "MLA": mla(64, 8, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
    }.items():
        cache = SimpleCache()
        layer(tokens(1, 10, 64), cache=cache)
        held[name] = cache.nbytes // 10 // 8  # numbers per token
    assert held == {"MHA": 128, "GQA": 32, "MQA": 16, "MLA": 16}


# A08, A14: heads that are equal merge exactly; others become their mean.
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("G", [4, 2, 1])
def test_equal_heads_merge_exactly(G: int, bias: bool) -> None:
    layer, x = mha(32, 8, bias=bias), tokens(1, 6, 32)
    for projection in (layer.k_proj, layer.v_proj):
        for tensor in projection.parameters():
            heads = tensor.data.view(G, 8 // G, 4, -1)
            heads.copy_(heads[:, :1].expand_as(heads).clone())
    merged = merge_key_value_heads(layer, G)
    assert merged.num_key_value_heads == G and merged.k_proj.out_features == G * 4
    torch.testing.assert_close(merged(x)[0], layer(x)[0], **CLOSE)


def test_merging_averages_and_leaves_the_source_alone() -> None:
    layer = mha(16, 4)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    merged = merge_key_value_heads(layer, 1)
    expected = layer.k_proj.weight.view(4, 4, 16).mean(0)
    torch.testing.assert_close(merged.k_proj.weight, expected, **CLOSE)
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
    with pytest.raises(UsageError, match="4 is not divisible by num_key_value_heads 3"):
        merge_key_value_heads(layer, 3)


# A11, A15, C04: both ways through the latent give the same result, cached or not.
@given(heads_and_groups, latent_sizes, st.integers(1, 6), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_absorbed_equals_expanded(
    heads: tuple[int, int], sizes: dict[str, int | None], S: int, past: int
) -> None:
    layer, x = mla(10, heads[0], num_key_value_heads=heads[1], **sizes), tokens(2, past + S, 10)
    expected, expected_weights = layer(x, causal=True)
    cache = SimpleCache()
    if past:
        layer(x[:, :past], causal=True, cache=cache)
    output, weights = layer(x[:, past:], causal=True, cache=cache, absorbed=True)
    torch.testing.assert_close(output, expected[:, past:], **CLOSE)
    torch.testing.assert_close(weights, expected_weights[:, :, past:], **CLOSE)
    width = sizes["kv_lora_rank"] + sizes["qk_rope_head_dim"]
    assert cache.nbytes == 2 * (past + S) * width * 8  # one latent and one key, however many heads


@pytest.mark.parametrize("q_lora_rank", [None, 6])
def test_latent_attention_is_deepseeks(q_lora_rank: int | None) -> None:  # A11
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    sizes = {"kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
    layer, x = mla(24, 3, q_lora_rank=q_lora_rank, **sizes), tokens(2, 7, 24)
    config = DeepseekV3Config(
        hidden_size=24,
        num_attention_heads=3,
        num_key_value_heads=3,
        q_lora_rank=q_lora_rank,
        rope_interleave=False,
        attn_implementation="eager",
        **sizes,
    )
    other = DeepseekV3Attention(config, layer_idx=0).double()
    other.load_state_dict(layer.state_dict())
    angle = torch.arange(7).double()[:, None] * 10000 ** -(torch.arange(0, 4, 2).double() / 4)
    angle = torch.cat([angle, angle], dim=-1)[None]
    future = torch.full((7, 7), -math.inf, dtype=torch.float64).triu(1)[None, None]
    expected, _ = other(x, (angle.cos(), angle.sin()), future)
    # transformers takes its softmax in float32: 2^-24 relative on weights of at most 1
    torch.testing.assert_close(layer(x, causal=True)[0], expected, rtol=1e-6, atol=1e-6)


def test_latent_matrices_are_the_formula() -> None:  # A11, C04
    sizes = {"kv_lora_rank": 5, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3}
    layer, x = mla(12, 2, **sizes), tokens(1, 4, 12)
    L = F.rms_norm(x[0] @ layer.W_DKV, (5,), layer.kv_a_layernorm.weight, 1e-6)  # L = f(K)
    k_rope = rotate(x[0] @ layer.W_KR, torch.arange(4), 10000.0)
    Q = layer.q_proj(x)[0].view(4, 2, 6)
    heads = []
    for h in range(2):
        q_rope = rotate(Q[:, h, 4:], torch.arange(4), 10000.0)
        scores = Q[:, h, :4] @ layer.W_UK[h] @ L.T + q_rope @ k_rope.T
        A = (scores / math.sqrt(6)).softmax(-1)  # A = g(Q, L)
        heads.append(A @ L @ layer.W_UV[h].T)  # O = A V
    expected = torch.cat(heads, dim=-1) @ layer.W_0
    torch.testing.assert_close(layer(x)[0][0], expected, **CLOSE)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_rotation_sees_only_distances(i: int, j: int, shift: int) -> None:
    q, k = tokens(1, 2, 8)[0]
    before, after = (
        rotate(q[None], torch.tensor([i + s]), 10000.0)
        @ rotate(k[None], torch.tensor([j + s]), 10000.0).T
        for s in (0, shift)
    )
    torch.testing.assert_close(before, after, **CLOSE)
