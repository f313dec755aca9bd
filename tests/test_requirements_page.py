"""docs/requirements.md is complete, and every test it names exists."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "requirements.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| ([ABCD]\d\d) \| .+ \| (\w+) \| .* \|$", re.MULTILINE)


def test_every_number_has_one_row_and_a_state() -> None:
    last = {"A": 19, "B": 22, "C": 21, "D": 45}
    expected = [f"{text}{n:02}" for text, count in last.items() for n in range(1, count + 1)]
    assert [number for number, _ in ROW.findall(PAGE)] == expected
    assert {state for _, state in ROW.findall(PAGE)} == {"done", "part", "planned"}


def test_counts_are_those_of_the_rows() -> None:
    counts = Counter(state for _, state in ROW.findall(PAGE))
    text = ", ".join(f"{counts[state]} {state}" for state in ("done", "part", "planned"))
    assert f"Of {sum(counts.values())}: {text}." in PAGE


def test_tests_named_there_exist() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for name in set(re.findall(r"`(test_\w+)`", PAGE)):
        assert f"def {name}(" in code, name


def test_sections_linked_there_exist() -> None:
    lesson = (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## (.+)$", lesson, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    for anchor in re.findall(r"\(attention\.md#([^)]+)\)", PAGE):
        assert anchor in anchors, anchor
