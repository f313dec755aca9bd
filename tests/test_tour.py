"""The learner's tour: the notebook runs and shows what it says, and its pictures are the page's."""

from __future__ import annotations

import base64
import json
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from benchmarks import fine_grained
from matplotlib.figure import Figure

from mlakit.nn.attention import SimpleCache

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import run_tour  # noqa: E402

NOTEBOOK: dict[str, Any] = json.loads(run_tour.NOTEBOOK.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_notebook_shows_what_its_code_prints() -> None:
    matplotlib.use("agg")
    for cell, outputs, value in run_tour.run(NOTEBOOK):
        assert run_tour.text_of(cell["outputs"]) == run_tour.text_of(outputs), cell["source"]
        assert ("picture" not in cell["metadata"]) or isinstance(value, Figure)


def test_it_is_small_whole_and_easy_to_follow() -> None:
    assert run_tour.NOTEBOOK.stat().st_size < 1_000_000
    assert NOTEBOOK["nbformat"] == 4 and NOTEBOOK["nbformat_minor"] == 5
    assert run_tour.code_cells(NOTEBOOK)[0]["source"][0] == "%matplotlib inline\n"  # or no pictures
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    for count, cell in enumerate(run_tour.code_cells(NOTEBOOK), 1):
        assert cell["execution_count"] == count
        assert len(cell["source"]) <= 26, "a cell of few lines"
        assert not re.search(r"/(work|tmp|home|root)\b", json.dumps(cell["outputs"])), cell
    for cell in (cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown"):
        for target in re.findall(r"\]\(([^)#]+)", "".join(cell["source"])):
            assert "://" in target or (run_tour.NOTEBOOK.parent / target).exists(), target


def test_pictures_of_the_page_are_the_notebooks() -> None:
    page = (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")
    shared = [cell for cell in run_tour.code_cells(NOTEBOOK) if "picture" in cell["metadata"]]
    assert len(shared) == 4
    for cell in shared:
        path = Path(cell["metadata"]["picture"])
        assert f"]({path.name})" in page
        (picture,) = [out["data"]["image/png"] for out in cell["outputs"] if "data" in out]
        assert base64.b64decode(picture) == (ROOT / path).read_bytes(), path


def test_rounding_is_compared_as_such() -> None:
    shown = run_tour.outputs_of("error 4e-15, loss 0.12\n", None)
    same = run_tour.outputs_of("error 3.1e-15, loss 0.12\n", None)
    other = run_tour.outputs_of("error 4e-05, loss 0.12\n", None)
    assert run_tour.text_of(shown) == run_tour.text_of(same) != run_tour.text_of(other)


def test_every_question_has_one_answer() -> None:
    draw = torch.Generator().manual_seed(0)
    items, names, asked, answers = fine_grained.examples(50, draw)
    for b in range(50):
        for question, answer in zip(asked[b].tolist(), answers[b].tolist()):
            (who,) = {i for i in range(fine_grained.ITEMS) if question in items[b, :, i].tolist()}
            assert names[b, who] == answer


def test_arms_of_the_task_have_the_bytes_they_are_said_to_have() -> None:
    numbers = {arm.name: arm.numbers for arm in fine_grained.ARMS}
    assert [numbers[f"grouped {g}"] for g in (8, 4, 2, 1)] == [128, 64, 32, 16]
    layer, cache = fine_grained.Arm("latent", 32).layer(), SimpleCache()
    layer(torch.randn(1, 5, fine_grained.HIDDEN), cache=cache)
    assert cache.nbytes // (5 * 4) == numbers["latent 32"] == numbers["grouped 2"] == 32


def test_the_task_is_learned(tmp_path: Path) -> None:
    """A hundred steps already beat guessing, one in 16; measured 0.41."""
    right = fine_grained.train(fine_grained.Arm("grouped", 8), 0, 1e-2, 100)
    assert right > 0.2
    kept = json.loads(fine_grained.RESULTS.read_text(encoding="utf-8"))
    assert set(kept["arms"]) == {arm.name for arm in fine_grained.ARMS}
    assert isinstance(fine_grained.draw(kept), Figure)
