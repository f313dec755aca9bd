"""Every implementation of mla_decode against float64."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decode_cases import GARBAGE, SIXTEEN_BITS, TOLERANCE, assert_close, problem
from mlakit.errors import UsageError
from mlakit.ops import CacheFormat, flash_mla_with_kvcache, get_mla_metadata
from mlakit.ops import cpu as cpu_path
from mlakit.ops.cache_format import QUANTISED

FAST = ["cpu", "torch"]
ON_CPU = [*FAST, "reference"]
HEADS = [
    (1, 1), (3, 1), (3, 3), (9, 1), (9, 3), (63, 1), (64, 1), (64, 2), (64, 8), (128, 1), (128, 2),
    (128, 8),
]  # fmt: skip


@pytest.mark.parametrize("queries", [1, 2, 4])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_flash_mla_dense_matrix(heads, kv_heads, queries):
    """FlashMLA's dense matrix at 576/512 in bfloat16, batches and contexts cut to CPU size."""
    random = torch.Generator().manual_seed(heads)
    for index, (context, varlen, causal) in enumerate(
        [(c, v, k) for c in (20, 140) for v in (False, True) for k in (False, True)]
    ):
        lengths = torch.full(
            ((1, 2, 6)[index % 3] if heads < 63 else 1 + index % 2,), float(context)
        )
        if varlen:
            lengths = torch.normal(lengths, context / 2, generator=random).clamp_min(queries)
        case = problem(
            lengths.int().tolist(), heads, kv_heads=kv_heads, queries=queries, causal=causal,
            dtype=torch.bfloat16, seed=index,
        )  # fmt: skip
        assert_close(case.decode(), case.run("reference"), **SIXTEEN_BITS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (63, 1), (128, 1)])
def test_flash_mla_dense_matrix_at_4096_tokens(heads, kv_heads, dtype):
    """The rest of FlashMLA's matrix: long contexts, and a large batch of which half is empty."""
    random = torch.Generator().manual_seed(heads)
    lengths = torch.normal(torch.full((2,), 4096.0), 2048.0, generator=random).clamp_min(4).int()
    for queries, causal in ((1, False), (2, True), (4, False), (4, True)):
        case = problem(
            lengths.tolist(), heads, kv_heads=kv_heads, queries=queries, causal=causal, dtype=dtype
        )
        assert_close(case.decode(), case.run("reference"), **SIXTEEN_BITS)
    if heads == 9:
        lengths = torch.normal(torch.full((128,), 300.0), 150.0, generator=random).clamp_min(2)
        lengths[torch.rand(128, generator=random) < 0.5] = 0
        case = problem(lengths.int().tolist(), heads, queries=2, dtype=dtype)
        assert_close(case.decode(), case.run("reference"), **SIXTEEN_BITS)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_long_ragged_and_empty_sequences(name, dtype):
    """Lengths around page and chunk borders; half of the batch empty, as in FlashMLA's tests."""
    lengths = [0, 1, 0, 511, 0, 512, 513, 0, 1100, 0]
    for causal in (False, True):
        case = problem(lengths, 4, queries=2, causal=causal, dtype=dtype)
        assert_close(case.run(name), case.run("reference"), **TOLERANCE[dtype])


@pytest.mark.parametrize("name", ON_CPU)
def test_rows_without_a_key(name):
    """Causal queries before the first key, and empty sequences: out 0 and lse +inf."""
    case = problem([0, 1, 3], 2, queries=3, rank=8, rope=4)
    out, lse = case.run(name)
    empty = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]], dtype=torch.bool)
    assert (out[empty] == 0).all()
    assert torch.equal(lse == math.inf, empty[:, None].expand_as(lse))


@pytest.mark.parametrize("name", FAST)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_rank_rope_page_and_head_count(name, data):
    rank, rope = data.draw(st.integers(1, 130)), data.draw(st.integers(0, 40))
    kv_heads = data.draw(st.sampled_from([1, 1, 2, 3]))
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    case = problem(
        data.draw(st.lists(st.integers(0, 90) | st.integers(500, 600), min_size=1, max_size=3)),
        kv_heads * data.draw(st.integers(1, 5)),
        kv_heads=kv_heads,
        queries=data.draw(st.integers(1, 4)),
        rank=rank,
        rope=rope,
        width=data.draw(st.none() | st.integers(1, rank + rope)),
        block_size=data.draw(st.sampled_from([16, 32, 64])),
        dtype=dtype,
        causal=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 9)),
    )
    assert_close(case.run(name), case.run("reference"), **TOLERANCE[dtype])


@pytest.mark.parametrize("name", FAST)
@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_windows_caps_and_ragged_queries(name, data):
    """Every mix of the features that FlashMLA does not have."""
    lengths = data.draw(st.lists(st.integers(0, 90) | st.integers(500, 1100), max_size=3))
    queries = [data.draw(st.integers(0, 5)) for _ in lengths]
    kv_heads = data.draw(st.sampled_from([1, 1, 2]))
    options = {
        "sliding_window": data.draw(st.none() | st.integers(1, 40) | st.integers(500, 700)),
        "soft_cap": data.draw(st.none() | st.sampled_from([0.02, 1.0, 50.0])),
        "batch_invariant": data.draw(st.booleans()),
    }
    case = problem(
        lengths, 3 * kv_heads, kv_heads=kv_heads, rank=24, rope=8,
        queries=queries if data.draw(st.booleans()) else data.draw(st.integers(1, 4)),
        block_size=data.draw(st.sampled_from([1, 16, 24, 64])),
        dtype=data.draw(st.sampled_from(list(TOLERANCE))),
        causal=True if options["sliding_window"] else data.draw(st.booleans()),
        softmax_scale=data.draw(st.sampled_from([0.2, 5.0])), seed=data.draw(st.integers(0, 9)),
        **options,
    )  # fmt: skip
    assert_close(case.run(name), case.run("reference"), **TOLERANCE[case.q.dtype])


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("name", FAST)
def test_features_on_quantised_pages(name, kind):
    case = problem(
        [600, 0, 70], 5, queries=[2, 1, 3], rank=40, rope=16, sliding_window=530, soft_cap=0.1
    )
    fmt = CacheFormat(kind, 40, 16)
    pages = fmt.allocate(*case.k_cache.shape[:2]).fill_(255)
    slots = torch.arange(pages.shape[0] * 64).view(-1, 64)
    used = ~case.k_cache[:, :, 0].isnan().any(-1)
    fmt.append(pages, slots[used], case.k_cache[:, :, 0][used])
    case = replace(case, k_cache=pages, options=case.options | {"cache_format": fmt})
    assert_close(case.run(name), case.run("reference"), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64])
def test_batch_invariance_bit_for_bit(dtype, queries):
    """A sequence alone, in company, and among packed neighbours."""
    case = problem(
        [700, 1, 0, 530], 9, queries=queries, rank=64, rope=16, dtype=dtype, batch_invariant=True
    )
    together = case.decode()
    for b in (0, 3):
        at = slice(b, b + 1)
        alone = replace(
            case, q=case.q[at], block_table=case.block_table[at],
            cache_seqlens=case.cache_seqlens[at],
        )  # fmt: skip
        for got, want in zip(alone.decode(), together):
            assert torch.equal(got, want[at])
    mixed = torch.zeros(2 * queries + 8, 9, 80, dtype=dtype)
    mixed[:queries] = case.q[0]
    starts = torch.tensor([0, queries, 2 * queries + 7, 2 * queries + 8], dtype=torch.int32)
    options = {"cu_seqlens_q": starts, "max_seqlen_q": queries + 9}
    some = replace(
        case, q=mixed, block_table=case.block_table[[0, 3, 1]],
        cache_seqlens=case.cache_seqlens[[0, 3, 1]], options=case.options | options,
    )  # fmt: skip
    out, lse = some.decode()
    assert torch.equal(out[:queries], together[0][0])
    assert torch.equal(lse[:, :queries], together[1][0])


@pytest.mark.parametrize("name", FAST)
def test_scores_over_the_rope_columns_alone(name):
    """Equal-cache mode: values from the first C columns, scores over the last R, nothing shared."""
    case = problem([70, 5], 4, rank=32, rope=32, width=32)
    rows = case.k_cache[case.block_table[1, 0].item(), :5, 0].double()
    scores = torch.einsum("hw,tw->ht", case.q[1, 0].double(), rows[:, 32:])
    scores = scores * case.options["softmax_scale"]
    want = torch.softmax(scores, -1) @ rows[:, :32]
    # float32 arithmetic against float64, as at TOLERANCE
    torch.testing.assert_close(case.run(name)[0][1, 0].double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAST)
def test_pages_side_by_side_equal_pages_apart(name):
    """Neighbouring pages take a path without copies on the CPU; the numbers are the same."""
    case = problem([600, 130], 3, rank=40, rope=8, block_size=16)
    pages = torch.cat([case.block_table[0, :38], case.block_table[1, :9]]).long()
    table = torch.full_like(case.block_table, GARBAGE)
    table[0, :38], table[1, :9] = torch.arange(38), torch.arange(38, 47)
    together = replace(case, k_cache=case.k_cache[pages], block_table=table)
    for got, want in zip(together.run(name), case.run(name)):
        # float32 rounding: the same rows, perhaps summed in another order
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ON_CPU)
def test_empty_batch(name):
    case = problem([], 2, rank=8, rope=4)
    out, lse = case.run(name)
    assert out.shape == (0, 1, 2, 8) and lse.shape == (0, 2, 1)


def test_float64_is_computed_in_float64():
    case = problem([70, 9], 3, rank=20, rope=4)
    case = replace(case, q=case.q.double(), k_cache=case.k_cache.double())
    assert case.decode()[0].dtype == torch.float64
    # float64 rounding, 2^-53, of some hundred products
    torch.testing.assert_close(case.decode()[0], case.run("reference")[0], atol=1e-14, rtol=1e-12)


def test_three_runs_agree_bit_for_bit():
    case = problem([700, 3, 64], 9, queries=2, dtype=torch.bfloat16)
    first, second, third = (case.decode() for _ in range(3))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, third))


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("heads", [1, 20])
def test_bfloat16_products_or_widened_ones(monkeypatch, native, heads):
    """With scores of up to 60, whose rounding to bfloat16 would change weights by a tenth."""
    monkeypatch.setattr(cpu_path, "_multiplies_bfloat16", lambda: native)
    case = problem(
        [600, 0, 1100], heads, queries=2, rank=64, rope=16, dtype=torch.bfloat16, softmax_scale=90.0
    )
    assert case.run("reference")[1].nan_to_num(posinf=0).abs().max() > 30
    assert_close(case.run("cpu"), case.run("reference"), **SIXTEEN_BITS)


@pytest.mark.parametrize("name", FAST)
def test_autocast_does_not_reach_inside(monkeypatch, name):
    monkeypatch.setenv("MLAKIT_KERNEL", name)
    case = problem([130, 600], 5, rank=64, rope=16)
    want = case.decode()
    with torch.autocast("cpu", torch.bfloat16):
        got = case.decode()
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_operator_declares_what_it_does():
    """torch's own checks of schema, fake kernel, autograd registration and tracing."""
    case = problem([70, 5], 2, queries=2, rank=16, rope=8)
    torch.library.opcheck(torch.ops.mlakit.mla_decode.default, case.call.flat())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_graph_breaks(backend):
    case = problem([70, 5], 2, queries=2, rank=16, rope=8)

    def step(q, k_cache, block_table, cache_seqlens):
        schedule, splits = get_mla_metadata()
        return flash_mla_with_kvcache(
            q * 1.0, k_cache, block_table, cache_seqlens, 16, schedule, splits, causal=True
        )

    tensors = case.args[:4]
    torch._dynamo.reset()
    got = torch.compile(step, fullgraph=True, backend=backend)(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(got, step(*tensors)))


def test_backward_is_refused():
    case = problem([5], 2, rank=16, rope=8)
    case.q.requires_grad_()
    with pytest.raises(RuntimeError, match="no autograd formula"):
        case.decode()[0].sum().backward()


REFUSED = {
    "q has shape": lambda p: replace(p, q=p.q[0]),
    "k_cache has shape": lambda p: replace(p, k_cache=p.k_cache[:, :, 0]),
    "q is torch.bfloat16 and k_cache is torch.float32": lambda p: replace(p, q=p.q.bfloat16()),
    "and is torch.int32; it should be": lambda p: replace(p, q=p.q.int(), k_cache=p.k_cache.int()),
    "divisible by kv heads": lambda p: replace(p, k_cache=p.k_cache.repeat(1, 1, 2, 1)),
    "q should have 1 to 24 columns": lambda p: replace(p, q=p.q.repeat(1, 1, 1, 2)),
    "kv_lora_rank is 25": lambda p: replace(p, kv_lora_rank=25),
    "kv_lora_rank is 0": lambda p: replace(p, kv_lora_rank=0),
    "block_table has shape": lambda p: replace(p, block_table=p.block_table[:1]),
    "cache_seqlens has shape": lambda p: replace(p, cache_seqlens=p.cache_seqlens[:1]),
    "block_table is torch.int64": lambda p: replace(p, block_table=p.block_table.long()),
    "cache_seqlens is torch.int64": lambda p: replace(p, cache_seqlens=p.cache_seqlens.long()),
    "cache_seqlens is on meta": lambda p: replace(p, cache_seqlens=p.cache_seqlens.to("meta")),
    "q is not contiguous": lambda p: replace(p, q=p.q.mT.contiguous().mT),
    r"cache_seqlens\[0\] is 999": lambda p: replace(p, cache_seqlens=p.cache_seqlens + 929),
    r"cache_seqlens\[0\] is -1": lambda p: replace(p, cache_seqlens=p.cache_seqlens - 71),
    r"block_table\[0\] uses pages": lambda p: replace(p, block_table=p.block_table + 100),
    "sliding_window is 0": lambda p: replace(p, options=p.options | {"sliding_window": 0}),
    "causal False; a window": lambda p: replace(
        p, options=p.options | {"sliding_window": 4, "causal": False}
    ),
    "soft_cap is -1": lambda p: replace(p, options=p.options | {"soft_cap": -1.0}),
    "come together": lambda p: replace(p, options=p.options | {"max_seqlen_q": 2}),
    r"should be \[N, H, W\] beside": lambda p: replace(packed(p, [0, 1, 2]), q=p.q),
    "cu_seqlens_q is torch.int64": lambda p: packed(p, [0, 1, 2], dtype=torch.int64),
    "block_table has shape .*; it should be .3,": lambda p: packed(p, [0, 1, 2, 2]),
    r"should rise from 0 to the 2 queries": lambda p: packed(p, [0, 1, 3]),
    "by at most max_seqlen_q, 1": lambda p: packed(p, [0, 2, 2]),
}


def packed(p, starts, *, dtype=torch.int32, most=1):
    options = {"cu_seqlens_q": torch.tensor(starts, dtype=dtype), "max_seqlen_q": most}
    return replace(p, q=p.q[:, 0], options=p.options | options)


@pytest.mark.parametrize("message", REFUSED)
def test_refused_inputs(message):
    case = problem([70, 71], 3, rank=16, rope=8)
    with pytest.raises(UsageError, match=message):
        REFUSED[message](case).decode()


def test_ops_imports_torch_alone():
    code = (
        "import sys\nfrom mlakit.ops import *\nassert mla_decode\n"
        "print([m for m in ('transformers', 'triton') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
