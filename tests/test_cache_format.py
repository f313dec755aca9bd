"""Every cache format: its bytes against an independent reading, its error, and decoding from it.

Memory that no token uses is filled with 0xFF, which is NaN in e4m3, e8m0, bfloat16 and float32.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlakit.errors import UsageError
from mlakit.ops import (
    CacheFormat,
    cpu_rows,
    flash_mla_with_kvcache,
    get_mla_metadata,
    mla_decode,
    reference,
)
from mlakit.ops.cache_format import PLAIN, QUANTISED, slots_of
from mlakit.ops.call import DenseCall, dense_call

KINDS = [*PLAIN, *QUANTISED]
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
GARBAGE = 2147480000


def memory_of(pages):
    """All bytes behind pages, those after a page's last token included, ``[num_blocks, bytes]``."""
    storage = torch.empty(0, dtype=torch.uint8).set_(pages.untyped_storage())
    return storage.view(len(pages), -1)


def bytes_of(cache_format, pages, slot):
    """The bytes of one token: a token's own in a row, or in MODEL1 its values and its scales."""
    block_size = pages.shape[1]
    page, offset = divmod(slot, block_size)
    sizes = [cache_format.bytes_per_token]
    if cache_format.kind == "model1":
        scales = -(-cache_format.groups // 8) * 8
        sizes = [sizes[0] - scales, scales]
    memory, start = memory_of(pages)[page], 0
    for size in sizes:
        yield memory[start + offset * size : start + (offset + 1) * size]
        start += block_size * size


def poisoned(cache_format, num_blocks, block_size):
    pages = cache_format.allocate(num_blocks, block_size)
    memory_of(pages).fill_(255)
    return pages


def random_rows(count, width, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(spread * torch.randn(count, 1, generator=generator))
    return torch.randn(count, width, generator=generator) * size


def error_bound(cache_format, rows):
    """The largest error of each value, derived from the format alone.

    A scale is amax / largest rounded up: below twice that for powers of two, below 1 + 2^-7 times
    for bfloat16's 8 significant bits. e4m3 has 4 significant bits, so half a unit is 2^-4 of the
    value, or below its normal numbers 2^-10 of the scale. An integer code is off by half a scale,
    plus the float32 rounding of two operations. Rope and plain values are rounded to their dtype.
    """
    rows = rows.double()
    latent, rope = rows[:, : cache_format.kv_lora_rank], rows[:, cache_format.kv_lora_rank :]
    if cache_format.kind in PLAIN:
        return rows.abs() * torch.finfo(cache_format.dtype).eps / 2 + 2.0**-25
    bounds = []
    for group in latent.split(cache_format.group, dim=1):
        amax = group.abs().amax(1, keepdim=True)
        if cache_format.kind in ("fp8", "model1"):
            scale = 2 * (amax / 448).clamp_min(1e-4)
            bounds.append(torch.maximum(group.abs() * 2**-4, (scale * 2**-10).expand_as(group)))
        else:
            scale = amax / (127 if cache_format.kind == "int8" else 7) * (1 + 2**-7)
            bounds.append((scale / 2 + amax * 2**-22 + 1e-19).expand_as(group))
    return torch.cat([*bounds, rope.abs() * 2**-8 + 1e-38], 1)


def test_bytes_per_token():
    """FlashMLA's 656 and 584; the others by hand: values + scales + 2 bytes per rope column."""
    want = {
        "fp32": (2304, 1280), "bf16": (1152, 640), "fp16": (1152, 640), "fp64": (4608, 2560),
        "fp8": (512 + 16 + 128, 256 + 8 + 128), "model1": (512 + 128 + 8, 256 + 128 + 8),
        "int8": (512 + 8 + 128, 256 + 4 + 128), "int4": (256 + 16 + 128, 128 + 8 + 128),
    }  # fmt: skip
    for kind in KINDS:
        got = tuple(CacheFormat(kind, rank, 64).bytes_per_token for rank in (512, 256))
        assert got == want[kind], kind
    model1 = CacheFormat("model1", 448, 64)
    assert model1.bytes_per_token == 584
    assert [model1.bytes_per_page(p) for p in (1, 2, 64)] == [1152, 1728, 65 * 576]
    assert model1.allocate(3, 2).stride() == (1728, 584, 584, 1)


def test_flash_mla_token_layout():
    """512 e4m3, 4 float32 scales, 64 bfloat16, written out by hand and read back by hand."""
    fmt, rows = CacheFormat("fp8", 512, 64), random_rows(6, 576)
    pages, slots = poisoned(fmt, 3, 4), torch.tensor([11, 0, 5, 4, 7, 2])
    fmt.append(pages, slots, rows)
    for slot, row in zip(slots.tolist(), rows):
        token = memory_of(pages).view(-1, 656)[slot]
        scales = token[512:528].view(torch.float32)
        for g in range(4):
            group = row[128 * g : 128 * (g + 1)]
            want = 2.0 ** math.ceil(math.log2(max(group.abs().max().item() / 448, 1e-4)))
            assert scales[g] == want
            codes = (group / want).to(torch.float8_e4m3fn).view(torch.uint8)
            assert torch.equal(token[128 * g : 128 * (g + 1)], codes)
            value = E4M3[codes.long()] * want
            got = fmt.read(pages, torch.tensor([slot]), torch.float64)[0]
            assert torch.equal(got[128 * g : 128 * (g + 1)], value)
        assert torch.equal(token[528:].view(torch.bfloat16), row[512:].bfloat16())


def test_model1_page_layout():
    """All tokens' 448 e4m3 + 64 bfloat16, then 8 bytes of e8m0 scales each, then padding."""
    fmt, rows = CacheFormat("model1", 448, 64), random_rows(5, 512)
    pages, slots = poisoned(fmt, 3, 4), torch.tensor([11, 0, 5, 4, 7])
    fmt.append(pages, slots, rows)
    memory = memory_of(pages)
    assert memory.shape[1] == 2880 and (memory[:, 4 * 584 :] == 255).all()
    for slot, row in zip(slots.tolist(), rows):
        page, offset = divmod(slot, 4)
        values = memory[page, 576 * offset : 576 * (offset + 1)]
        scales = memory[page, 4 * 576 + 8 * offset :][:7]
        got = fmt.read(pages, torch.tensor([slot]), torch.float64)[0]
        for g in range(7):
            group = slice(64 * g, 64 * (g + 1))
            want = 2.0 ** (int(scales[g]) - 127)
            assert want / 2 < max(row[group].abs().max().item() / 448, 1e-4) <= want
            assert torch.equal(got[group], E4M3[values[group].long()] * want)
        assert torch.equal(values[448:].view(torch.bfloat16), row[448:].bfloat16())
        assert torch.equal(got[448:], row[448:].bfloat16().double())


def test_int4_byte_holds_two_values():
    fmt = CacheFormat("int4", 5, 1, 4)
    pages = poisoned(fmt, 1, 1)
    rows = torch.tensor([[7.0, -7.0, 3.0, 0.0, 14.0, 1.5]])
    fmt.append(pages, torch.tensor([0]), rows)
    low, high = [7, -7, 3], [0, 7]
    want = [(a + 8) + 16 * (b + 8) for a, b in zip(low, high)] + [low[2] + 8]
    assert memory_of(pages)[0, :3].tolist() == want
    assert torch.equal(fmt.read(pages, torch.tensor([0])), rows)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_round_trip_is_within_the_bound(kind, data):
    """Any rank, rope size, group and page; other tokens' bytes and the page's padding stay."""
    group = data.draw(st.sampled_from([0, 16, 64, 128]) if kind in QUANTISED else st.just(0))
    fmt = CacheFormat(kind, data.draw(st.integers(1, 300)), data.draw(st.integers(0, 70)), group)
    block_size, blocks = data.draw(st.sampled_from([1, 2, 16, 61])), 3
    pages = poisoned(fmt, blocks, block_size)
    room = blocks * block_size
    slots = torch.tensor(data.draw(st.permutations(range(room)))[: data.draw(st.integers(0, 5))])
    slots = slots.long()
    rows = random_rows(len(slots), fmt.width, seed=data.draw(st.integers(0, 9)))
    if kind == "fp16":
        rows = rows.clamp(-6e4, 6e4)
    fmt.append(pages, slots, rows)
    assert ((fmt.read(pages, slots, torch.float64) - rows).abs() <= error_bound(fmt, rows)).all()
    others = [slot for slot in range(room) if slot not in slots.tolist()]
    if others and kind not in ("int8", "int4"):
        assert fmt.read(pages, torch.tensor(others)).isnan().all()
    for slot in slots.tolist():  # without the tokens that were stored, all is as it was
        for some in bytes_of(fmt, pages, slot):
            some.fill_(255)
    assert (memory_of(pages) == 255).all()


@pytest.mark.parametrize("kind", QUANTISED)
def test_values_at_the_edges(kind):
    """Zeros stay zeros, tiny and huge groups keep their bound, the largest value does not clip."""
    fmt = CacheFormat(kind, 200, 2)
    pages, slots = poisoned(fmt, 1, 8), torch.arange(8)
    rows = random_rows(8, 202, spread=0)
    rows *= torch.tensor([0, 1e-30, 1e-6, 448, 448 * (1 + 2**-23), 127, 1e30, 7])[:, None]
    rows[3, :2] = torch.tensor([448.0, -448.0])
    fmt.append(pages, slots, rows)
    got = fmt.read(pages, slots, torch.float64)
    assert (got[0] == 0).all()
    assert ((got - rows).abs() <= error_bound(fmt, rows)).all()
    peak = rows[:, :200].abs().argmax(1)
    assert (got[2:, :].gather(1, peak[2:, None])[:, 0] / rows[2:].gather(1, peak[2:, None])[:, 0]
            > 0.93).all()  # fmt: skip


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_value_that_is_no_number_is_not_lost(kind):
    """NaN or infinity makes its own group NaN, and no other group or token."""
    fmt = CacheFormat(kind, 200, 4, 64)
    pages, rows = poisoned(fmt, 1, 3), random_rows(3, 204)
    rows[0, 70], rows[1, 199] = math.nan, -math.inf
    fmt.append(pages, torch.arange(3), rows)
    bad = fmt.read(pages, torch.arange(3)).isfinite().logical_not()
    want = torch.zeros(3, 204, dtype=torch.bool)
    want[0, 64:128] = want[1, 192:200] = True
    assert torch.equal(bad, want)


def dense_problem(fmt, lengths, heads, *, queries, block_size, dtype, width=None, seed=0):
    """A poisoned cache with ragged sequences in it, and its rows as a plain float64 cache."""
    generator = torch.Generator().manual_seed(seed)
    used = [-(-length // block_size) for length in lengths]
    num_blocks = sum(used) + 1
    order = torch.randperm(num_blocks, generator=generator).tolist()
    table = torch.full((len(lengths), max(used, default=0) + 1), GARBAGE, dtype=torch.int32)
    pages = poisoned(fmt, num_blocks, block_size)
    plain = torch.full((num_blocks * block_size, fmt.width), math.nan, dtype=torch.float64)
    for b, length in enumerate(lengths):
        for i in range(used[b]):
            table[b, i] = order.pop()
        slots = slots_of(table[b : b + 1], torch.arange(length)[None], block_size)[0]
        rows = torch.randn(length, fmt.width, generator=generator) / 10
        fmt.append(pages, slots, rows.clamp(-1, 1))
        plain[slots] = fmt.read(pages, slots, torch.float64)
    q = torch.randn(len(lengths), queries, heads, width or fmt.width, generator=generator) / 10
    plain = plain.view(num_blocks, block_size, 1, fmt.width)
    return q.clamp(-1, 1).to(dtype), pages, table, torch.tensor(lengths, dtype=torch.int32), plain


# Products and sums of the same float64 rows: float64 rounding in the plain torch path. float32: as
# in test_ops.py. bfloat16: rounding the output, 2^-9 of a value below 1, and the float32 error.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-9 + 1e-5}


def true_result(q, plain, *arguments, **options):
    """The float64 twin over rows that were read from the pages, in float64."""
    call = dense_call(q.double(), plain, *arguments, **options)
    out, lse = reference.decode(call)
    return out.unflatten(0, q.shape[:2]), lse.unflatten(0, q.shape[:2]).mT


def assert_decodes(fmt, problem, rank, causal):
    q, pages, table, lengths, plain = problem
    arguments = (table, lengths, rank)
    options = {"softmax_scale": 0.2, "causal": causal}
    out, lse = mla_decode(q, pages, *arguments, **options, cache_format=fmt)
    want, want_lse = true_result(q, plain, *arguments, **options)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    tolerance = TOLERANCE[q.dtype]
    torch.testing.assert_close(out.double(), want, atol=tolerance, rtol=tolerance)
    # lse comes back in float32, of scores that are float32 sums of some hundred products
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, dtype) for kind in QUANTISED for dtype in TOLERANCE), ("bf16", torch.bfloat16)],
)
def test_dense_decode(kind, dtype, causal):
    """Ragged and empty sequences across chunks; float64 takes the plain torch path."""
    fmt = CacheFormat(kind, 448, 64)
    problem = dense_problem(fmt, [0, 1, 600, 70], 5, queries=2, block_size=64, dtype=dtype)
    assert_decodes(fmt, problem, 448, causal)


@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_dense_decode_of_any_rank_group_and_page(dtype, data):
    kind = data.draw(st.sampled_from(list(QUANTISED)))
    group = data.draw(st.sampled_from([0, 64, 128]))
    fmt = CacheFormat(kind, data.draw(st.integers(1, 200)), data.draw(st.integers(0, 40)), group)
    problem = dense_problem(
        fmt,
        data.draw(st.lists(st.integers(0, 40) | st.integers(510, 520), min_size=1, max_size=3)),
        data.draw(st.integers(1, 4)),
        queries=data.draw(st.integers(1, 3)),
        block_size=data.draw(st.sampled_from([1, 16, 61])),
        width=data.draw(st.none() | st.integers(1, fmt.width)),
        dtype=dtype,
        seed=data.draw(st.integers(0, 9)),
    )
    rank = data.draw(st.integers(1, fmt.width))
    assert_decodes(fmt, problem, rank, data.draw(st.booleans()))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_empty_batch_and_pages_that_are_not_there(dtype):
    fmt = CacheFormat("int8", 20, 4)
    assert_decodes(fmt, dense_problem(fmt, [], 3, queries=2, block_size=4, dtype=dtype), 20, True)
    q, pages, table, lengths, _ = dense_problem(
        fmt, [9, 3], 3, queries=2, block_size=4, dtype=dtype
    )
    with pytest.raises(UsageError, match="block_table has shape"):
        mla_decode(q, pages, table[:1], lengths, 20, softmax_scale=1.0, cache_format=fmt)
    if dtype != torch.float64:
        with pytest.raises(UsageError, match=r"block_table\[0\] uses pages"):
            mla_decode(q, pages, table + 100, lengths, 20, softmax_scale=1.0, cache_format=fmt)


@pytest.mark.parametrize("kind", ["fp8", "model1"])
def test_flash_mla_reads_its_own_layouts(kind):
    """Whatever the byte dtype, and with pages that lie further apart, as in FlashMLA's tests."""
    fmt = CacheFormat(kind, 512 if kind == "fp8" else 448, 64)
    value = 512
    q, pages, table, lengths, plain = dense_problem(
        fmt, [70, 5], 4, queries=2, block_size=64, dtype=torch.bfloat16
    )
    want, want_lse = true_result(
        q, plain, table, lengths, value, softmax_scale=fmt.width**-0.5, causal=True
    )
    apart = torch.full((len(pages), pages.stride(0) + fmt.bytes_per_token * 9), 255).to(torch.uint8)
    apart[:, : 64 * fmt.bytes_per_token] = pages.flatten(1)
    apart = apart[:, : 64 * fmt.bytes_per_token].view(pages.shape)
    for cache in (pages.view(torch.float8_e4m3fn), pages.view(torch.int8), apart):
        out, lse = flash_mla_with_kvcache(
            q, cache, table, lengths, value, *get_mla_metadata(), causal=True, is_fp8_kvcache=True
        )
        # bfloat16 output: 2^-9 of a value below 1; lse float32, sums of some hundred products
        torch.testing.assert_close(out.double(), want, atol=2**-9, rtol=2**-8)
        torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)


def test_never_more_than_a_chunk_at_once(monkeypatch):
    fmt, seen = CacheFormat("fp8", 64, 16), []
    monkeypatch.setattr(cpu_rows, "CHUNK", 512)
    q, pages, table, lengths, _ = dense_problem(
        fmt, [1200, 3], 2, queries=1, block_size=16, dtype=torch.float32
    )
    read = CacheFormat.read_into

    def record(self, out, pages, slots):
        seen.append(len(slots))
        return read(self, out, pages, slots)

    monkeypatch.setattr(CacheFormat, "read_into", record)
    mla_decode(q, pages, table, lengths, 64, softmax_scale=0.2, cache_format=fmt)
    assert sorted(seen) == [3, 1200 - 2 * cpu_rows.CHUNK, cpu_rows.CHUNK, cpu_rows.CHUNK]


def test_the_same_bits_every_time():
    fmt = CacheFormat("int4", 448, 64)
    q, *rest, _ = dense_problem(
        fmt, [700, 3, 64, 0], 9, queries=2, block_size=64, dtype=torch.bfloat16
    )
    pages, table, lengths = rest

    def run():
        return mla_decode(q, pages, table, lengths, 448, softmax_scale=0.2, cache_format=fmt)

    runs = [run() for _ in range(3)]
    for out, lse in runs[1:]:
        assert torch.equal(out, runs[0][0]) and torch.equal(lse, runs[0][1])


def test_operator_declares_what_it_does():
    fmt = CacheFormat("fp8", 32, 8)
    q, pages, table, lengths, _ = dense_problem(
        fmt, [20, 5], 2, queries=2, block_size=16, dtype=torch.float32
    )
    call = dense_call(q, pages, table, lengths, 32, softmax_scale=0.2, cache_format=fmt)
    assert DenseCall.from_flat(*call.flat()) == call
    torch.library.opcheck(torch.ops.mlakit.mla_decode.default, call.flat())


def test_slots_follow_the_block_table():
    table = torch.tensor([[5, 2, GARBAGE], [0, GARBAGE, GARBAGE]], dtype=torch.int32)
    positions = torch.tensor([[0, 15, 16, 31], [-1, 0, 7, -3]])
    want = [[80, 95, 32, 47], [-1, 0, 7, -1]]
    assert slots_of(table, positions, 16).tolist() == want


def test_refused_formats_and_pages():
    fmt = CacheFormat("fp8", 64, 16)
    pages = fmt.allocate(2, 4)
    rows = torch.zeros(2, 80)
    for message, call in {
        "'fp7' is no cache format": lambda: CacheFormat("fp7", 64, 16),
        "at least 1 . 0": lambda: CacheFormat("fp8", 0, 16),
        "has no groups": lambda: CacheFormat("bf16", 64, 16, 64),
        "rows have shape": lambda: fmt.append(pages, torch.tensor([1, 2, 3]), rows),
        "slots run from -1 to 3": lambda: fmt.append(pages, torch.tensor([-1, 3]), rows),
        "the cache has 8": lambda: fmt.append(pages, torch.tensor([0, 8]), rows),
        "k_cache has shape": lambda: fmt.check(pages[..., :-1]),
        "pages are bytes": lambda: fmt.check(pages.float()),
        "model1 token is contiguous and follows": lambda: CacheFormat("model1", 4, 4).check(
            torch.zeros(2, 4, 1, 40, dtype=torch.uint8)[..., :20]
        ),
    }.items():
        with pytest.raises(UsageError, match=message):
            call()
