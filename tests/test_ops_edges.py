"""Calls that nobody should make, and that somebody will: the operators stay right, or say why not.

FlashMLA's and the ordinary cases are in test_ops.py, test_flash_mla.py and test_sparse.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from decode_cases import THIRTY_TWO_BITS, TOLERANCE, assert_close, problem
from mlakit.errors import UsageError
from mlakit.ops import (
    CacheFormat,
    flash_mla_with_kvcache,
    get_mla_metadata,
    mla_decode,
    mla_sparse_decode,
)

ON_CPU = ["cpu", "torch", "reference"]


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"cache_seqlens\[1\] is -3", {"cache_seqlens": [5, -3]}),
        (r"cache_seqlens\[1\] is 9999", {"cache_seqlens": [5, 9999]}),
        (r"block_table\[1\] uses pages -1", {"block_table": [[0], [-1]]}),
        (r"block_table\[0\] uses pages 2000", {"block_table": [[2000], [0]]}),
        ("by at most max_seqlen_q, 3", {"cu_seqlens_q": [0, 2, 6]}),
        ("rise from 0 to the 6 queries", {"cu_seqlens_q": [0, 3, 5]}),
        ("rise from 0 to the 6 queries", {"cu_seqlens_q": [0, 8, 6]}),
    ],
)
def test_values_that_point_outside_are_refused(name, message, change):
    """By every implementation: on the CPU the values are at hand."""
    case = problem([5, 9], 3, queries=[3, 3], rank=8, rope=4)
    change = {key: torch.tensor(value, dtype=torch.int32) for key, value in change.items()}
    options = case.options | {key: change.pop(key) for key in ["cu_seqlens_q"] if key in change}
    with pytest.raises(UsageError, match=message):
        replace(case, options=options, **change).run(name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("heads", [1, 3])
def test_batch_invariance_wherever_a_matrix_begins(dtype, heads):
    """One head is a product of a vector, which the library sums by how its memory is aligned."""
    queries = [1, 2, 0, 1, 3]
    case = problem(
        [700, 130, 9, 530, 65], heads, queries=queries, rank=70, rope=7, dtype=dtype,
        batch_invariant=True,
    )  # fmt: skip
    out, lse = case.decode()
    starts = case.options["cu_seqlens_q"].tolist()
    for b, count in enumerate(queries):
        at = slice(starts[b], starts[b + 1])
        for most in (max(1, count), 9):  # a larger max_seqlen_q changes nothing either
            own = {
                "cu_seqlens_q": torch.tensor([0, count], dtype=torch.int32),
                "max_seqlen_q": most,
            }
            alone = replace(
                case, q=case.q[at].clone(), block_table=case.block_table[b : b + 1],
                cache_seqlens=case.cache_seqlens[b : b + 1], options=case.options | own,
            ).decode()  # fmt: skip
            assert torch.equal(alone[0], out[at]) and torch.equal(alone[1], lse[:, at])


@pytest.mark.parametrize("kind", [None, "fp8", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_batch_invariance_of_selected_rows(dtype, kind):
    """Ninety queries of 600 rows are more than the path for float64 takes at once."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(320, 77, generator=generator)
    fmt = CacheFormat(kind, 70, 7) if kind else None
    pages = rows.view(20, 16, 1, 77).to(dtype)
    if fmt:
        pages = fmt.allocate(20, 16)
        fmt.append(pages, torch.arange(320), rows)
    q = torch.randn(90, 1, 1, 77, generator=generator).to(dtype)
    indices = torch.randint(-1, 320, (90, 1, 600), generator=generator, dtype=torch.int32)
    options = {"softmax_scale": 0.1, "cache_format": fmt, "batch_invariant": True}
    together = mla_sparse_decode(q, pages, indices, 70, **options)
    for n in (0, 7, 89):
        at = slice(n, n + 1)
        alone = mla_sparse_decode(q[at].clone(), pages, indices[at], 70, **options)
        assert all(torch.equal(one, all_[at]) for one, all_ in zip(alone, together))


@pytest.mark.parametrize("name", ["cpu", "torch"])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("softmax_scale", [1e6, 1e32, 1e36, -1e30, 0.0])
def test_scores_of_any_size(name, queries, softmax_scale):
    case = problem([5, 600], 3, queries=queries, rank=8, rope=4, softmax_scale=softmax_scale)
    assert_close(case.run(name), case.run("reference"), **THIRTY_TWO_BITS)


@pytest.mark.parametrize("name", ["cpu", "torch"])
@pytest.mark.parametrize("options", [{"soft_cap": 1e-30}, {"sliding_window": 2**40}])
def test_features_at_their_ends(name, options):
    case = problem([5, 600], 3, queries=2, rank=8, rope=4, **options)
    assert_close(case.run(name), case.run("reference"), **THIRTY_TWO_BITS)


def test_a_cap_that_is_none_is_refused():
    for cap in (0.0, float("inf"), float("nan")):
        with pytest.raises(UsageError, match="soft_cap is"):
            problem([5], 3, rank=8, rope=4, soft_cap=cap).decode()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_one_token_expanded_to_a_cache(dtype):
    """A stride of 0, over queries, heads, pages or the tokens of a page, is a stride."""
    case = problem([5, 600], 3, queries=2, rank=12, rope=4, dtype=dtype)
    full = case.k_cache.nan_to_num(0.5)
    q = case.q[:, :1, :1].expand_as(case.q)
    indices = torch.arange(0, full.shape[0] * 64, 37, dtype=torch.int32).expand(2, 2, -1)
    for cache in (full[:1].expand_as(full), full[:, :1].expand_as(full)):
        expanded = replace(case, q=q, k_cache=cache)
        for name in ("cpu", "torch"):
            assert_close(expanded.run(name), expanded.run("reference"), **TOLERANCE[dtype])
        got = mla_sparse_decode(q, cache, indices, 12, softmax_scale=1.0)
        want = mla_sparse_decode(q, cache.contiguous(), indices, 12, softmax_scale=1.0)
        assert all(torch.equal(*pair) for pair in zip(got, want))


def test_append_takes_tensors_of_one_device():
    """Values of another device would go nowhere, in silence where that device is meta."""
    fmt = CacheFormat("fp8", 16, 8)
    pages, slots, rows = fmt.allocate(4, 16), torch.arange(3), torch.ones(3, 24)
    for tensors in ((slots.to("meta"), rows), (slots, rows.to("meta"))):
        with pytest.raises(UsageError, match="all should be on one device"):
            fmt.append(pages, *tensors)


def test_selections_of_no_sequence():
    nothing = torch.zeros(0, 2, 5, dtype=torch.int32)
    out, lse, top = mla_sparse_decode(
        torch.zeros(0, 2, 3, 16), torch.zeros(2, 4, 1, 16), nothing, 8, softmax_scale=1.0,
        topk_length=nothing[:, 0, 0],
    )  # fmt: skip
    assert out.shape == (0, 2, 3, 8) and lse.shape == top.shape == (0, 3, 2)


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64])
def test_another_default_device(dtype):
    """``torch.set_default_device`` says where new tensors go, not where a call computes."""
    case = problem([5, 600], 3, queries=2, rank=12, rope=4, dtype=dtype, sliding_window=9)
    fmt = CacheFormat("int8", 12, 4)
    pages = fmt.allocate(3, 16)
    fmt.append(pages, torch.arange(48), torch.ones(48, 16))
    table, length = torch.tensor([[0, 1, 2]]).int(), torch.tensor([45]).int()

    def calls():
        stored = {"softmax_scale": 1.0, "cache_format": fmt}
        yield case.decode()[0]
        yield mla_decode(case.q[:1], pages, table, length, 12, **stored)[0]
        yield mla_sparse_decode(case.q[:1], pages, table.expand(1, 2, 3), 12, **stored)[0]

    want = list(calls())
    with torch.device("meta"):
        got = list(calls())
    assert all(torch.equal(*pair) for pair in zip(got, want))


def test_a_decoding_step_compiles_with_dynamic_shapes():
    """Schedule, append and both attentions over a quantised cache, in one graph."""
    fmt = CacheFormat("fp8", 16, 8)

    def step(q, pages, slots, rows, table, lengths):
        schedule, splits = get_mla_metadata(lengths, 4, 1)
        fmt.append(pages, slots, rows)
        dense = mla_decode(q * 1.0, pages, table, lengths, 16, softmax_scale=0.2, cache_format=fmt)
        some = mla_sparse_decode(
            q, pages, table[:, None], 16, softmax_scale=0.2, cache_format=fmt, topk_length=lengths
        )
        plain = q.new_ones(8, 16, 1, 24)
        return *dense, *some, *flash_mla_with_kvcache(
            q, plain, table, lengths, 16, schedule, splits
        )  # fmt: skip

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager", dynamic=True)
    for batch in (2, 3, 5):
        generator = torch.Generator().manual_seed(batch)
        tensors = (
            torch.randn(batch, 1, 4, 24, generator=generator), fmt.allocate(8, 16).zero_(),
            torch.arange(128), torch.randn(128, 24, generator=generator),
            torch.arange(batch, dtype=torch.int32)[:, None] + torch.arange(2, dtype=torch.int32),
            torch.full((batch,), 20, dtype=torch.int32),
        )  # fmt: skip
        got, want = compiled(*tensors), step(*tensors)
        assert all(torch.equal(*pair) for pair in zip(got, want))


def test_the_names_that_flash_mla_gave_its_second_argument():
    """``num_heads_per_head_k`` became ``num_q_tokens_per_head_k`` when sparse attention came."""
    lengths = torch.tensor([70, 5], dtype=torch.int32)
    want = get_mla_metadata(lengths, 128, 1)
    for name in ("num_heads_per_head_k", "num_q_tokens_per_head_k"):
        got = get_mla_metadata(cache_seqlens=lengths, num_heads_k=1, **{name: 128})
        assert all(torch.equal(*pair) for pair in zip(got, want))
