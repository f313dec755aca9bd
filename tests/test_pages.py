"""Pages print what their code prints: every block is run again."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

from mlakit.nn.letters import GLOSSARY
from mlakit.nn.trace import trace_example

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCKS = {"attention.md": 10, "decode.md": 3}
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


def test_glossary_is_the_code_s() -> None:
    rows = "".join(f"| {letter} | {meaning} |\n" for letter, meaning in GLOSSARY.items())
    assert rows in (DOCS / "attention.md").read_text(encoding="utf-8")
