"""The Triton path against float64, on a GPU or, started by test_triton.py, in the interpreter.

Unused cache rows hold NaN and unused table entries a page that no cache has, see test_ops.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mlakit.ops import triton_decode
from test_ops import SIXTEEN_BITS, TOLERANCE, assert_close, problem

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
    device = "cpu" if INTERPRETED else "cuda"
    arguments = [a.to(device) if isinstance(a, torch.Tensor) else a for a in case.args]
    out, lse = triton_decode.decode(*arguments)
    return out.cpu(), lse.cpu()


def check(*arguments, **keywords):
    case = problem(*arguments, **keywords)
    assert_close(run(case), case.run("reference"), **TOLERANCE[case.q.dtype])


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
    monkeypatch.setattr(triton_decode, "PLAN_BLOCK", 4)
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


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "hip"])
@pytest.mark.parametrize("heads", [3, 20, 64])
def test_tiles_of_other_targets(monkeypatch, target, heads):
    if not INTERPRETED:
        pytest.skip("a tile is for its own GPU")
    monkeypatch.setattr(triton_decode, "_device", lambda device: (target, 3))
    check([130, 20, 0], heads, rank=512, rope=64, dtype=BF16)


@pytest.mark.slow
@pytest.mark.parametrize("queries", [1, 2, 4])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (9, 3), (63, 1), (128, 1), (128, 8)])
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
