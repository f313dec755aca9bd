"""What every converted checkpoint must do, for the tests of families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from mlakit.checkpoint import open_checkpoint
from mlakit.families import read_model
from mlakit.nn.hf import load, new_cache

IDS = torch.arange(2 * 256).view(2, 256) * 7 % 50
"""Four times the calibration windows of 64 tokens."""

EXACT = 5e-6
"""Relative error of float32 logits: rounding of weights (2^-24), times about ten for the sharp
attention of these models. Measured 3e-7 to 1.2e-6."""

TIES = 2
"""Of 512 tokens, those that may stand so near a tie of two experts that rounding decides where they
go. Measured: one token in one of the cases, on one of two kinds of processor."""


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def without_ties(actual: torch.Tensor, expected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both logits without the few tokens that differ most, ``[tokens, vocabulary]``."""
    both = actual.flatten(0, 1), expected.flatten(0, 1)
    worst = (both[0] - both[1]).norm(dim=1) / both[1].norm(dim=1)
    kept = worst.argsort()[: len(worst) - TIES]
    return both[0][kept], both[1][kept]


@torch.no_grad()
def check_saved(folder: Path, plan: Any, tmp_path: Path) -> torch.Tensor:
    """Loaded, decoded in steps and saved again, a converted model stays the same; its logits."""
    result = open_checkpoint(folder)
    assert read_model(result.config).layers == plan.layers
    assert {t.name: (t.shape, t.nbytes) for t in plan.tensors} == {
        name: (result.shape(name), result.nbytes(name)) for name in result.names
    }
    model = load(folder)
    found = logits(model)
    cache = new_cache(model, len(IDS), IDS.shape[1])
    steps = torch.cat(
        [
            model(input_ids=part, past_key_values=cache, use_cache=True).logits
            for part in IDS.split((200, 50, *[1] * 6), dim=1)
        ],
        dim=1,
    )
    routed = any(block.num_experts for block in read_model(result.config).feed_forwards)
    compared = without_ties(steps, found) if routed else (steps, found)
    assert relative_error(*compared) < EXACT
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), found)
    return found


def check_rounding(source: Path, result: Path, times: float = 10) -> None:
    """A result errs as the source itself does, against the source in float64."""
    exact = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    expected = logits(exact)
    own = relative_error(logits(load(source)), expected)
    # A product of float32 matrices in place of one of them rounds a few times as much.
    assert relative_error(logits(load(result)), expected) < max(EXACT, times * own)
