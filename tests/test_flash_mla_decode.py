"""Calls handed to FlashMLA, with stand-ins for both generations of it.

The stand-ins have the original's signatures, are as strict about shapes, and compute by our own
functions of the same names, which test_flash_mla.py checks.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from decode_cases import SIXTEEN_BITS, assert_close, problem
from mlakit import ops
from mlakit.ops import CacheFormat, flash_mla_decode, reference
from mlakit.ops.call import SparseCall, selection

BF16 = torch.bfloat16


def check_dense(q, k_cache, head_dim_v):
    assert q.shape[3] == k_cache.shape[3] == 576 and k_cache.shape[1] == 64 and head_dim_v == 512
    assert q.dtype == k_cache.dtype in (torch.bfloat16, torch.float16) and q.stride(3) == 1


def check_sparse(q, block_table, indices, is_fp8_kvcache):
    assert is_fp8_kvcache and q.dtype == BF16 and q.shape[2] in (64, 128)
    assert indices.dtype == torch.int32 and indices.shape[:2] == q.shape[:2]
    assert indices.shape[2] % 64 == 0 and indices.is_contiguous()


def of_2025():
    """September 2025: metadata of two tensors, no extra cache."""

    def get_mla_metadata(
        cache_seqlens, num_heads_per_head_k, num_heads_k, num_heads_q=None, is_fp8_kvcache=False,
        topk=None,
    ):  # fmt: skip
        return ops.get_mla_metadata(
            cache_seqlens, num_heads_per_head_k, num_heads_k, num_heads_q, is_fp8_kvcache, topk
        )

    def flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits,
        softmax_scale=None, causal=False, is_fp8_kvcache=False, indices=None,
    ):  # fmt: skip
        assert block_table is not None and cache_seqlens.shape == q.shape[:1]
        if indices is None:
            check_dense(q, k_cache, head_dim_v)
        else:
            check_sparse(q, block_table, indices, is_fp8_kvcache)
        return ops.flash_mla_with_kvcache(
            q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata,
            num_splits, softmax_scale, causal, is_fp8_kvcache, indices,
        )  # fmt: skip

    return get_mla_metadata, flash_mla_with_kvcache


def of_february_2025():
    get_mla_metadata, with_kvcache = of_2025()

    def flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits,
        softmax_scale=None, causal=False,
    ):  # fmt: skip
        return with_kvcache(
            q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata,
            num_splits, softmax_scale, causal,
        )  # fmt: skip

    def three(cache_seqlens, num_heads_per_head_k, num_heads_k):
        return get_mla_metadata(cache_seqlens, num_heads_per_head_k, num_heads_k)

    return three, flash_mla_with_kvcache


def of_2026():
    """Since January 2026: an object that the first call fills."""

    def get_mla_metadata(*args, **kwargs):
        return ops.get_mla_metadata()

    def flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata,
        num_splits=None, softmax_scale=None, causal=False, is_fp8_kvcache=False, indices=None,
        attn_sink=None, extra_k_cache=None, extra_indices_in_kvcache=None, topk_length=None,
        extra_topk_length=None,
    ):  # fmt: skip
        assert isinstance(tile_scheduler_metadata, ops.TileSchedule) and num_splits is None
        if indices is None:
            check_dense(q, k_cache, head_dim_v)
        else:
            assert block_table is None and cache_seqlens is None and not causal
            check_sparse(q, block_table, indices, is_fp8_kvcache)
        return ops.flash_mla_with_kvcache(
            q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata,
            num_splits, softmax_scale, causal, is_fp8_kvcache, indices, attn_sink, extra_k_cache,
            extra_indices_in_kvcache, topk_length, extra_topk_length,
        )  # fmt: skip

    return get_mla_metadata, flash_mla_with_kvcache


GENERATIONS = {"February 2025": of_february_2025, "2025": of_2025, "2026": of_2026}


@pytest.fixture
def install(monkeypatch):
    def installed(generation):
        module = ModuleType("flash_mla")
        module.__spec__ = ModuleSpec("flash_mla", None)
        module.get_mla_metadata, module.flash_mla_with_kvcache = GENERATIONS[generation]()
        monkeypatch.setitem(sys.modules, "flash_mla", module)

    return installed


def stored(kind, tokens, block_size, seed=0):
    """Pages of a format with some rows in them."""
    fmt = CacheFormat(kind, 448 if kind == "model1" else 512, 64)
    generator = torch.Generator().manual_seed(seed)
    pages = fmt.allocate(-(-tokens // block_size), block_size)
    rows = (torch.randn(tokens, fmt.width, generator=generator) / 10).to(BF16)
    fmt.append(pages, torch.arange(tokens), rows)
    return fmt, pages


def sparse_call(kind, *, queries=2, heads=64, topk=70, caches=1):
    generator = torch.Generator().manual_seed(1)
    q, selections = None, []
    for number in range(caches):
        fmt, pages = stored(kind, 200, 64, seed=number)
        if q is None:
            q = (torch.randn(3, queries, heads, fmt.width, generator=generator) / 10).to(BF16)
        indices = torch.randint(-20, 240, (3, queries, topk), generator=generator).int()
        indices[indices >= 200] = 2147480000
        length = torch.tensor([[topk, 3], [0, 9], [topk - 1, topk]])[:, :queries].int()
        selections.append(selection(q, pages, indices, length, fmt, 512))
    return SparseCall(q.flatten(0, 1), tuple(selections), 512, 0.1, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_dense(install, generation, causal, dtype):
    install(generation)
    call = problem([140, 0, 1, 64], 6, kv_heads=2, queries=2, causal=causal, dtype=dtype).call
    assert_close(flash_mla_decode.decode(call), reference.decode(call), **SIXTEEN_BITS)


@pytest.mark.parametrize("caches", [1, 2])
@pytest.mark.parametrize("kind", ["fp8", "model1"])
@pytest.mark.parametrize("generation", ["2025", "2026"])
def test_sparse(install, generation, kind, caches):
    """Counts, invalid slots and a number of them that is no multiple of a block."""
    install(generation)
    call = sparse_call(kind, caches=caches)
    if generation == "2025" and caches == 2:
        assert "too old: it knows no extra_k_cache" in flash_mla_decode.why_not(call)
        return
    out, lse, top = flash_mla_decode.decode_selected(call)
    want = reference.decode_selected(call)[:2]
    assert_close((out, lse), want, **(SIXTEEN_BITS | {"absolute": 1e-3}))
    assert top.shape == lse.shape and top.isnan().all()


def test_why_not(install, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_mla", None)
    call = problem([70], 4, dtype=BF16).call
    monkeypatch.setattr(flash_mla_decode, "find_spec", lambda name: None)
    assert flash_mla_decode.why_not(call) == "flash_mla is not installed"
    monkeypatch.undo()
    install("2026")
    sparse = sparse_call("fp8")
    bf16 = sparse.selections[0]._replace(cache_format=CacheFormat("bf16", 512, 64))
    for other, reason in [
        (call, "NVIDIA GPUs"),  # the only thing it lacks
        (sparse, "NVIDIA GPUs"),
        (problem([70], 4).call, "bfloat16 and float16"),
        (problem([70], 4, rank=256, dtype=BF16).call, "kv_lora_rank 512"),
        (problem([70], 4, width=64, dtype=BF16).call, "kv_lora_rank 512"),
        (problem([70], 4, block_size=32, dtype=BF16).call, "pages of 64"),
        (problem([70], 4, soft_cap=1.0, dtype=BF16).call, "soft cap"),
        (problem([70], 4, sliding_window=9, dtype=BF16).call, "sliding window"),
        (problem([70], 4, queries=[1], dtype=BF16).call, "same number of queries"),
        (problem([70], 4, dtype=BF16, batch_invariant=True).call, "depends on the batch"),
        (replace(call, cache_format=CacheFormat("fp8", 512, 64)), "not quantised"),
        (sparse_call("fp8", heads=9), "64 and 128 heads"),
        (replace(sparse, q=sparse.q.half()), "bfloat16"),
        (replace(sparse, kv_lora_rank=64), "kv_lora_rank 512"),
        (replace(sparse, selections=(bf16,)), "not bf16"),
    ]:
        assert reason in flash_mla_decode.why_not(other)
    install("February 2025")
    assert "too old: it knows no indices" in flash_mla_decode.why_not(sparse)
