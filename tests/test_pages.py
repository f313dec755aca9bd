"""Pages print what their code prints: every block is run again."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import mlakit
from mlakit.baselines import read_prefix
from mlakit.evaluation.quality import feed
from mlakit.nn.hf import load
from mlakit.nn.letters import GLOSSARY
from mlakit.nn.trace import trace_example

DEMO = Path(mlakit.__file__).parent / "assets" / "demo_model"
DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCKS = {"attention.md": 10, "decode.md": 3, "extending.md": 1}
PAIR = re.compile(r"```(python|console)\n(.*?)```\n```text\n(.*?)```", re.DOTALL)


def printed(language: str, code: str, names: dict[str, Any]) -> str:
    if language == "console":
        assert code == "$ mlakit trace\n"
        return trace_example().text() + "\n"
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "page", "exec"), names)
    return out.getvalue()


@pytest.mark.parametrize("page", BLOCKS)
def test_outputs_are_what_the_code_prints(page: str) -> None:  # B02, B04, B12, B19
    names: dict[str, Any] = {}
    blocks = PAIR.findall((DOCS / page).read_text(encoding="utf-8"))
    assert len(blocks) == BLOCKS[page]
    for language, code, output in blocks:
        assert printed(language, code, names) == output, code


def test_the_example_row_keeps_every_nth_token() -> None:  # C20
    names: dict[str, Any] = {}
    page = (DOCS / "extending.md").read_text(encoding="utf-8")
    ((_, code, _),) = PAIR.findall(page)
    printed("python", code, names)
    model = load(DEMO)
    prefix = read_prefix(model, torch.arange(5, 17), max_length=14)
    cache = names["stride"](0.25, prefix)
    keys = [layer.keys for layer in cache.layers]
    for kept, (exact, _) in zip(keys, prefix.layers, strict=True):
        assert torch.equal(kept, exact[:, :, [3, 7, 11]])
    logits = feed(model, torch.arange(20, 22), cache, seen=12)
    assert torch.isfinite(logits).all() and cache.get_seq_length() == 14


def test_glossary_is_the_code_s() -> None:
    rows = "".join(f"| {letter} | {meaning} |\n" for letter, meaning in GLOSSARY.items())
    assert rows in (DOCS / "attention.md").read_text(encoding="utf-8")
