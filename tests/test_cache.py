"""LatentCache: bytes, pages, ragged rows, poison, and what transformers asks of a cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from latent_models import FORMS, in_steps, latent_model, token_ids
from mlakit.account import cache_bytes
from mlakit.errors import MlakitError, UsageError
from mlakit.nn.cache import LatentCache
from mlakit.nn.hf import attention_specs, cache_nbytes, new_cache
from mlakit.nn.page_pool import PagePool
from mlakit.ops import CacheFormat
from mlakit.spec import QUANTISED_ROWS, AttentionSpec

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
"""float32 logits of size 6, sums in another order."""

SPEC = AttentionSpec(
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    softmax_scale=1.0,
    kv_lora_rank=3,
    qk_nope_head_dim=8,
    qk_rope_head_dim=2,
    v_head_dim=8,
    mla_form="compress",
)


def small_cache(batch: int = 2, length: int = 10, block_size: int = 4) -> LatentCache:
    """Two layers of rows of five numbers, every unused number NaN."""
    cache = LatentCache([SPEC, SPEC], batch, length, dtype=torch.float32, block_size=block_size)
    poison(cache)
    return cache


def poison(cache: LatentCache) -> None:
    for pages in cache.pages:
        pages.fill_(float("nan"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 64, 65, 200])
def test_bytes_are_the_accounts(form: str, length: int) -> None:
    model = latent_model(form=form).bfloat16()
    cache = new_cache(model, 3, length)
    assert isinstance(cache, LatentCache)
    expected = cache_bytes(attention_specs(model), 3, length, 2, block_size=64)
    assert cache.nbytes == cache_nbytes(cache) == expected
    assert sum(pages.untyped_storage().nbytes() for pages in cache.pages) == expected
    assert cache.nbytes_per_token * 3 * -(-length // 64) * 64 == expected
    width = attention_specs(model)[0].cache_width
    assert {tuple(pages.shape) for pages in cache.pages} == {(3 * -(-length // 64), 64, 1, width)}
    assert cache.block_table.dtype == cache.cache_seqlens.dtype == torch.int32


@pytest.mark.parametrize("kind", QUANTISED_ROWS)
@pytest.mark.parametrize("rank", [3, 64, 130])
def test_bytes_of_quantised_rows_are_the_accounts(kind: str, rank: int) -> None:
    spec = replace(SPEC, kv_lora_rank=rank, cache_format=kind)
    cache = LatentCache([spec, SPEC], 3, 70, dtype=torch.bfloat16)
    assert cache.nbytes == cache_bytes([spec, SPEC], 3, 70, 2, block_size=64)
    row = CacheFormat(kind, rank, 2).bytes_per_token
    assert spec.cache_row_bytes(2) == row == cache.nbytes_per_token - 5 * 2


class RoundedCache(LatentCache):
    """Plain pages whose rows went through a quantised format on their way in."""

    def append(self, layer_idx: int, rows: Tensor) -> None:
        how = self.formats[layer_idx]
        slots = torch.arange(rows.shape[0] * rows.shape[1])
        there = how.allocate(1, len(slots))
        how.append(there, slots, rows.flatten(0, 1))
        super().append(layer_idx, how.read(there, slots).view_as(rows))

    def stored(self, layer_idx: int, rows: Tensor) -> Tensor:
        return self.read(layer_idx, rows.shape[1]).unsqueeze(1)


@pytest.mark.parametrize("kind", QUANTISED_ROWS)
@pytest.mark.parametrize("form", FORMS)
def test_steps_on_quantised_rows_are_steps_on_what_they_hold(form: str, kind: str) -> None:
    model, ids = latent_model("mistral", form, sliding_window=9), token_ids(3, 21)
    plain = RoundedCache(attention_specs(model), 3, 21, dtype=torch.float32, block_size=4)
    model.config.cache_format = kind
    cache = LatentCache(attention_specs(model), 3, 21, dtype=torch.float32, block_size=4)
    for pages in cache.pages:
        pages.fill_(255)
    plain.formats = [layer.cache_format for layer in cache.layers]
    steps = [in_steps(model, ids, held, (6, 5, *[1] * 10)) for held in (cache, plain)]
    torch.testing.assert_close(*steps, **CLOSE)
    assert cache.nbytes < plain.nbytes


@pytest.mark.parametrize("kind", QUANTISED_ROWS)
@pytest.mark.parametrize("form", FORMS)
def test_quantised_rows_give_the_same_in_one_chunk_or_several(form: str, kind: str) -> None:
    """Also the first chunk sees what the pages hold, and left padding changes nothing."""
    model, ids = latent_model(form=form, cache_format=kind), token_ids(2, 20)
    logits = []
    for chunks, padding in (((20,), 0), ((7, 1, 12), 0), ((20,), 3)):
        cache = LatentCache(attention_specs(model), 2, 23, dtype=torch.float32, block_size=4)
        if padding:
            mask = torch.ones(2, 20 + padding, dtype=torch.long)
            mask[:, :padding] = 0
            given = torch.cat((ids[:, :padding], ids), dim=1)
            positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
            arguments = {"attention_mask": mask, "position_ids": positions}
            with torch.no_grad():
                whole = model(input_ids=given, past_key_values=cache, **arguments).logits
            logits.append(whole[:, padding:])
        else:
            logits.append(in_steps(model, ids, cache, chunks))
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], **CLOSE)


@pytest.mark.parametrize("form", FORMS)
def test_poison_and_page_order_do_not_matter(form: str) -> None:
    model, ids = latent_model(form=form), token_ids(3, 20)
    with torch.no_grad():
        whole = model(ids).logits
    cache = LatentCache(attention_specs(model), 3, 21, dtype=torch.float32, block_size=4)
    poison(cache)
    shuffled = torch.randperm(cache.block_table.numel(), generator=torch.Generator().manual_seed(0))
    cache.block_table.copy_(shuffled.view_as(cache.block_table))
    steps = in_steps(model, ids, cache, (6, 5, *[1] * 9))
    torch.testing.assert_close(steps, whole, **CLOSE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [None, 3])
def test_rows_of_their_own_lengths(form: str, window: int | None) -> None:
    """Left padding, a row that gets nothing in a step, and two tokens for some rows."""
    model, ids = latent_model("mistral", form, sliding_window=window), token_ids(3, 12)
    cache = LatentCache(attention_specs(model), 3, 12, dtype=torch.float32, block_size=4)
    poison(cache)
    given_tokens = [0, 0, 0]
    with torch.no_grad():
        whole = model(ids).logits
        for counts in ([5, 2, 1], [1, 1, 1], [0, 2, 1], [3, 0, 2], [1, 1, 0]):
            width = max(counts)
            part, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width)
            for row, count in enumerate(counts):
                start = given_tokens[row]
                part[row, width - count :] = ids[row, start : start + count]
                mask[row, width - count :] = 1
            logits = model(part, attention_mask=mask, past_key_values=cache).logits
            for row, count in enumerate(counts):
                start, given_tokens[row] = given_tokens[row], given_tokens[row] + count
                torch.testing.assert_close(
                    logits[row, width - count :], whole[row, start : start + count], **CLOSE
                )
    assert cache.lengths == cache.cache_seqlens.tolist() == given_tokens == [10, 6, 5]


def test_right_padded_prompts_start_a_cache() -> None:
    model, ids = latent_model(), token_ids(2, 8)
    mask = torch.tensor([[1] * 8, [1] * 3 + [0] * 5])
    cache = new_cache(model, 2, 10)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        step = model(ids[:, :1], past_key_values=cache).logits[1, 0]
        alone = model(torch.cat((ids[1:, :3], ids[1:, :1]), dim=1)).logits[0, -1]
    torch.testing.assert_close(step, alone, **CLOSE)


def test_errors_name_what_is_wrong() -> None:
    cache = small_cache(length=10)
    with pytest.raises(MlakitError, match="max_length=10"):
        cache.begin_step(2, 11)
    assert cache.lengths == [0, 0] and cache.get_seq_length() == 0
    with pytest.raises(MlakitError, match="2 sequences, the input has 3"):
        cache.begin_step(3, 1)
    with pytest.raises(MlakitError, match="2-D"):
        cache.begin_step(2, 2, torch.ones(2, 1, 2, 2))
    with pytest.raises(MlakitError, match="at least 2"):
        cache.begin_step(2, 2, torch.ones(2, 1))
    fill(cache, torch.rand(2, 3, 5))
    with pytest.raises(MlakitError, match="padded on the right"):
        cache.begin_step(2, 2, torch.tensor([[1, 1], [1, 0]]))
    with pytest.raises(UsageError, match="at least 1"):
        small_cache(length=0)
    plain = AttentionSpec(32, 4, 4, 8, 1.0)
    with pytest.raises(UsageError, match="keys and values"):
        LatentCache([plain], 1, 1, dtype=torch.float32)


def fill(cache: LatentCache, rows: Tensor, mask: Tensor | None = None) -> None:
    """Gives ``[B, S, 5]`` to both layers; the second one gets the negative."""
    cache.begin_step(*rows.shape[:2], mask)
    cache.append(0, rows)
    cache.append(1, -rows)


def contents(cache: LatentCache, layer: int) -> list[list[float]]:
    """First number of every token of every row."""
    longest = max(cache.lengths)
    rows = cache.read(layer, longest)[..., 0].tolist() if longest else [[] for _ in cache.lengths]
    return [row[longest - length :] for row, length in zip(rows, cache.lengths)]


OPERATION = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 4), st.integers(0, 2**12)),
    st.tuples(st.just("crop"), st.integers(0, 5), st.booleans()),
    st.tuples(st.just("reorder"), st.integers(0, 10**6), st.just(0)),
    st.tuples(st.just("repeat"), st.integers(1, 2), st.just(0)),
    st.tuples(st.just("select"), st.integers(0, 10**6), st.just(0)),
    st.tuples(st.just("reset"), st.just(0), st.just(0)),
)


@settings(max_examples=150, deadline=None)
@given(operations=st.lists(OPERATION, max_size=12))
def test_any_history_equals_lists(operations: list[tuple[str, int, int]]) -> None:
    """Whatever transformers does to a cache, the rows are those of plain Python lists."""
    cache, rows, columns, counter = small_cache(batch=2, length=9), [[], []], 0, 0.0
    for name, number, extra in operations:
        if name == "add":
            counts = [extra // 5**row % (number + 1) for row in range(len(rows))]
            if max(len(row) + count for row, count in zip(rows, counts)) > 9:
                continue
            new, mask = torch.full((len(rows), number, 5), float("nan")), []
            for row, count in zip(range(len(rows)), counts):
                for step in range(count):
                    counter += 1
                    new[row, number - count + step] = counter
                    rows[row].append(counter)
                mask.append([0] * (number - count) + [1] * count)
            fill(cache, new, torch.tensor(mask))
            columns += number
        elif name == "crop":
            left = max(0, columns - number)
            cache.crop(torch.tensor(-number) if extra or left == 0 else left)
            rows = [row[: max(0, len(row) - number)] for row in rows]
            columns = left
        elif name == "reorder":
            order = [number // 7**row % len(rows) for row in range(len(rows))]
            cache.reorder_cache(torch.tensor(order))
            rows = [list(rows[row]) for row in order]
        elif name == "repeat" and len(rows) < 5:
            cache.batch_repeat_interleave(number)
            rows = [list(row) for row in rows for _ in range(number)]
        elif name == "select":
            kept = [row for row in range(len(rows)) if number >> row & 1] or [0]
            cache.batch_select_indices(torch.tensor(kept))
            rows = [rows[row] for row in kept]
        elif name == "reset":
            cache.reset()
            rows, columns = [[] for _ in rows], 0
        assert cache.get_seq_length() == columns and cache.batch_size == len(rows)
        assert cache.lengths == cache.cache_seqlens.tolist() == [len(row) for row in rows]
        assert contents(cache, 0) == rows
        assert contents(cache, 1) == [[-value for value in row] for row in rows]


def test_what_transformers_asks() -> None:
    cache = small_cache(length=10)
    fill(cache, torch.rand(2, 3, 5))
    assert cache.get_mask_sizes(2, 0) == (5, 0)
    assert cache.get_max_length() == 10 and cache.layers[0].get_max_cache_shape() == 10
    assert not cache.is_compileable and cache.is_sliding == [False, False] and len(cache) == 2


def test_visible_is_causal_within_a_window() -> None:
    cache = small_cache(batch=2, length=10)
    fill(cache, torch.rand(2, 6, 5), torch.tensor([[1] * 6, [0] * 4 + [1] * 2]))
    seen = cache.visible(count=5, length=2)[:, 0].int().tolist()
    assert seen == [[[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], [[0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]]
    seen = cache.visible(count=5, length=2, window=3)[0, 0].int().tolist()
    assert seen == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]


def stock_deepseek() -> Any:
    """transformers' own MLA model, which caches latents through ``update``."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=3,
        qk_rope_head_dim=2,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=2,
        max_position_embeddings=64,
        eos_token_id=None,
        pad_token_id=0,
    )
    return DeepseekV3ForCausalLM(config).eval()


def test_a_stock_deepseek_model_can_use_it() -> None:
    model, ids = stock_deepseek(), token_ids(2, 6)
    mask = torch.tensor([[1] * 6, [0] * 2 + [1] * 4])
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    cache = small_cache(batch=2, length=20)
    assert torch.equal(
        model.generate(ids, past_key_values=cache, **options), model.generate(ids, **options)
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_pool_feeds_any_sequences_at_any_pace(form: str) -> None:
    """Three texts of one prefix, fed in different company each time; two share a page."""
    model, ids = latent_model(form=form), token_ids(3, 14)
    ids[1, :4] = ids[0, :4]
    with torch.no_grad():
        whole = model(ids).logits
    pool = PagePool(attention_specs(model), 20, dtype=torch.float32, block_size=4)
    poison(pool)
    tables = [[7, 3, 12, 0], [7, 9, 1, 4], [19, 2, 5, 11]]

    def feed(*spans: tuple[int, int, int]) -> None:
        rows, starts, stops = zip(*spans)
        new = [ids[row, start:stop].tolist() for row, start, stop in spans]
        found = pool.feed(model, [tables[row] for row in rows], starts, new)
        expected = torch.stack([whole[row, stop - 1] for row, stop in zip(rows, stops)])
        torch.testing.assert_close(found, expected, **CLOSE)

    feed((0, 0, 4))
    feed((2, 0, 3), (0, 4, 9))
    feed((1, 4, 10), (2, 3, 4), (0, 9, 10))
    feed((0, 10, 11), (1, 10, 11), (2, 4, 5))
    feed((2, 5, 14))
    with pytest.raises(MlakitError, match="pool"):
        pool.reorder_cache(torch.tensor([0, 1]))
