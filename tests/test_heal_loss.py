"""Losses of healing: their values, their gradients, and what they keep in memory."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from mlakit.healing.loss import LogitLoss, chunked
from mlakit.healing.pair import Pair, relative_errors
from mlakit.healing.recipe import Recipe
from mlakit.healing.trainable import choose_trainable
from mlakit.nn.hf import load
from tiny_models import save_tiny

TOKENS, WIDTH, VOCABULARY = 37, 12, 50


def setup() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    teacher = 2 * torch.randn(TOKENS, VOCABULARY)
    return hidden, weight, teacher, torch.randint(VOCABULARY, (TOKENS,))


def in_chunks(
    loss: LogitLoss, hidden: torch.Tensor, weight: torch.Tensor, teacher: torch.Tensor,
    targets: torch.Tensor, rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    def part(
        states: torch.Tensor, weights: list[torch.Tensor], chunk: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return loss(states @ weights[0].T, teacher[chunk], targets[chunk])

    return chunked(part, hidden, [weight], rows)


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("top_k,temperature", [(0, 1.0), (0, 2.5), (7, 1.5)])
def test_chunks_give_the_gradient_of_the_whole(rows: int, top_k: int, temperature: float) -> None:
    loss = LogitLoss(0.7, 1.3, temperature, top_k)
    hidden, weight, teacher, targets = setup()
    whole, facts = loss(hidden @ weight.T, teacher, targets)
    expected = torch.autograd.grad(3 * whole, [hidden, weight])
    total, found = in_chunks(loss, hidden, weight, teacher, targets, rows)
    slopes = torch.autograd.grad(3 * total, [hidden, weight])
    # float32: sums of some hundred terms in another order
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, facts, rtol=1e-5, atol=1e-5)
    for slope, wanted in zip(slopes, expected, strict=True):
        # sums over tokens of such sums, three times as large
        torch.testing.assert_close(slope, wanted, rtol=1e-4, atol=1e-4)


def test_divergence_against_float64() -> None:
    student, teacher = torch.randn(2, 9, 30, dtype=torch.float64)
    p, q = (x.div(1.7).softmax(-1) for x in (teacher, student))
    expected = (p * (p.log() - q.log())).sum(-1) * 1.7**2
    found = LogitLoss(0, 1, 1.7).divergence(student, teacher)
    # both float64; log p is taken in two ways
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_top_k_is_below_the_whole_and_reaches_it() -> None:
    """Merging outcomes can only lower a KL divergence (data processing)."""
    student, teacher = torch.randn(2, 9, 30, dtype=torch.float64)
    found = [LogitLoss(0, 1, 1.0, k).divergence(student, teacher) for k in (1, 5, 20, 29, 0)]
    for smaller, larger in pairwise(found):
        assert (smaller <= larger + 1e-9).all()
    torch.testing.assert_close(found[-2], found[-1], rtol=1e-6, atol=1e-9)
    assert torch.equal(LogitLoss(0, 1, 1.0, 30).divergence(student, teacher), found[-1])


def test_no_tensor_of_all_logits_is_kept() -> None:
    loss = LogitLoss(1.0, 1.0)
    hidden, weight, teacher, targets = setup()
    kept: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        in_chunks(loss, hidden, weight, teacher, targets, 5)
    assert max(kept) <= max(hidden.numel(), weight.numel(), 5 * VOCABULARY)
    assert max(kept) < TOKENS * VOCABULARY


def test_no_counted_token_is_no_loss() -> None:
    hidden, weight, teacher, targets = setup()
    none = slice(0, 0)
    total, _ = in_chunks(LogitLoss(1, 1), hidden[none], weight, teacher[none], targets[none], 4)
    (slope,) = torch.autograd.grad(total, [weight])
    assert total == 0 and not slope.any()


def test_cross_entropy_is_torchs_own() -> None:
    hidden, weight, teacher, targets = setup()
    _, facts = LogitLoss(1, 1)(hidden @ weight.T, teacher, targets)
    expected = functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    assert facts[0] == expected


@pytest.mark.parametrize("family", ["llama", "granite", "gemma2", "gemma3_text", "qwen2_moe"])
def test_losses_are_those_of_the_models_own_logits(tmp_path: Path, family: str) -> None:
    """Embedding factors, soft caps and logit scales are the family's."""
    options = {"final_logit_softcapping": 3.0} if family == "gemma2" else {}
    options = {"logits_scaling": 4.0} if family == "granite" else options
    folders = [save_tiny(tmp_path / name, family, **options) for name in ("student", "teacher")]
    student, teacher = (load(folder) for folder in folders)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.05)
    recipe = Recipe(ce_weight=1.0, kl_weight=1.0)
    choose_trainable(student, recipe)
    ids = torch.arange(2 * 20).view(2, 20) * 7 % 50
    targets = ids.roll(-1, 1)
    targets[0, :5] = -100
    _, facts = Pair(student, teacher, recipe).losses(ids, targets, matching=False)
    with torch.no_grad():
        ours, theirs = (model(ids).logits[targets >= 0].double() for model in (student, teacher))
    ce = functional.cross_entropy(ours, targets[targets >= 0], reduction="sum")
    kl = functional.kl_div(
        ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="sum"
    )
    # float32 against float64, summed over 35 tokens
    torch.testing.assert_close(facts[:2].double(), torch.stack((ce, kl)), rtol=1e-4, atol=1e-4)


def test_relative_errors_do_not_depend_on_neighbours() -> None:
    torch.manual_seed(0)
    found, wanted = torch.randn(2, 3, 11, 6)
    counted = torch.rand(3, 11) < 0.6
    counted[0] = True
    alone = [relative_errors(f[None], w[None], c[None]) for f, w, c in zip(found, wanted, counted)]
    assert torch.allclose(relative_errors(found, wanted, counted), torch.cat(alone))
    first = (found[0] - wanted[0]).square().sum() / wanted[0].var(0, correction=0).sum()
    torch.testing.assert_close(alone[0][0], first)
    assert not relative_errors(found, found, counted).any()
