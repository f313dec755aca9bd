"""The Hopper kernels' own Python, emulated on the CPU: results, and every rule of the waiting.

Unused cache rows hold NaN and unused table entries a page that no cache has, see decode_cases.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton.experimental.gluon", reason="Triton 3.6 or later is not installed")

from decode_cases import SIXTEEN_BITS, assert_close, problem
from gluon_emulator import Emulated, rules, without
from gluon_machine import ProtocolError
from mlakit.ops import (
    gluon_decode,
    gluon_feed,
    gluon_job,
    gluon_seesaw,
    gluon_swapped,
    reference,
    torch_decode,
)

BF16, FP16 = torch.bfloat16, torch.float16
KERNELS = {name: getattr(gluon_decode, name) for name in ("plan", "seesaw", "swapped", "combine")}


@pytest.fixture
def run(monkeypatch):
    """``gluon_decode.decode`` of a call on an emulated GPU of few processors."""

    def decode(call, seed=0, processors=3, edited=None):
        for name, kernel in KERNELS.items():
            edits = edited if name in ("seesaw", "swapped") else None
            monkeypatch.setattr(gluon_decode, name, Emulated(kernel, seed, edits))
        monkeypatch.setattr(gluon_decode, "_processors", lambda device: processors)
        return gluon_decode.decode(call)

    return decode


def check(run, *arguments, seed=0, processors=3, dtype=BF16, **options):
    call = problem(*arguments, dtype=dtype, seed=seed, **options).call
    assert_close(run(call, seed, processors), reference.decode(call), **SIXTEEN_BITS)


RAGGED = [300, 70, 0, 513, 1, 64]


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("heads", [1, 9, 16, 17, 32, 33, 64, 128])
def test_heads(run, heads, dtype):
    """Both kernels, tiles that are not full; cut, empty and one-token sequences."""
    check(run, RAGGED[: 4 if heads == 128 else 6], heads, dtype=dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "queries"), [(4, 4), (9, 3), (64, 2), (24, 5)])
def test_queries(run, heads, queries, causal):
    """Rows without a key, and rows of one tile that see different tokens, also across pages."""
    check(run, [129, 1, 2, 260, 0], heads, queries=queries, causal=causal)


@pytest.mark.parametrize(("heads", "queries"), [(2, 1), (4, 2), (80, 1), (80, 2)])
def test_kv_heads(run, heads, queries):
    check(run, [140, 64, 3], heads, kv_heads=2, queries=queries)


@pytest.mark.parametrize("processors", [1, 2, 7, 200])
@pytest.mark.parametrize("heads", [8, 40])
def test_processors(run, heads, processors):
    """From one part that does everything to parts without work."""
    check(run, [700, 5, 0, 129], heads, processors=processors)


def test_a_batch_larger_than_the_plan_reads_at_once(run, monkeypatch):
    monkeypatch.setattr(gluon_decode, "PLAN_BLOCK", 4)
    monkeypatch.setattr(gluon_decode, "COMBINE_ITEMS", 2)
    check(run, [5, 0, 33, 1, 700, 70, 0, 64, 9], 3, processors=8)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_nothing_to_attend_to(run, lengths):
    out, lse = run(problem(lengths, 2, dtype=BF16).call)
    assert out.shape == (len(lengths), 2, 512) and (out == 0).all() and (lse == math.inf).all()


def test_a_cache_without_pages(run):
    call = problem([0], 2, dtype=BF16).call
    out, lse = run(replace(call, k_cache=call.k_cache[:0]))
    assert (out == 0).all() and (lse == math.inf).all()


def test_lengths_outside_of_the_table_touch_nothing_else(run):
    """A length above the table's room counts as all of it, a negative one as 0."""
    call = problem([64, 64], 2, causal=False, dtype=BF16).call
    call = replace(call, block_table=call.block_table[:, :1])
    out, lse = run(replace(call, cache_seqlens=torch.tensor([900, -3], dtype=torch.int32)))
    want = run(call)
    assert torch.equal(out[0], want[0][0]) and torch.equal(lse[0], want[1][0])
    assert (out[1] == 0).all() and (lse[1] == math.inf).all()


@pytest.mark.parametrize(("kv_heads", "queries"), [(1, 1), (1, 2), (2, 2)])
def test_strided_tensors(run, kv_heads, queries):
    """q cut out of a wider tensor, a cache of every other page, transposed table and lengths."""
    call = problem([70, 133], 4, kv_heads=kv_heads, queries=queries, dtype=FP16).call
    strided = replace(
        call,
        q=torch.cat([call.q, call.q], -1)[..., :576],
        k_cache=torch.stack([call.k_cache, call.k_cache], 1)[:, 0],
        block_table=call.block_table.T.contiguous().T,
        cache_seqlens=torch.stack([call.cache_seqlens, call.cache_seqlens], 1)[:, 0],
    )
    for got, want in zip(run(strided), run(call)):
        assert torch.equal(got, want)


@pytest.mark.parametrize("heads", [8, 40])
def test_order_makes_no_difference(run, heads):
    """Whoever is fast or slow, the sums are the same, bit for bit."""
    call = problem(RAGGED, heads, dtype=BF16).call
    first = run(call)
    for seed in range(1, 5):
        assert all(torch.equal(a, b) for a, b in zip(run(call, seed), first))


@pytest.mark.parametrize("heads", [8, 40])
def test_batch_invariance(run, heads, monkeypatch):
    """Alone, or beside others on a smaller GPU: the same bits."""
    monkeypatch.setattr(gluon_decode, "FIXED_STEPS", 1)
    call = problem([400, 70, 0, 250], heads, batch_invariant=True, dtype=BF16).call
    out, lse = run(call, processors=3)
    assert_close((out, lse), reference.decode(call), **SIXTEEN_BITS)
    for b in range(4):
        alone = replace(
            call,
            q=call.q[b : b + 1],
            block_table=call.block_table[b : b + 1],
            cache_seqlens=call.cache_seqlens[b : b + 1],
        )
        alone_out, alone_lse = run(alone, processors=9)
        assert torch.equal(alone_out[0], out[b]) and torch.equal(alone_lse[0], lse[b])


@pytest.mark.parametrize("fixed", [0, 2])
@pytest.mark.parametrize("parts", [1, 3, 16])
def test_the_plan_covers_every_step_once(parts, fixed):
    random = torch.Generator().manual_seed(parts)
    lengths = torch.randint(0, 3000, (37,), generator=random, dtype=torch.int32)
    lengths[::3] = 0
    first, part_items = lengths.new_empty(38), lengths.new_empty(parts + 1)
    items = lengths.new_full((37 + parts if not fixed else 37 * 12, 4), -1)
    Emulated(KERNELS["plan"])[(1,)](
        lengths, first, items, part_items, 37, 3000, parts, 1, FIXED=fixed, BLOCK=8, PARTS=32
    )
    steps = (-(lengths // -128)).tolist()
    for b, (start, stop) in enumerate(zip(first.tolist(), first.tolist()[1:])):
        bounds = [begin for sequence, begin, *_ in items[start:stop].tolist() if sequence == b]
        ends = items[start:stop, 2].tolist()
        assert [*bounds, steps[b]] == [0, *ends] and len(bounds) == stop - start
        assert all(whole == (stop - start == 1) for whole in items[start:stop, 3].tolist())
        assert all(begin < end for begin, end in zip(bounds, ends))
    assert part_items[0] == 0 and part_items[-1] == first[-1]
    share = -(-(sum(steps) + 3 * sum(n > 0 for n in steps)) // parts)
    for start, stop in zip(part_items.tolist(), part_items.tolist()[1:]):
        work = (items[start:stop, 2] - items[start:stop, 1]).sum()
        assert work <= share + (fixed or 0)


RULES = [
    (module, name, number)
    for module, names in {
        gluon_feed: "fetch_queries fetch_page",
        gluon_seesaw: "begin_scores finish_scores even_step even_half odd_step odd_half",
        gluon_job: "clear",
        gluon_swapped: "producer step consumer",
    }.items()
    for name in names.split()
    for number in range(len(rules(getattr(module, name))))
]


@pytest.mark.parametrize(("module", "name", "number"), RULES)
def test_every_rule_is_needed(run, module, name, number):
    """Without any one wait, arrival or fence, some order of events goes wrong: none is for show,
    and the emulator sees the difference."""
    heads = 16 if module is gluon_swapped else 40
    call = problem([700, 70, 0, 390, 1, 64], heads, dtype=BF16).call
    want = torch_decode.decode(call)
    edited = without(getattr(module, name), number)
    with pytest.raises((ProtocolError, AssertionError, TypeError)):  # TypeError: no result yet
        for seed in range(50):
            assert_close(run(call, seed, 2, edited), want, **SIXTEEN_BITS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_many_orders(run, seed):
    random = torch.Generator().manual_seed(seed)

    def draw(*values):
        return values[int(torch.randint(len(values), (), generator=random))]

    lengths = [draw(0, 1, 63, 64, 65, 128, 129, 255, 256, 400, 640) for _ in range(draw(1, 3, 6))]
    check(
        run, lengths, 2 * draw(1, 4, 8, 16, 20, 32, 64), kv_heads=draw(1, 1, 2), seed=seed,
        queries=draw(1, 1, 2, 3), processors=draw(1, 3, 5, 20), dtype=draw(BF16, FP16),
        causal=draw(True, False), batch_invariant=draw(False, False, True),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("queries", [1, 2, 4])
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(1, 1), (3, 3), (9, 3), (63, 1), (64, 2), (64, 8), (126, 1), (128, 8)]
)
def test_flash_mla_dense_matrix(run, heads, kv_heads, queries):
    """FlashMLA's dense matrix, with batches and contexts of the emulator's size."""
    random = torch.Generator().manual_seed(heads)
    for context, varlen, causal in [(20, True, True), (140, True, False), (300, True, True)]:
        lengths = torch.full((2,), float(context))
        if varlen:
            lengths = torch.normal(lengths, context / 2, generator=random).clamp_min(queries)
        check(run, lengths.int().tolist(), heads, kv_heads=kv_heads, queries=queries, causal=causal)


def test_why_not():
    call = problem([70], 4, dtype=BF16).call
    assert "compute capability 9.0" in gluon_decode.why_not(call)  # the only thing it lacks
    for other, reason in [
        (problem([70], 4).call, "bfloat16 and float16"),
        (problem([70], 4, rank=448, rope=128, dtype=BF16).call, "kv_lora_rank 512"),
        (problem([70], 4, width=64, dtype=BF16).call, "kv_lora_rank 512"),
        (problem([70], 4, block_size=32, dtype=BF16).call, "pages of 64"),
        (problem([70], 4, soft_cap=1.0, dtype=BF16).call, "soft cap"),
        (problem([70], 4, sliding_window=9, dtype=BF16).call, "sliding window"),
        (problem([70], 4, queries=[1], dtype=BF16).call, "same number of queries"),
        (replace(call, k_cache=call.k_cache.flatten()[8:][: 576 * 64].as_strided(
            (2, 64, 1, 576), (580, 577, 577, 1))), "multiples of 16 bytes"),
        (replace(call, k_cache=call.k_cache.as_strided((2, 64, 1, 576), (584, 576, 576, 1))),
         "no multiple"),
        (replace(call, k_cache=call.k_cache.as_strided((1, 64, 2, 576), (576, 576, 36864, 1))),
         "beside one another"),
    ]:  # fmt: skip
        assert reason in gluon_decode.why_not(other)


on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="no Hopper GPU here",
)


def on_gpu(call):
    tensors = {name: value.cuda() for name, value in vars(call).items() if torch.is_tensor(value)}
    return replace(call, **tensors)


@on_hopper
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("queries", [1, 2, 4])
@pytest.mark.parametrize(
    ("heads", "kv_heads"),
    [(1, 1), (3, 3), (9, 1), (16, 1), (32, 1), (63, 1), (64, 2), (126, 1), (128, 1), (128, 8)],
)
def test_on_the_gpu(heads, kv_heads, queries, dtype):
    """FlashMLA's dense matrix at its contexts; three runs agree bit for bit."""
    random = torch.Generator().manual_seed(heads)
    for context, varlen, causal in itertools.product((20, 140, 4096), (True, False), (True, False)):
        lengths = torch.full((9,), float(context))
        if varlen:
            lengths = torch.normal(lengths, context / 2, generator=random).clamp_min(queries)
            lengths[::4] = 0
        call = on_gpu(
            problem(
                lengths.int().tolist(), heads, kv_heads=kv_heads, queries=queries, dtype=dtype,
                causal=causal, batch_invariant=heads == 63,
            ).call
        )  # fmt: skip
        assert gluon_decode.why_not(call) == ""
        precise = replace(call, q=call.q.double(), k_cache=call.k_cache.double())
        got = gluon_decode.decode(call)
        assert_close(got, torch_decode.decode(precise), **SIXTEEN_BITS)
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(got, gluon_decode.decode(call)))


@on_hopper
@pytest.mark.parametrize("heads", [16, 128])
def test_graph_capture(heads):
    """A captured call replays for other lengths, cut elsewhere."""
    call = on_gpu(problem([3000, 40, 0, 900], heads, dtype=BF16).call)
    gluon_decode.decode(call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gluon_decode.decode(call)
    for lengths in ([3000, 40, 0, 900], [1, 40, 0, 77], [2999, 0, 0, 0]):
        call.cache_seqlens.copy_(torch.tensor(lengths))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, gluon_decode.decode(call)))


@on_hopper
@pytest.mark.parametrize("heads", [16, 128])
def test_a_plan_is_shared(heads):
    """The layers of a step may hand on one plan."""
    call = on_gpu(problem([3000, 40, 0, 900], heads, dtype=BF16).call)
    out, lse = gluon_decode.decode(call)
    made = gluon_decode.make_plan(call)
    for _ in range(3):
        again, again_lse = torch.empty_like(out), torch.empty_like(lse)
        gluon_decode.attend(call, made, again, again_lse)
        assert torch.equal(out, again) and torch.equal(lse, again_lse)
