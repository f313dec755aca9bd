"""What the cells of the quality benchmark are summed up to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks import conversion_tables as tables

ROOT = Path(__file__).resolve().parents[1]


def cell(method: str, seed: int, excess: float) -> dict[str, Any]:
    known = {"value": excess, "low": excess - 0.01, "high": excess + 0.01}
    return {
        "ratio": 0.5, "halving": 2, "method": method, "seed": seed, "rank": 8, "rope": 4,
        "perplexity": 5.0, "excess": known, "kl": known, "top1": known, "seconds": 1.0,
        "steps": 200 if method == "ours" else 0,
    }  # fmt: skip


MODELS = {
    name: {
        "source_perplexity": 4.0,
        "texts": "some",
        "ablation": [cell("without means", 0, 0.5)],
        "cells": [cell("published", seed, 1.0) for seed in (0, 1)]
        + [cell("ours", seed, share + seed / 100) for seed in (0, 1)],
    }
    for name, share in (("one", 0.1), ("two", 0.2), ("three", 0.4))
}


def test_shares_are_medians_over_models_and_spread_over_seeds() -> None:
    found = tables.shares(MODELS, [(0.5, 2), (0.25, 1)])
    ours = found["d2_500"]["ours"]
    assert ours["median"] == pytest.approx(0.205)
    assert (ours["worst"], ours["worst_model"]) == (pytest.approx(0.405), "three")
    assert (ours["models"], ours["seeds"]) == (3, 2)
    assert (ours["lowest"], ours["highest"]) == (pytest.approx(0.2), pytest.approx(0.21))
    for missing in (found["d2_500"]["published, refined"], found["d1_250"]["ours"]):
        assert missing["median"] is missing["worst"] is None and missing["models"] == 0
    assert ours["steps"] == "200"
    ablation = tables.shares(MODELS, [(0.5, 2)], ["without means"])
    assert ablation["d2_500"]["without means"]["median"] == pytest.approx(0.5)


def test_the_page_and_the_picture_are_those_of_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "DOCS", tmp_path)
    tables.write_page({"models": MODELS})
    page = (tmp_path / "conversion_quality.md").read_text()
    assert "| 50.0% | 4 + 8 | ours | 5 | 0.1050 [0.0900, 0.1100] ± 0.0050 |" in page
    assert (tmp_path / "conversion_quality.png").stat().st_size > 10_000
    record = json.loads((ROOT / "benchmarks/results/conversion_quality.json").read_text())
    assert (ROOT / "docs" / "conversion_quality.md").read_text() == tables.page(record)
