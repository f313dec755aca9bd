"""A real checkpoint: the figures of the published code, reproduced, and those of our method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from mlakit.conversion.apply import convert
from mlakit.data import token_windows
from mlakit.nn.hf import load

WINDOWS, LENGTH = 24, 512


def tinystories(shared: Path, name: str) -> str:
    text = (shared / "data" / "tinystories" / name).read_text(encoding="utf-8")
    return text[: WINDOWS * LENGTH * 4 + 4000].replace("<|endoftext|>", "")


@torch.no_grad()
def perplexity(folder: Path, windows: torch.Tensor) -> float:
    model = load(folder)
    losses = []
    for batch in windows.split(8):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"
        )
        losses.append(loss.view(len(batch), -1).mean(1))
    return float(torch.cat(losses).mean().exp())


@pytest.fixture
def texts(shared: Path, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A calibration file of just enough text, and windows to score."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260k")
    train = tinystories(shared, "train.txt")
    encoded = tokenizer(train, add_special_tokens=False, return_offsets_mapping=True)
    end = encoded["offset_mapping"][WINDOWS * (LENGTH - 1)][0]
    calibration = tmp_path / "train.txt"
    calibration.write_text(train[:end], encoding="utf-8")
    test = tinystories(shared, "valid.txt")
    return calibration, torch.tensor(token_windows(test, tokenizer, LENGTH, WINDOWS))


def converted_perplexity(
    shared: Path, out: Path, texts: tuple[Path, torch.Tensor], rank: int, **options: Any
) -> float:
    """After a conversion that caches ``rank`` + 8 of 64 numbers per token."""
    calibration, test = texts
    plan = convert(
        shared / "models" / "stories260k",
        out,
        cache_ratio=(rank + 8) / 64,
        qk_rope_head_dim=8,
        calibration=calibration,
        calibration_tokens=WINDOWS * LENGTH,
        **options,
    )
    assert plan.measured["calibration_windows"] == WINDOWS
    return perplexity(out, test)


@pytest.mark.slow
def test_published_perplexities(
    shared: Path, tmp_path: Path, texts: tuple[Path, torch.Tensor]
) -> None:
    """Partial RoPE (full rank), 50 % and 37.5 % of the cache, as the published code prints them."""
    source = shared / "models" / "stories260k"
    assert perplexity(source, texts[1]) == pytest.approx(5.306, rel=1e-3)
    for rank, published in ((56, 8.126), (24, 11.343), (16, 15.804)):
        options = {"method": "transmla", "freqfold": 1}
        found = converted_perplexity(shared, tmp_path / str(rank), texts, rank, **options)
        # the algorithm's claim is 1 %; measured 1e-4
        assert found == pytest.approx(published, rel=0.01)


@pytest.mark.slow
def test_closed_form_perplexities(
    shared: Path, tmp_path: Path, texts: tuple[Path, torch.Tensor]
) -> None:
    """The same sizes in closed form: measured 5.521, 5.886 and 6.878; a per cent for rounding."""
    for rank, highest in ((56, 5.58), (24, 5.98), (16, 6.96)):
        found = converted_perplexity(shared, tmp_path / str(rank), texts, rank, refine_steps=0)
        assert found < highest


@pytest.mark.parametrize("form", ["absorbed", "article"])
def test_equal_cache_is_exact_on_a_real_checkpoint(shared: Path, tmp_path: Path, form: str) -> None:
    source = shared / "models" / "stories260k"
    plan = convert(source, tmp_path / "out", equal_cache=True, form=form)
    assert plan.cache_bytes == plan.source_cache_bytes == 2 * 4 * 8 * 4 * 5
    ids = torch.arange(400)[None] * 7 % 512
    with torch.no_grad():
        expected = load(source)(input_ids=ids).logits
        actual = load(tmp_path / "out")(input_ids=ids).logits
    # float32 rounding through five layers, logits up to 20; measured 2.4e-5
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-4)
