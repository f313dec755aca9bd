"""Accounting: equal to what transformers and torch really count and allocate."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache

from mlakit import account
from mlakit.errors import UsageError
from mlakit.families import read_model, tensor_shapes
from mlakit.nn.cache import LatentCache
from mlakit.spec import AttentionSpec, ModelSpec
from toy_models import SIZES, TOYS, as_json, converted_config, toy_config

FORMS = ("compress", "equal-cache", "article")


def spec_of(name: str) -> ModelSpec:
    return read_model(as_json(toy_config(name)))


def attention(hidden: int, heads: int, groups: int, layers: int) -> list[AttentionSpec]:
    dim = hidden // heads
    return [AttentionSpec(hidden, heads, groups, dim, softmax_scale=dim**-0.5)] * layers


@pytest.mark.parametrize("name", TOYS)
def test_parameters_are_those_of_the_model(name):
    config = toy_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    spec = spec_of(name)
    counted = account.parameters(spec)
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.total == sum(
        torch.Size(shape).numel()
        for tensor, shape in tensor_shapes(spec).items()
        if "e_score_correction_bias" not in tensor  # a buffer, on disk but not trained
    )
    blocks = [layer.self_attn for layer in model.model.layers]
    assert counted.attention == sum(p.numel() for b in blocks for p in b.parameters())
    experts = [p.numel() for n, p in model.named_parameters() if ".mlp.experts." in n]
    routed = max(spec.feed_forwards, key=lambda block: block.num_experts)
    unused = 1 - routed.num_experts_per_tok / routed.num_experts if experts else 0
    assert counted.inactive == unused * sum(experts)
    assert counted.active == counted.total - counted.inactive


@pytest.mark.parametrize("form", FORMS)
def test_parameters_of_converted_models(form):
    from mlakit.nn.models import MLALlamaForCausalLM

    config = converted_config(form)
    with torch.device("meta"):
        model = MLALlamaForCausalLM(config)
    counted = account.parameters(read_model(as_json(config)))
    assert counted.total == sum(p.numel() for p in model.parameters())


@settings(max_examples=15, deadline=None)
@given(
    groups=st.integers(1, 4),
    per_group=st.integers(1, 3),
    half=st.integers(1, 6),
    layers=st.integers(1, 3),
    intermediate=st.integers(1, 40),
    vocab=st.integers(1, 50),
    tied=st.booleans(),
    bias=st.booleans(),
)
def test_parameters_of_any_llama(groups, per_group, half, layers, intermediate, vocab, tied, bias):
    from transformers import LlamaConfig

    heads = groups * per_group
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=heads * 4,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=2 * half,
        tie_word_embeddings=tied,
        attention_bias=bias,
        mlp_bias=bias,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counted = account.parameters(read_model(as_json(config)))
    assert counted.total == counted.active == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("heads", [1, 4, 8])
def test_b12_same_parameters_for_every_number_of_heads(heads):
    """REQUIREMENTS B12: D = 128 gives 65,536 for any H."""
    assert account.attention_parameters(attention(128, heads, heads, 1)[0]) == 65_536


# COMPARE.md, section 0, point 5, in bf16: bytes per token, then shares that 512+64 leaves.
PUBLISHED = [
    ("Llama-2-7B", (4096, 32, 32, 32), 524_288, 0.070, 0.070),
    ("Llama-3-8B", (4096, 32, 8, 32), 131_072, 0.28, 0.070),
    ("Qwen2.5-14B", (5120, 40, 8, 48), 196_608, 0.28, 0.056),
    ("Qwen2.5-7B", (3584, 28, 4, 28), 57_344, 0.56, 0.080),
]


@pytest.mark.parametrize("name,shape,now,of_own,of_mha", PUBLISHED)
def test_c16_published_cache_shares(name, shape, now, of_own, of_mha):
    """REQUIREMENTS C16: 5 to 13 % of MHA on 7 to 14 B shapes; 28 to 56 % of a GQA model's own."""
    layers = attention(*shape)
    own = account.cache_bytes_per_token(layers, 2)
    mha = account.cache_bytes_per_token([account.as_mha(x) for x in layers], 2)
    mla = account.cache_bytes_per_token([account.as_mla(x, 512, 64) for x in layers], 2)
    assert own == now
    assert mla / own == pytest.approx(of_own, abs=0.005)
    assert mla / mha == pytest.approx(of_mha, abs=0.0005)
    assert 0.05 < mla / mha < 0.13


def filled(model: torch.nn.Module, length: int, batch: int) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.zeros(batch, length, dtype=torch.long), past_key_values=cache, use_cache=True)
    return cache


def held(cache: DynamicCache) -> int:
    return sum(part.numel() * part.element_size() for la in cache.layers
               for part in (la.keys, la.values))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "llama-mha", "llama-mqa", "qwen2", "qwen3", "mixtral",
                                  "deepseek_v2", "deepseek_v3"])  # fmt: skip
def test_cache_bytes_are_those_transformers_allocates(name, dtype):
    model = AutoModelForCausalLM.from_config(toy_config(name), dtype=dtype)
    layers, itemsize = spec_of(name).layers, dtype.itemsize
    assert held(filled(model, 11, 2)) == account.cache_bytes(layers, 2, 11, itemsize)
    assert held(filled(model, 1, 1)) == account.cache_bytes_per_token(layers, itemsize)


@pytest.mark.parametrize("name", ["gemma2", "qwen2-windows"])
def test_windows_bound_the_cache(name):
    """transformers keeps window - 1 tokens between steps; the newest joins when it is needed."""
    model = AutoModelForCausalLM.from_config(toy_config(name), dtype=torch.float32)
    layers = spec_of(name).layers
    windowed = [layer for layer in layers if layer.sliding_window]
    spare = account.cache_bytes_per_token(windowed, 4)
    assert windowed and held(filled(model, 30, 1)) == account.cache_bytes(layers, 1, 30, 4) - spare
    short = min(layer.sliding_window for layer in windowed) - 1
    assert held(filled(model, short, 1)) == account.cache_bytes(layers, 1, short, 4)
    whole = account.cache_bytes(layers, 1, 30, 4, block_size=1)
    assert whole == 30 * account.cache_bytes_per_token(layers, 4)
    assert whole > account.cache_bytes(layers, 1, 30, 4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length,block_size", [(1, 64), (64, 64), (65, 64), (130, 64), (7, 3)])
def test_paged_bytes_are_those_latent_cache_allocates(form, length, block_size):
    """REQUIREMENTS D27, C17: measured bytes, in whole pages."""
    layers = read_model(as_json(converted_config(form))).layers
    cache = LatentCache(layers, 3, length, dtype=torch.bfloat16, block_size=block_size)
    expected = account.cache_bytes(layers, 3, length, 2, block_size=block_size)
    assert cache.nbytes == expected
    assert sum(pages.numel() * 2 for pages in cache.pages) == expected


@pytest.mark.parametrize("form", ["equal-cache", "article"])
def test_d27_equal_cache_has_the_bytes_of_its_source(form):
    source = read_model({"model_type": "llama", **SIZES}).layers
    result = read_model(as_json(converted_config(form))).layers
    same = account.cache_bytes_per_token(source, 2)
    assert account.cache_bytes_per_token(result, 2) == same
    if form == "equal-cache":
        alike = account.as_equal_cache(source[0])
        assert alike == replace(result[0], q_bias=False, kv_bias=False)


def counted_flops(model: torch.nn.Module, ids: torch.Tensor, **options) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids, **options)
    return counter.get_total_flops()


def rotary_flops(model: torch.nn.Module, tokens: int) -> int:
    """Before 5.23 transformers forms the angles as a product of matrices; we leave them out."""
    return 2 * model.model.rotary_emb.inv_freq.numel() * tokens


@pytest.mark.parametrize("name", ["llama", "llama-biases-tied", "qwen2", "qwen3", "llama-mha"])
def test_decode_flops_are_those_torch_counts(name):
    config = toy_config(name)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    cache = filled(model, 9, 1)
    real = counted_flops(model, torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
    cost = account.decode_cost(spec_of(name), context=10, batch=1, weight_itemsize=4,
                               cache_itemsize=4)  # fmt: skip
    assert real - cost.flops in (0, rotary_flops(model, 1))


def test_a02_prefill_is_quadratic_in_length():
    """REQUIREMENTS A02 (and C13, D02): the attention part grows with the square, not faster."""
    spec = spec_of("llama")
    layer = spec.layers[0]

    def core(length: int) -> int:
        linear = account.prefill_flops(spec, 1) - per_pair
        head = 2 * spec.vocab_size * spec.hidden_size
        return account.prefill_flops(spec, length) - head - length * (linear - head)

    per_pair = 2 * layer.num_attention_heads * 2 * layer.head_dim * len(spec.layers)
    for length in (100, 10_000):
        assert core(length) == per_pair * length * (length + 1) // 2
    assert core(10_000) / core(100) == pytest.approx(100**2, rel=0.01)


def test_prefill_flops_are_those_torch_counts():
    config = toy_config("llama")
    config._attn_implementation = "eager"  # computes all S x S pairs, also those the mask removes
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    spec, length = spec_of("llama"), 12
    ids = torch.zeros(1, length, dtype=torch.long)
    real = counted_flops(model, ids, logits_to_keep=1)
    layer = spec.layers[0]
    per_pair = 2 * layer.num_attention_heads * 2 * layer.head_dim * len(spec.layers)
    masked = length * (length - 1) // 2
    ours = account.prefill_flops(spec, length) + masked * per_pair
    assert real - ours in (0, rotary_flops(model, length))


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_prefill_flops_of_native_latent_attention(name):
    config = toy_config(name)
    config._attn_implementation = "eager"
    config.first_k_dense_replace = config.num_hidden_layers  # routed experts count per backend
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    spec, length = read_model(as_json(config)), 6
    ids = torch.zeros(1, length, dtype=torch.long)
    real = counted_flops(model, ids, logits_to_keep=1)
    layer = spec.layers[0]
    per_pair = 2 * layer.num_attention_heads * (layer.head_dim + layer.value_dim)
    masked = length * (length - 1) // 2
    ours = account.prefill_flops(spec, length) + masked * per_pair * len(spec.layers)
    assert real - ours in (0, rotary_flops(model, length))


def test_a12_absorbed_attention_gains_bytes_not_flops():
    """REQUIREMENTS A12: scores run over C + R = 576 instead of d = 128; the bytes fall."""
    (mha,) = attention(4096, 32, 32, 1)
    mla = account.as_mla(mha, 512, 64)
    before, after = (account.attention_cost(layer, 4096, 2) for layer in (mha, mla))
    assert before.flops == 4096 * 2 * 32 * (128 + 128)
    assert after.flops == 4096 * (2 * 32 * (512 + 64) + 2 * 32 * 512)
    assert after.flops > 4 * before.flops
    assert after.cache_bytes == before.cache_bytes * 576 / 8192
    assert after.intensity > 50 * before.intensity


def test_flops_of_the_three_forms():
    layers = {form: read_model(as_json(converted_config(form))).layers[0] for form in FORMS}
    flops = {form: account.attention_cost(layer, 10, 2).flops for form, layer in layers.items()}
    assert flops["compress"] == 10 * 2 * 4 * (20 + 6 + 20)
    assert flops["equal-cache"] == 10 * 2 * 4 * (24 + 24)  # scores over the rope part alone
    assert flops["article"] == 10 * (2 * 4 * 24 + 2 * (2 * 48 * 24))  # every row expanded again


def test_intensity_of_deepseek_shape_is_near_the_ridge_of_a_hopper():
    """128 heads share each cached row: 2 H (2C + R) FLOPs per 2 (C + R) bytes."""
    layer = account.as_mla(attention(16384, 128, 128, 1)[0], 512, 64)
    cost = account.attention_cost(layer, 100_000, 2)
    assert cost.intensity == pytest.approx(128 * (2 * 512 + 64) / 576, rel=1e-4)
    hopper = (989e12, 3.35e12)
    assert cost.bound(*hopper) == "memory"
    assert replace(cost, flops=2 * cost.flops).bound(*hopper) == "compute"
    assert cost.seconds(*hopper) == cost.nbytes / 3.35e12
    assert cost.seconds(1.0, 1e30) == cost.flops


def test_bytes_moved_count_each_weight_once_per_step():
    spec = spec_of("llama")
    counted = account.parameters(spec)
    one = account.decode_cost(spec, 10, 1, 2, 2)
    row = spec.hidden_size * 2  # of the embedding table; the output matrix is read whole
    assert one.weight_bytes == 2 * (counted.total - counted.embedding) + row
    assert one.cache_bytes == 11 * account.cache_bytes_per_token(spec.layers, 2)
    many = account.decode_cost(spec, 10, 8, 2, 2)
    assert many.weight_bytes == pytest.approx((one.weight_bytes - row) / 8 + row)
    assert (many.flops, many.cache_bytes) == (one.flops, one.cache_bytes)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_bytes_moved_with_experts(name):
    spec = spec_of(name)
    counted = account.parameters(spec)
    one, crowd = (account.decode_cost(spec, 10, batch, 1, 1).weight_bytes for batch in (1, 10**6))
    assert one == counted.active - counted.embedding + spec.hidden_size
    assert crowd == pytest.approx((counted.total - counted.embedding) / 10**6 + spec.hidden_size)


@settings(max_examples=60, deadline=None)
@given(
    memory=st.integers(0, 10**7),
    weights=st.integers(0, 10**6),
    batch=st.integers(1, 5),
    itemsize=st.sampled_from([1, 2, 4]),
    name=st.sampled_from(["llama", "gemma2", "mistral", "deepseek_v3", "mistral-no-window"]),
    block_size=st.sampled_from([None, 1, 64]),
)
def test_d03_longest_context_is_the_last_that_fits(
    memory, weights, batch, itemsize, name, block_size
):
    """REQUIREMENTS D03."""
    layers = SPECS[name].layers

    def needed(length: int) -> int:
        return weights + account.cache_bytes(layers, batch, length, itemsize, block_size)

    longest = account.longest_context(layers, memory, weights, batch, itemsize, block_size)
    if longest is None:
        assert needed(10**12) <= memory
    elif longest == 0:
        assert needed(1) > memory
    else:
        assert needed(longest) <= memory < needed(longest + 1)


SPECS = {name: spec_of(name) for name in TOYS}


@given(
    name=st.sampled_from([n for n in TOYS if "deepseek" not in n]),
    rank=st.integers(1, 600),
    half=st.integers(1, 64),
)
def test_hypothetical_layers(name, rank, half):
    layer = SPECS[name].layers[0]
    mha, mqa = account.as_mha(layer), account.as_mqa(layer)
    assert mha.kind == "mha" and mqa.kind == "mqa"
    assert mha.cache_width == layer.num_attention_heads * mqa.cache_width
    assert mqa.cache_width <= layer.cache_width <= mha.cache_width
    mla = account.as_mla(layer, rank, 2 * half)
    assert mla.kind == "mla" and mla.cache_width == rank + 2 * half
    assert mla.softmax_scale == layer.softmax_scale
    assert account.as_mha(mla).cache_width == mha.cache_width
    assert account.as_equal_cache(layer).cache_width == layer.cache_width


def test_mha_of_native_latent_attention_keeps_its_head_sizes():
    layer = spec_of("deepseek_v3").layers[0]
    assert account.as_mha(layer).cache_width == 4 * (12 + 8 + 10)
    smaller = account.as_mla(layer, 10, 8)
    assert smaller.qk_nope_head_dim == 12 and smaller.q_lora_rank == 24


@pytest.mark.parametrize("rank,rope", [(0, 64), (512, 0), (512, 63), (-1, 2)])
def test_layers_that_cannot_be(rank, rope):
    with pytest.raises(UsageError, match=f"{rank} and qk_rope_head_dim {rope}"):
        account.as_mla(attention(64, 8, 4, 1)[0], rank, rope)


@pytest.mark.parametrize(
    "text,size",
    [("24GiB", 24 * 2**30), ("80GB", 80 * 10**9), ("512MiB", 2**29), ("1.5 kib", 1536),
     ("7", 7), ("7B", 7), (" 2TB ", 2 * 10**12), ("0.5GiB", 2**29)],
)  # fmt: skip
def test_sizes(text, size):
    assert account.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "24G", "24 gigabytes", "-1GB", "1e9", "1,5GB", "٣GB!"])
def test_sizes_that_are_none(text):
    with pytest.raises(UsageError, match="not a size in bytes") as caught:
        account.parse_bytes(text)
    assert "24GiB" in caught.value.remedy


@given(st.text(max_size=10))
def test_any_text_is_a_size_or_one_clear_error(text):
    try:
        assert account.parse_bytes(text) >= 0
    except UsageError as error:
        assert repr(text) in error.message
