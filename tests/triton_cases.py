"""The Triton path against float64, on a GPU or, started by test_triton.py, in the interpreter.

Unused cache rows hold NaN and unused table entries a page that no cache has, see test_ops.
"""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
import torch

from decode_cases import GARBAGE, SIXTEEN_BITS, TOLERANCE, assert_close, problem
from mlakit.ops import CacheFormat, reference, triton_decode, triton_tiles
from mlakit.ops.call import Selection, SparseCall

INTERPRETED = triton_decode.triton.knobs.runtime.interpret


@pytest.fixture(autouse=True)
def bfloat16_as_on_a_gpu(monkeypatch):
    """Triton's interpreter multiplies bfloat16's raw bits and rounds to bfloat16 towards zero."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    language, handle = interpreter.tl, interpreter.TensorHandle
    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def widened(value):
        if value.dtype.scalar != language.bfloat16:
            return value
        return handle((value.data.astype("uint32") << 16).view("float32"), language.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def cast_impl(self, value, dtype):
        pair = (value.dtype.scalar, dtype.scalar)
        if pair == (language.bfloat16, language.float32):
            return widened(value)
        if pair == (language.float32, language.bfloat16):
            bits = np.ascontiguousarray(value.data).view("uint32")
            nearest_even = bits + 0x7FFF + ((bits >> 16) & 1)
            return handle((nearest_even >> 16).astype("uint16"), language.bfloat16)
        return cast(self, value, dtype)

    monkeypatch.setattr(builder, "create_dot", create_dot)
    monkeypatch.setattr(builder, "cast_impl", cast_impl)


def run(case):
    """``triton_decode.decode`` of a problem, on the GPU where there is one; result on the CPU."""
    out, lse = triton_decode.decode(on_device(case.call))
    return case.shaped(out.cpu(), lse.cpu())


def on_device(value):
    """Tensors in a call, or in parts of one, on the GPU where there is one."""
    if isinstance(value, torch.Tensor):
        return value if INTERPRETED else value.cuda()
    if isinstance(value, tuple):
        moved = (on_device(item) for item in value)
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    if is_dataclass(value) and not isinstance(value, CacheFormat):
        return replace(value, **{f.name: on_device(getattr(value, f.name)) for f in fields(value)})
    return value


def check(*arguments, **keywords):
    case = problem(*arguments, **keywords)
    assert_close(run(case), case.run("reference"), **TOLERANCE[case.q.dtype])


def quantised(case, cache_format):
    """The problem with its cache in another format; what it does not use is 0xFF bytes."""
    blocks, block_size = case.k_cache.shape[:2]
    pages = cache_format.allocate(blocks, block_size)
    torch.empty(0, dtype=torch.uint8).set_(pages.untyped_storage()).fill_(255)
    rows = case.k_cache.flatten(0, 2)
    slots = (~rows.isnan().any(1)).nonzero()[:, 0]
    cache_format.append(pages, slots, rows[slots].float())
    return replace(case, k_cache=pages, options={**case.options, "cache_format": cache_format})


def selected(
    cache_format, topks, heads, *, dtype, queries=3, tokens=90, page=16, counts=None, width=None,
    rank=None, invariant=False, seed=0,
):  # fmt: skip
    """A sparse call: per cache, ``topks`` rows of each query, some -1; unused memory 0xFF."""
    generator = torch.Generator().manual_seed(seed)
    selections = []
    for topk in topks:
        pages = cache_format.allocate(-(-tokens // page), page)
        torch.empty(0, dtype=torch.uint8).set_(pages.untyped_storage()).fill_(255)
        slots = torch.randint(0, tokens, (queries, topk), generator=generator, dtype=torch.int32)
        used = slots.unique()
        values = torch.randn(len(used), cache_format.width, generator=generator) / 10
        cache_format.append(pages, used, values.clamp(-1, 1))
        slots[torch.rand(slots.shape, generator=generator) < 0.1] = -1
        slots[torch.rand(slots.shape, generator=generator) < 0.05] = GARBAGE
        some = torch.tensor([topk, *(counts or [topk])] * queries, dtype=torch.int32)[:queries]
        past = torch.arange(topk) >= some[:, None]
        slots[past] = torch.randint(
            -(1 << 31), 1 << 31, (int(past.sum()),), dtype=torch.int64
        ).int()
        selections.append(Selection(pages, cache_format, slots, some))
        page += 5
    q = torch.randn(queries, heads, width or cache_format.width, generator=generator) / 10
    return SparseCall(
        q.clamp(-1, 1).to(dtype),
        tuple(selections),
        rank or cache_format.kv_lora_rank,
        0.1,
        invariant,
    )


def run_selected(call):
    parts = triton_decode.decode_selected(on_device(call))
    if all(part.numel() for part in parts):  # torch refuses an operator whose results share memory
        assert len({part.untyped_storage().data_ptr() for part in parts}) == 3
    return [part.cpu() for part in parts]


def check_selected(call):
    """Output and lse as FlashMLA's test has them, and the largest score as closely as lse."""
    out, lse, top = run_selected(call)
    want, true_lse, true_top = reference.decode_selected(call)
    tolerance = SPARSE if call.q.dtype != torch.float32 else TOLERANCE[torch.float32]
    assert_close((out, lse), (want, true_lse), **tolerance)
    none = true_top == -math.inf
    assert torch.equal(top == -math.inf, none)
    # a score rounds as lse does, whose tolerance is relative to a number of about its size
    size = 1 + true_lse[~none].abs()
    assert ((top[~none] - true_top[~none]).abs() < tolerance["lse_relative"] * size).all()


# FlashMLA's tests, sparse decode.
SPARSE = {"absolute": 1e-3, "relative": 2.01 / 128, "cosine": 5e-6, "lse_relative": 8.01 / 65536}
FORMATS = {
    "fp8": CacheFormat("fp8", 512, 64),
    "model1": CacheFormat("model1", 448, 64),
    "int8": CacheFormat("int8", 512, 64),
    "int4": CacheFormat("int4", 512, 64),
    "fp8 small, odd group": CacheFormat("fp8", 40, 8, 12),
    "model1 small": CacheFormat("model1", 70, 24, 32),
    "int8 small": CacheFormat("int8", 37, 0, 16),
    "int4 small": CacheFormat("int4", 21, 10, 8),
}
BF16 = torch.bfloat16


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("causal", [False, True])
def test_deepseek_shape(dtype, causal):
    """512 + 64: cut sequences, empty ones, nine heads, two queries, one of them without a key."""
    check([140, 0, 1, 64], 9, queries=2, dtype=dtype, causal=causal)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (16, 2), (40, 1), (128, 2)])
def test_heads(heads, kv_heads):
    check([70, 33], heads, kv_heads=kv_heads, queries=2, rank=64, rope=16, dtype=BF16)


@pytest.mark.parametrize(
    ("rank", "rope"),
    [(256, 32), (256, 64), (448, 128), (128, 16), (128, 0), (24, 8), (5, 2), (1, 0), (7, 200)],
)
def test_ranks(rank, rope):
    check([70, 33], 4, rank=rank, rope=rope, dtype=BF16)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("block_size", [16, 32, 48, 64, 1, 24])
def test_pages(block_size, dtype):
    check([70, 33, 0], 3, queries=2, rank=32, rope=16, block_size=block_size, dtype=dtype)


@pytest.mark.parametrize(
    ("rank", "rope", "width"),
    [(32, 32, 32), (64, 64, 64), (24, 40, 40), (1100, 64, 64), (600, 64, None), (40, 8, 20),
     (1024, 1024, 1024)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_keys_and_values_apart(rank, rope, width, dtype):
    """Scores over the last columns only, and values wider than one program holds."""
    check([70, 5], 3, rank=rank, rope=rope, width=width, dtype=dtype)


def test_rows_without_a_key():
    case = problem([0, 1, 3], 2, queries=3, rank=8, rope=4)
    out, lse = run(case)
    empty = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]], dtype=torch.bool)
    assert (out[empty] == 0).all()
    assert torch.equal(lse == math.inf, empty[:, None].expand_as(lse))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_nothing_to_attend_to(lengths):
    out, lse = run(problem(lengths, 2, rank=8, rope=4))
    assert out.shape == (len(lengths), 1, 2, 8) and (out == 0).all() and (lse == math.inf).all()


def test_strided_tensors():
    """q cut out of a wider tensor, a cache of every other page, a transposed table."""
    case = problem([70, 33], 4, queries=2, rank=32, rope=16, dtype=torch.float16)
    q = torch.cat([case.q, case.q], -1)[..., : case.q.shape[-1]]
    cache = torch.stack([case.k_cache, case.k_cache], 1)[:, 0]
    table = case.block_table.T.contiguous().T
    seqlens = torch.stack([case.cache_seqlens, case.cache_seqlens], 1)[:, 0]
    strided = replace(case, q=q, k_cache=cache, block_table=table, cache_seqlens=seqlens)
    for got, want in zip(run(strided), run(case)):
        assert torch.equal(got, want)


def test_more_splits_than_the_join_reads_at_once(monkeypatch):
    monkeypatch.setattr(triton_decode, "COMBINE_ITEMS", 2)
    check([200, 3], 2, rank=16, rope=16, dtype=torch.float16)


def test_batch_larger_than_the_plan_reads_at_once(monkeypatch):
    monkeypatch.setattr(triton_decode, "PLAN_LANES", 4)
    check([5, 0, 33, 1, 7, 70, 2, 64, 9], 1, rank=16, rope=16, dtype=torch.float16)


def test_lengths_outside_of_the_table_touch_nothing_else():
    """A length above the table's room counts as all of it, a negative one as 0."""
    case = problem([64, 64], 2, rank=16, rope=16, causal=False, dtype=torch.float16)
    case = replace(case, block_table=case.block_table[:, :1])
    out, lse = run(replace(case, cache_seqlens=torch.tensor([900, -3], dtype=torch.int32)))
    want = run(case)
    assert torch.equal(out[0], want[0][0]) and torch.equal(lse[0], want[1][0])
    assert (out[1] == 0).all() and (lse[1] == math.inf).all()


def test_three_runs_agree_bit_for_bit():
    case = problem([300, 3, 64], 9, queries=2, dtype=BF16)
    first, second, third = (run(case) for _ in range(3))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, third))


@pytest.mark.parametrize("heads", [3, 48])
@pytest.mark.parametrize("target", ["sm_89", "sm_90", "hip"])
def test_tiles_of_other_targets(monkeypatch, target, heads):
    if not INTERPRETED:
        pytest.skip("a tile is for its own GPU")
    monkeypatch.setattr(triton_decode, "_device", lambda device: (target, 3))
    monkeypatch.setattr(triton_tiles, "WIDE", True)
    case = problem([130, 20, 0], heads, rank=512, rope=64, dtype=BF16)
    assert_close(run(case), case.run("reference"), **SIXTEEN_BITS)
    case = quantised(case, FORMATS["fp8"])
    assert_close(run(case), case.run("reference"), **SIXTEEN_BITS)


FEATURES = [
    {"sliding_window": 1},
    {"sliding_window": 40, "soft_cap": 0.05, "softmax_scale": 1.0},
    {"soft_cap": 30.0, "softmax_scale": 60.0, "causal": False},
    {"queries": [3, 0, 1, 2], "max_seqlen_q": 5},
    {"queries": [1, 4, 0, 2], "sliding_window": 33, "soft_cap": 2.0, "batch_invariant": True},
    {"queries": [2, 1, 3, 1], "causal": False, "softmax_scale": -0.5},
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("features", FEATURES)
def test_features(features, dtype):
    """Windows, caps far from linear, ragged queries, negative scales, in pairs; grouped heads."""
    options = {"queries": 2, **features}
    check([150, 3, 0, 70], 6, kv_heads=2, rank=32, rope=16, block_size=16, dtype=dtype, **options)


def test_soft_cap_keeps_small_scores():
    """tanh(x) is x to float32's last places where x is small, and +-1 where it is large."""
    case = problem([90], 3, rank=32, rope=16, soft_cap=1e4, softmax_scale=1.0)
    plain = replace(case, options={"softmax_scale": 1.0})
    # the cap changes a score below 1 by x^3 / 3 / cap^2, 3e-9 at most
    for got, want in zip(run(case), plain.run("reference")):
        torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=1e-5)
    check([90], 3, rank=32, rope=16, soft_cap=0.5, softmax_scale=100.0)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_quantised_caches(kind, dtype):
    """Dequantised to q's dtype: exact for e4m3 with scales that are powers of two, else rounded."""
    fmt = FORMATS[kind]
    case = problem(
        [70, 0, 33], 5, queries=2, rank=fmt.kv_lora_rank, rope=fmt.qk_rope_head_dim,
        block_size=48 if "small" in kind else 64, dtype=dtype,
    )  # fmt: skip
    case = quantised(case, fmt)
    assert_close(run(case), case.run("reference"), **TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("kind", "rank", "rope", "value", "width"),
    [
        ("model1", 448, 64, 512, None),
        ("model1", 70, 24, 94, None),
        ("fp8", 64, 32, 50, None),
        ("fp8", 64, 32, 80, 40),
        ("int4", 96, 64, 130, 20),
        ("int8", 600, 40, 600, 40),
        ("fp8", 600, 40, 640, None),
    ],
)
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_quantised_values_and_keys_of_any_part(kind, rank, rope, value, width, dtype):
    """Values that include the rope part or leave out some of the latent; scores over any end."""
    case = problem([70, 21], 3, rank=rank, rope=rope, width=width, dtype=dtype)
    case = replace(quantised(case, CacheFormat(kind, rank, rope)), kv_lora_rank=value)
    assert_close(run(case), case.run("reference"), **TOLERANCE[dtype])


def test_quantised_pages_apart():
    """A page stride above the page's bytes, as FlashMLA's tests have it, and ragged windows."""
    fmt = CacheFormat("fp8", 64, 16)
    case = quantised(
        problem([70, 33], 3, rank=64, rope=16, queries=[2, 1], sliding_window=20, dtype=BF16), fmt
    )
    blocks, page, _, row = case.k_cache.shape
    wide = torch.full((blocks, page + 3, 1, row), 255, dtype=torch.uint8)
    wide[:, :page] = case.k_cache
    apart = replace(case, k_cache=wide[:, :page])
    assert all(torch.equal(a, b) for a, b in zip(run(apart), run(case)))


@pytest.mark.parametrize("kind", [None, "fp8", "int4"])
def test_batch_invariance(kind):
    """The same bits alone, in company, beside other neighbours, under another max_seqlen_q."""
    options = {"rank": 64, "rope": 16, "dtype": BF16, "batch_invariant": True}
    case = problem([1300, 90, 600, 2], 6, queries=[1, 3, 2, 1], **options)
    if kind:
        case = quantised(case, CacheFormat(kind, 64, 16))
    call = case.call
    starts = call.query_starts()
    together = triton_decode.decode(on_device(call))
    wider = triton_decode.decode(on_device(replace(call, max_seqlen_q=7)))
    for b in range(4):
        part = slice(starts[b], starts[b + 1])
        alone = replace(
            call, q=call.q[part], block_table=call.block_table[b : b + 1, :21],
            cache_seqlens=call.cache_seqlens[b : b + 1], cu_seqlens_q=None,
            max_seqlen_q=starts[b + 1] - starts[b],
        )  # fmt: skip
        alone = triton_decode.decode(on_device(alone))
        for got, one, other in zip(alone, together, wider):
            assert torch.equal(got, one[part]) and torch.equal(got, other[part])
    assert_close(case.shaped(*(x.cpu() for x in together)), case.run("reference"), **SIXTEEN_BITS)


@pytest.mark.parametrize("kind", ["bf16", *FORMATS])
def test_selected_rows(kind):
    """Counts, invalid and garbage slots, no row at all; two caches of two page sizes; one alone."""
    plain = CacheFormat("bf16", 512, 64)
    fmt = FORMATS.get(kind, plain)
    rank = 512 if kind == "model1" else None
    options = {"dtype": BF16, "rank": rank}
    check_selected(selected(fmt, [70, 40], 9, counts=[0, 33], **options))
    check_selected(selected(fmt, [200], 5, queries=1, counts=[0], **options))


@pytest.mark.parametrize("kind", ["fp32", "fp16", "fp8", "int4"])
def test_selected_rows_of_other_shapes(kind):
    """float32 and float16, scores over the last columns only, many queries and no split."""
    dtype = torch.float16 if kind == "fp16" else torch.float32
    fmt = CacheFormat(kind, 40, 24)
    check_selected(selected(fmt, [70, 33], 3, dtype=dtype, width=30, counts=[0, 5]))
    check_selected(selected(fmt, [20], 2, dtype=dtype, queries=14, page=1, rank=50))
    check_selected(selected(fmt, [0], 2, dtype=dtype))


def test_selected_rows_do_not_depend_on_neighbours():
    call = selected(
        CacheFormat("fp8", 64, 16), [1300], 6, dtype=BF16, tokens=400, counts=[90, 700],
        invariant=True,
    )  # fmt: skip
    check_selected(call)
    together, again = run_selected(call), run_selected(call)
    pages, fmt, slots, counts = call.selections[0]
    for n in range(3):
        one = Selection(pages, fmt, slots[n : n + 1], counts[n : n + 1])
        alone = run_selected(replace(call, q=call.q[n : n + 1], selections=(one,)))
        for got, all_of_them, twice in zip(alone, together, again):
            assert torch.equal(got[0], all_of_them[n]) and torch.equal(got[0], twice[n])


def test_what_is_refused():
    fmt = CacheFormat("fp8", 64, 16)
    call = selected(fmt, [4, 4], 2, dtype=BF16)
    assert triton_decode.why_not(call) == ""
    first, second = call.selections
    other = second._replace(cache_format=CacheFormat("fp8", 64, 16, 32))
    assert "formats" in triton_decode.why_not(replace(call, selections=(first, other)))
    case = quantised(problem([9], 1, rank=64, rope=16, dtype=BF16), fmt)
    apart = torch.zeros(3, case.k_cache[0].numel() + 2, dtype=torch.uint8)
    apart = apart[:, :-2].view(3, *case.k_cache.shape[1:])
    assert "multiples of 4" in triton_decode.why_not(replace(case, k_cache=apart).call)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "tokens", "topk", "page"),
    [("fp8", 512, 64, 2), ("model1", 512, 64, 69), ("bf16", 1024, 300, 61), ("fp8", 2046, 99, 576)],
)
def test_flash_mla_sparse_matrix(kind, tokens, topk, page):
    """FlashMLA's shapes, with fewer queries and rows."""
    fmt = FORMATS.get(kind, CacheFormat("bf16", 512, 64))
    heads = 128 if page == 69 else 64
    check_selected(
        selected(fmt, [topk], heads, dtype=BF16, queries=2, tokens=tokens, page=page, rank=512)
    )


@pytest.mark.slow
@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (9, 3), (63, 1), (128, 8)])
def test_flash_mla_dense_matrix(heads, kv_heads, queries):
    random = torch.Generator().manual_seed(heads)
    for context, varlen, causal in [(20, True, True), (140, True, False), (140, False, True)]:
        lengths = torch.full((2,), float(context))
        if varlen:
            lengths = torch.normal(lengths, context / 2, generator=random).clamp_min(queries)
        case = problem(
            lengths.int().tolist(), heads, kv_heads=kv_heads, queries=queries, causal=causal,
            dtype=BF16,
        )  # fmt: skip
        assert_close(run(case), case.run("reference"), **SIXTEEN_BITS)
