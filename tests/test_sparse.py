"""Sparse attention over every kind of cache against a naive float64 twin.

Rows that no query selected are NaN (0xFF bytes), indices that do not count are -1 or garbage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlakit.errors import UsageError
from mlakit.ops import (
    CacheFormat,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
    mla_sparse_decode,
    torch_decode,
)
from mlakit.ops.cache_format import PLAIN, QUANTISED
from mlakit.ops.call import selection

GARBAGE = 2147480000

# FlashMLA's tests, sparse decode and sparse prefill: absolute or relative to the value, difference
# in direction, and lse relative (or 1e-6 absolute).
DECODE = {"absolute": 1e-3, "relative": 2.01 / 128, "cosine": 5e-6, "lse_relative": 8.01 / 65536}
PREFILL = {"absolute": 8e-4, "relative": 3.01 / 128, "cosine": 7e-6, "lse_relative": 2.01 / 65536}
# float32: rounding of a score of up to 576 products, see test_ops.py; float64: its rounding, and
# lse comes back in float32.
FLOAT32 = {"absolute": 1e-5, "relative": 1e-5, "cosine": 1e-9, "lse_relative": 1e-5}
FLOAT64 = {"absolute": 1e-12, "relative": 1e-12, "cosine": 1e-15, "lse_relative": 2.0**-23}
TOLERANCE = {torch.bfloat16: DECODE, torch.float32: FLOAT32, torch.float64: FLOAT64}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Cache:
    """One cache, the selection from it, and its rows in float64."""

    pages: torch.Tensor
    indices: torch.Tensor
    length: torch.Tensor | None
    rows: torch.Tensor

    def selected(self, b: int, s: int) -> torch.Tensor:
        chosen = self.indices[b, s].tolist()
        if self.length is not None:
            chosen = chosen[: int(self.length[b] if self.length.dim() == 1 else self.length[b, s])]
        chosen = [i for i in chosen if 0 <= i < len(self.rows)]
        return self.rows[torch.tensor(chosen, dtype=torch.long)]


def cache(
    fmt, batch, queries, topk, tokens, block_size, *, invalid=0.1, lengths=None, seed=0
) -> Cache:
    """A poisoned cache; ``topk`` different rows for each query, some of them -1."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-tokens // block_size)
    indices = torch.full((batch, queries, topk), -1, dtype=torch.int32)
    for at in ((b, s) for b in range(batch) for s in range(queries)):
        some = torch.randperm(tokens, generator=generator)[:topk].int()
        some[torch.rand(len(some), generator=generator) < invalid] = -1
        indices[at][: len(some)] = some
    length = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    if length is not None:
        past = torch.arange(topk) >= (
            length[:, None, None] if length.dim() == 1 else length[..., None]
        )
        indices = indices.masked_fill(past.expand_as(indices), GARBAGE)
    pages = fmt.allocate(blocks, block_size)
    torch.empty(0, dtype=torch.uint8).set_(pages.untyped_storage()).fill_(255)
    used = indices[(indices >= 0) & (indices < blocks * block_size)].unique().long()
    values = (torch.randn(len(used), fmt.width, generator=generator) / 10).clamp(-1, 1)
    fmt.append(pages, used, values)
    rows = torch.full((blocks * block_size, fmt.width), math.nan, dtype=torch.float64)
    rows[used] = fmt.read(pages, used, torch.float64)
    return Cache(pages, indices, length, rows)


def queries_for(fmt, batch, queries, heads, dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, queries, heads, fmt.width, generator=generator) / 10
    return q.clamp(-1, 1).to(dtype)


def naive(q, caches, rank, scale, sink=None):
    """Softmax over the selected rows, written as the definition has it; float64."""
    batch, queries, heads, _ = q.shape
    out = torch.zeros(batch, queries, heads, rank, dtype=torch.float64)
    lse = torch.full((batch, heads, queries), math.inf, dtype=torch.float64)
    top = torch.full((batch, heads, queries), -math.inf, dtype=torch.float64)
    for b in range(batch):
        for s in range(queries):
            rows = torch.cat([one.selected(b, s) for one in caches])
            if not len(rows):
                continue
            scores = q[b, s].double() @ rows.T * scale
            lse[b, :, s] = torch.logsumexp(scores, 1)
            top[b, :, s] = scores.amax(1)
            out[b, s] = torch.softmax(scores, 1) @ rows[:, :rank]
            for h in range(heads if sink is not None else 0):
                if sink[h] == math.inf:
                    out[b, s, h] = 0
                elif sink[h] > -math.inf:
                    a, c = lse[b, h, s], sink[h].double()
                    m = max(a, c)
                    out[b, s, h] *= torch.exp(a - m) / (torch.exp(a - m) + torch.exp(c - m))
    return out, lse, top


def assert_close(got, want, *, absolute, relative, cosine, lse_relative):
    out, true_out = got[0].double(), want[0]
    assert not out.isnan().any()
    error = (out - true_out).abs()
    assert ((error < absolute) | (error < relative * true_out.abs())).all(), error.max()
    norm = (out.square().sum() + true_out.square().sum()).item()
    assert not norm or 1 - 2 * (out * true_out).sum().item() / norm < cosine
    for mine, true in zip(got[1:], want[1:]):
        mine, finite = mine.double(), true.isfinite()
        assert torch.equal(mine[~finite], true[~finite])
        error, size = (mine - true)[finite].abs(), true[finite].abs()
        assert ((error < 1e-6) | (error < lse_relative * size)).all(), error.max()


MATRIX = [
    (512, 64, 2), (512, 64, 64), (512, 64, 69), (1024, 576, 2), (1024, 576, 61), (2046, 2048, 2),
    (2046, 2048, 64), (2046, 2048, 576),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["fp8", "model1", "bf16"])
@pytest.mark.parametrize(("tokens", "topk", "block_size"), MATRIX)
def test_flash_mla_sparse_decode_matrix(kind, tokens, topk, block_size):
    """FlashMLA's shapes (d 576 and 512) through its own call, batches cut to CPU size."""
    fmt = CacheFormat(kind, 448 if kind == "model1" else 512, 64)
    case = MATRIX.index((tokens, topk, block_size))
    heads, queries, batch = (64, 128, 9)[case % 3], (1, 3)[case % 2], (4, 2)[case % 2]
    one = cache(fmt, batch, queries, topk, tokens, block_size, seed=case)
    q = queries_for(fmt, batch, queries, heads, torch.bfloat16)
    got = flash_mla_with_kvcache(
        q, one.pages, None, None, 512, *get_mla_metadata(), is_fp8_kvcache=kind != "bf16",
        indices=one.indices,
    )  # fmt: skip
    assert got[0].dtype == torch.bfloat16 and got[1].shape == (batch, heads, queries)
    assert_close(got, naive(q, [one], 512, fmt.width**-0.5)[:2], **DECODE)


@pytest.mark.parametrize("kind", ["fp8", "model1", "bf16"])
def test_everything_at_once_through_flash_mla(kind):
    """Extra cache of another page size, both topk lengths (0 among them), infinite sinks."""
    fmt = CacheFormat(kind, 448 if kind == "model1" else 512, 64)
    one = cache(fmt, 4, 2, 70, 300, 64, lengths=[0, 70, 13, 0])
    more = cache(fmt, 4, 2, 40, 90, 61, lengths=[7, 0, 40, 0], seed=5)
    q = queries_for(fmt, 4, 2, 5, torch.bfloat16)
    sink = torch.tensor([0.5, math.inf, -math.inf, -20.0, 3.0])
    got = flash_mla_with_kvcache(
        q, one.pages, None, None, 512, *get_mla_metadata(), softmax_scale=0.3,
        is_fp8_kvcache=kind != "bf16", indices=one.indices, attn_sink=sink,
        extra_k_cache=more.pages, extra_indices_in_kvcache=more.indices, topk_length=one.length,
        extra_topk_length=more.length,
    )  # fmt: skip
    want = naive(q, [one, more], 512, 0.3, sink)[:2]
    assert_close(got, want, **DECODE)
    assert (got[0][:, :, 1] == 0).all() and (got[0][3] == 0).all() and (got[1][3] == math.inf).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_format_rank_page_and_selection(dtype, data):
    """float64 goes through the path for other devices, the rest through the one for CPUs."""
    plain = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}[dtype]
    kind = data.draw(st.sampled_from([plain, *QUANTISED]))
    fmt = CacheFormat(kind, data.draw(st.integers(1, 150)), data.draw(st.integers(0, 40)))
    batch, queries = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    caches = []
    for seed in range(data.draw(st.integers(1, 2))):
        topk = data.draw(st.integers(1, 30) | st.integers(505, 520))
        lengths = data.draw(
            st.none()
            | st.lists(st.integers(0, topk), min_size=batch, max_size=batch)
            | st.lists(
                st.lists(st.integers(0, topk), min_size=queries, max_size=queries),
                min_size=batch, max_size=batch,
            )
        )  # fmt: skip
        block_size = data.draw(st.sampled_from([1, 2, 61, 64]))
        tokens = data.draw(st.integers(1, 600))
        invalid = data.draw(st.sampled_from([0, 0.3, 1]))
        caches.append(
            cache(fmt, batch, queries, topk, tokens, block_size, invalid=invalid, lengths=lengths,
                  seed=seed)
        )  # fmt: skip
    q = queries_for(fmt, batch, queries, data.draw(st.integers(1, 4)), dtype)
    rank = data.draw(st.integers(1, fmt.width))
    sink = data.draw(st.none() | st.just(torch.linspace(-2, 2, q.shape[2])))
    got = run(q, fmt, rank, caches, sink)
    assert_close(got, naive(q, caches, rank, 0.2, sink), **TOLERANCE[dtype])


def run(q, fmt, rank, caches, sink=None, scale=0.2):
    one, more = caches[0], caches[1] if len(caches) > 1 else None
    return mla_sparse_decode(
        q, one.pages, one.indices, rank, softmax_scale=scale,
        cache_format=None if fmt.kind in PLAIN else fmt, topk_length=one.length, attn_sink=sink,
        extra_k_cache=more and more.pages, extra_indices=more and more.indices,
        extra_topk_length=more and more.length,
    )  # fmt: skip


def test_path_for_other_devices_in_float32_and_in_steps(monkeypatch):
    """Plain torch on the whole batch, a few selected rows at a time, agrees with the CPU's path."""
    fmt = CacheFormat("fp8", 128, 16)
    one = cache(fmt, 3, 2, 90, 200, 61, lengths=[0, 90, 31])
    q = queries_for(fmt, 3, 2, 4, torch.float32)
    want = run(q, fmt, 128, [one])
    monkeypatch.setenv("MLAKIT_KERNEL", "torch")
    for rows in (1, 70, 1 << 15):
        monkeypatch.setattr(torch_decode, "ROWS", rows)
        assert_close(run(q, fmt, 128, [one]), [t.double() for t in want], **FLOAT32)


@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(
    ("queries", "tokens", "topk", "heads", "width"),
    [(1, 512, 128, 64, 576), (62, 592, 128, 64, 512), (213, 300, 256, 16, 576),
     (5, 2000, 1024, 128, 576)],
)  # fmt: skip
def test_flash_mla_sparse_prefill(kind, queries, tokens, topk, heads, width):
    """kv as one piece; indices from s_kv on are as invalid as -1; natural logarithms."""
    fmt = CacheFormat(kind, 512, width - 512)
    lengths = torch.arange(queries) * 7 % (topk + 1)
    one = cache(fmt, 1, queries, topk, tokens, tokens, lengths=lengths[None].tolist())
    one.indices[0, :, 0][one.indices[0, :, 0] == -1] = tokens
    q = queries_for(fmt, 1, queries, heads, DTYPES[kind])
    sink = torch.linspace(-1, 8, heads)
    out, top, lse = flash_mla_sparse_fwd(
        q[0], one.pages[0], one.indices[0][:, None], 0.1, attn_sink=sink, topk_length=one.length[0]
    )
    assert top.shape == lse.shape == (queries, heads) and out.dtype == q.dtype
    want = naive(q, [one], 512, 0.1, sink)
    assert_close((out[None], lse.T[None], top.T[None]), want, **PREFILL)
    assert (out[0] == 0).all() and (lse[0] == math.inf).all() and (top[0] == -math.inf).all()


def test_empty_caches_and_selections():
    fmt = CacheFormat("fp32", 8, 4)
    q = queries_for(fmt, 2, 1, 3, torch.float32)
    for pages, topk in ((fmt.allocate(0, 4), 3), (fmt.allocate(2, 4), 0)):
        for dtype in (torch.float32, torch.float64):
            indices = torch.zeros(2, 1, topk, dtype=torch.int32)
            out, lse, top = mla_sparse_decode(
                q.to(dtype), pages.to(dtype), indices, 8, softmax_scale=1.0
            )
            assert (out == 0).all() and (lse == math.inf).all() and (top == -math.inf).all()
        nobody = torch.zeros(0, 1, topk, dtype=torch.int32)
        for dtype in (torch.float32, torch.float64):
            out, lse, _ = mla_sparse_decode(
                q[:0].to(dtype), pages.to(dtype), nobody, 8, softmax_scale=1.0
            )
            assert out.shape == (0, 1, 3, 8) and lse.shape == (0, 3, 1)
    none = torch.empty(0, 1, 12)
    out, _, _ = flash_mla_sparse_fwd(q[0], none, torch.zeros(1, 1, 3, dtype=torch.int32), 1.0, 8)
    assert (out == 0).all()


def test_reference_agrees_with_the_definition(monkeypatch):
    """The twin in the package, which the GPU's tests use, is the twin here."""
    fmt = CacheFormat("model1", 64, 16)
    caches = [cache(fmt, 2, 2, 9, 20, 4), cache(fmt, 2, 2, 5, 9, 3, lengths=[2, 0])]
    q = queries_for(fmt, 2, 2, 3, torch.float64)
    sink = torch.linspace(-2, 2, 3)
    monkeypatch.setenv("MLAKIT_KERNEL", "reference")
    assert_close(run(q, fmt, 80, caches, sink), naive(q, caches, 80, 0.2, sink), **FLOAT64)


def test_the_same_bits_every_time():
    fmt = CacheFormat("fp8", 512, 64)
    one = cache(fmt, 3, 2, 700, 900, 64)
    q = queries_for(fmt, 3, 2, 9, torch.bfloat16)
    runs = [run(q, fmt, 512, [one]) for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, runs[0]))


def test_operator_declares_what_it_does():
    """torch's own checks of schema, fake kernel, autograd registration and tracing."""
    fmt = CacheFormat("int8", 32, 8)
    one, more = cache(fmt, 2, 2, 6, 20, 4), cache(fmt, 2, 2, 3, 9, 2, lengths=[2, 0])
    q = queries_for(fmt, 2, 2, 3, torch.float32)
    first = selection(q, one.pages, one.indices, None, fmt, 32)
    second = selection(q, more.pages, more.indices, more.length, fmt, 32)
    args = (
        q.flatten(0, 1), first.pages, first.slots, first.counts, second.pages, second.slots,
        second.counts, 32, 0.2, torch.zeros(3), fmt.name, False,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.mlakit.mla_sparse_decode.default, args)


def test_compiles_without_graph_breaks():
    fmt = CacheFormat("fp8", 32, 8)
    one = cache(fmt, 2, 2, 6, 20, 4)
    q = queries_for(fmt, 2, 2, 3, torch.float32)

    def step(q, pages, indices):
        schedule = get_mla_metadata()
        return flash_mla_with_kvcache(
            q * 1.0, pages, None, None, 32, *schedule, is_fp8_kvcache=True, indices=indices
        )

    torch._dynamo.reset()
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(q, one.pages, one.indices)
    assert all(torch.equal(a, b) for a, b in zip(got, step(q, one.pages, one.indices)))


@dataclass(frozen=True)
class Call:
    """Arguments of flash_mla_with_kvcache, to be made wrong."""

    q: torch.Tensor
    k_cache: torch.Tensor
    block_table: torch.Tensor | None = None
    cache_seqlens: torch.Tensor | None = None
    causal: bool = False
    is_fp8_kvcache: bool = True
    indices: torch.Tensor | None = None
    attn_sink: torch.Tensor | None = None
    extra_k_cache: torch.Tensor | None = None
    extra_indices_in_kvcache: torch.Tensor | None = None
    topk_length: torch.Tensor | None = None
    extra_topk_length: torch.Tensor | None = None


INT = torch.ones(2, dtype=torch.int32)
REFUSED = {
    "causal is set beside indices": lambda c: replace(c, causal=True),
    "may be None only beside indices": lambda c: replace(c, indices=None),
    "topk_length is for sparse": lambda c: replace(c, indices=None, topk_length=INT),
    "attn_sink is for sparse": lambda c: replace(c, indices=None, attn_sink=torch.zeros(3)),
    "q 576 wide and head_dim_v 512 has 656": lambda c: replace(c, k_cache=c.k_cache[..., :9]),
    "k_cache is torch.float32": lambda c: replace(c, k_cache=c.k_cache.float()),
    "indices is torch.int64": lambda c: replace(c, indices=c.indices.long()),
    "indices has shape": lambda c: replace(c, indices=c.indices[:1]),
    "topk_length has shape": lambda c: replace(c, topk_length=INT[:1]),
    r"attn_sink has shape \[2\]": lambda c: replace(c, attn_sink=torch.zeros(2)),
    "one of them is missing": lambda c: replace(c, extra_k_cache=c.k_cache),
    "without an extra cache": lambda c: replace(c, extra_topk_length=INT),
    "extra_k_cache has shape": lambda c: replace(
        c, extra_k_cache=c.k_cache[..., :9], extra_indices_in_kvcache=c.indices
    ),
    "both should be the same": lambda c: replace(
        c, is_fp8_kvcache=False, k_cache=torch.zeros(2, 4, 1, 576)
    ),
    "should be \\[num_blocks, P, 1, 576\\]": lambda c: replace(
        c, is_fp8_kvcache=False, k_cache=torch.zeros(2, 4, 2, 576, dtype=torch.bfloat16)
    ),
    "indices is on meta": lambda c: replace(c, indices=c.indices.to("meta")),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_refused_calls(message):
    fmt = CacheFormat("fp8", 512, 64)
    one = cache(fmt, 2, 1, 6, 20, 4)
    q = queries_for(fmt, 2, 1, 3, torch.bfloat16)
    call = REFUSED[message](Call(q, one.pages, indices=one.indices))
    q, k_cache, table, lengths, *rest = vars(call).values()
    names = list(vars(call))[4:]
    with pytest.raises(UsageError, match=message):
        flash_mla_with_kvcache(
            q, k_cache, table, lengths, 512, *get_mla_metadata(), **dict(zip(names, rest))
        )


def test_schedules_of_sparse_calls():
    """2026: one object for one problem, topk included. Sept 2025: six arguments, two tensors."""
    fmt = CacheFormat("bf16", 512, 64)
    one, other = cache(fmt, 2, 1, 64, 90, 64), cache(fmt, 2, 1, 65, 90, 64)
    q = queries_for(fmt, 2, 1, 3, torch.bfloat16)
    tensors, schedule = (q, one.pages, None, None, 512), get_mla_metadata()
    want = flash_mla_with_kvcache(*tensors, *schedule, indices=one.indices)
    with pytest.raises(UsageError, match="first used for"):
        flash_mla_with_kvcache(*tensors, *schedule, indices=other.indices)
    lengths = torch.zeros(2, dtype=torch.int32)
    metadata, splits = get_mla_metadata(lengths, 3, 1, 3, True, 64)
    assert splits[-1] >= 2 and metadata[0, 3] >= 1
    got = flash_mla_with_kvcache(*tensors, metadata, splits, indices=one.indices)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    with pytest.raises(UsageError, match=r"\[s_q, h_q, d\], \[s_kv, 1, d\]"):
        flash_mla_sparse_fwd(q, one.pages[0], one.indices[0], 1.0)
