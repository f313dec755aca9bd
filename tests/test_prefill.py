"""Prompts on a CPU: attention in blocks of queries, and a history that is expanded for a chunk."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from latent_models import in_steps, latent_model
from latent_models import token_ids as tokens
from mlakit.nn import attend
from mlakit.nn.hf import new_cache
from mlakit.nn.latent_attention import MLAttention
from mlakit.ops.cpu_prefill import BLOCK, prefill

ROUNDING = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2.0**-6}
"""Of values up to 4: the largest errors seen are 2.1e-15, 1.4e-6 and 0.0120."""


def attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """The definition, in float64: ``[B, S, H, V]``."""
    scores = 0.3 * query.double() @ key.double().mT
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0)
    return (weights @ value.double()).transpose(1, 2)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("length", [1, 7, BLOCK, BLOCK + 1, 2 * BLOCK + 100])
def test_prefill_is_causal_attention(dtype: torch.dtype, length: int) -> None:
    torch.manual_seed(length)
    query, key = (torch.randn(2, 3, length, 24).to(dtype) for _ in range(2))
    value = torch.randn(2, length, 3, 16).to(dtype).transpose(1, 2)
    got = prefill(query, key, value, softmax_scale=0.3)
    exact = attention(query, key, value, torch.ones(length, length, dtype=torch.bool).tril())
    assert got.dtype == dtype and got.shape == (2, length, 3, 16)
    assert (got.double() - exact).abs().max() < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", ROUNDING)
def test_prefill_sees_what_it_may(dtype: torch.dtype) -> None:
    """More keys than queries, a mask per sequence; a query without any key gets numbers."""
    torch.manual_seed(0)
    query = torch.randn(2, 3, BLOCK + 44, 24).to(dtype)
    key, value = (torch.randn(2, 3, 500, size).to(dtype) for size in (24, 16))
    visible = torch.rand(2, 1, BLOCK + 44, 500) < 0.3
    visible[1, 0, 5] = False
    got = prefill(query, key, value, softmax_scale=0.3, visible=visible)
    error = (got.double() - attention(query, key, value, visible)).abs().amax((2, 3))
    assert got.isfinite().all()
    error[1, 5] = 0.0
    assert error.max() < ROUNDING[dtype]


@pytest.mark.parametrize("form", ["compress", "equal-cache", "article"])
def test_long_prompts_take_the_blocks(form: str, monkeypatch: Any) -> None:
    """Padded and plain, the logits are those of transformers' own attention."""
    model = latent_model(form=form, attn_implementation="sdpa", max_position_embeddings=1024)
    ids = tokens(2, BLOCK + 50)
    mask = torch.ones_like(ids)
    mask[1, :60] = 0
    for given in (None, mask):
        with torch.no_grad():
            ours = model(ids, attention_mask=given).logits
            monkeypatch.setattr(attend, "BLOCK", 10**6)
            theirs = model(ids, attention_mask=given).logits
            monkeypatch.undo()
        kept = mask.bool() if given is not None else torch.ones_like(ids).bool()
        # float32: two layers' sums in another order; the largest difference seen is 2.1e-5.
        assert (ours - theirs)[kept].abs().max() < 1e-4


def test_what_trains_is_left_to_torch() -> None:
    query = torch.zeros(1, 2, BLOCK, 4)
    with torch.no_grad():
        assert attend.reads_in_blocks(query, None)
        assert not attend.reads_in_blocks(query[:, :, 1:], None)
        assert not attend.reads_in_blocks(query, None, is_causal=False)
        assert not attend.reads_in_blocks(query, torch.zeros(1, 1, BLOCK, BLOCK))
    assert not attend.reads_in_blocks(query, None)  # keys may train where queries do not
    module = SimpleNamespace(
        config=SimpleNamespace(_attn_implementation="sdpa"),
        scaling=1.0, softcap=None, attention_dropout=0.0, training=True,
    )  # fmt: skip
    key, value = (torch.randn(1, 2, BLOCK, size, requires_grad=True) for size in (4, 3))
    attend.attend(module, query, key, value, None)[0].sum().backward()
    assert key.grad is not None and value.grad is not None
    torch.testing.assert_close(value.grad.sum(), torch.tensor(2.0 * BLOCK * 3))


@pytest.mark.parametrize("form", ["compress", "equal-cache"])
@pytest.mark.parametrize("window", [None, 300])
def test_a_long_chunk_expands_its_history(form: str, window: int | None, monkeypatch: Any) -> None:
    """With and without a window; absorbed attention makes the same logits."""
    changes = {} if window is None else {"sliding_window": window}
    family = "llama" if window is None else "mistral"
    model = latent_model(
        family, form=form, attn_implementation="sdpa", max_position_embeddings=2048, **changes
    )
    ids, expanded = tokens(2, 900), []
    read = MLAttention.read_expanded

    def counted(self: Any, *arguments: Any) -> Tensor:
        expanded.append(arguments)
        return read(self, *arguments)

    monkeypatch.setattr(MLAttention, "read_expanded", counted)
    whole = in_steps(model, ids, new_cache(model, 2, 900), (400, 400, 100))
    assert len(expanded) == len(model.model.layers)  # the second step: 100 queries are too few
    monkeypatch.setattr(MLAttention, "gains_by_expanding", lambda *arguments: False)
    absorbed = in_steps(model, ids, new_cache(model, 2, 900), (400, 400, 100))
    # float32: sums in another order; the largest difference seen is 3.2e-5.
    assert (whole - absorbed).abs().max() < 1e-4
