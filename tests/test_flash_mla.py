"""FlashMLA's interface on top of mla_decode, in both generations."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decode_cases import problem
from mlakit.errors import UsageError
from mlakit.ops import flash_mla_with_kvcache, get_mla_metadata
from mlakit.ops.flash_mla import tile_schedule


def test_flash_mla_both_generations():
    """2025: three arguments give two tensors. 2026: none give a schedule object and None."""
    case = problem([70, 5], 4, queries=2, rank=512, dtype=torch.bfloat16)
    want = case.decode()
    tensors = (case.q, case.k_cache, case.block_table, case.cache_seqlens, 512)
    metadata, splits = get_mla_metadata(case.cache_seqlens, 2 * 4 // 1, 1)
    assert metadata.dtype == splits.dtype == torch.int32
    assert metadata.shape[1:] == (8,) and splits.shape == (3,)
    old = flash_mla_with_kvcache(*tensors, metadata, splits, causal=True)
    schedule, nothing = get_mla_metadata()
    new = flash_mla_with_kvcache(*tensors, schedule, nothing, causal=True)
    for got in (old, new):
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert old[0].shape == (2, 2, 4, 512) and old[1].shape == (2, 4, 2)
    with pytest.raises(UsageError, match="first used for"):
        flash_mla_with_kvcache(*tensors, schedule, causal=False)
    with pytest.raises(UsageError, match="not one for a batch of 2"):
        flash_mla_with_kvcache(*tensors, metadata)
    with pytest.raises(UsageError, match="not what get_mla_metadata returns"):
        flash_mla_with_kvcache(*tensors, schedule, splits)
    with pytest.raises(UsageError, match="some of its arguments"):
        get_mla_metadata(case.cache_seqlens)
    with pytest.raises(UsageError, match="576 bytes per token"):
        flash_mla_with_kvcache(*tensors, metadata, splits, is_fp8_kvcache=True)


def test_causal_is_off_by_default_in_flash_mla_only():
    case = problem([9], 1, queries=2, rank=8, rope=4)
    tensors = (*case.args[:4], 8)
    out = flash_mla_with_kvcache(*tensors, *get_mla_metadata())[0]
    torch.testing.assert_close(
        out, replace(case, options=case.options | {"causal": False}).decode()[0], atol=0, rtol=0
    )
    assert not torch.equal(out, case.decode()[0])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5000), max_size=12), st.integers(1, 132))
def test_schedule_covers_every_block_once(lengths, parts):
    metadata, num_splits = tile_schedule(torch.tensor(lengths, dtype=torch.int32), parts)
    assert metadata.dtype == num_splits.dtype == torch.int32
    rows, splits = metadata.tolist(), num_splits.tolist()
    assert len(rows) == parts and len(splits) == len(lengths) + 1
    blocks = [math.ceil(length / 64) for length in lengths]
    covered = [[] for _ in lengths]
    pieces = [0] * len(lengths)
    for first, first_block, last, last_end, first_split, *_ in rows:
        for request in range(first, last + 1):
            assert pieces[request] == (first_split if request == first else 0)
            begin = first_block if request == first else 0
            covered[request] += range(begin, last_end if request == last else blocks[request])
            pieces[request] += 1
    assert covered == [list(range(count)) for count in blocks]
    assert [b - a for a, b in itertools.pairwise(splits)] == pieces
    assert sum(pieces) <= len(lengths) + parts


def test_metadata_reads_nothing_on_the_host():
    """Tensors of the meta device have no values to read, so a CUDA graph captures the call too."""
    lengths = torch.zeros(5, dtype=torch.int32, device="meta")
    metadata, splits = get_mla_metadata(lengths, 128, 1)
    assert metadata.shape == (torch.get_num_threads() // 2 or 1, 8) and splits.shape == (6,)
