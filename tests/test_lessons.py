"""Windows to train on: what is in them and what counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from mlakit.data import named_sources, read_lessons, token_windows
from mlakit.errors import MlakitError, UsageError
from tiny_models import save_tiny

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }}</s>\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(save_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def chatting(tokenizer: Any) -> Any:
    tokenizer.chat_template = TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


def lessons(path: Path, rows: list[dict[str, Any]], tokenizer: Any, length: int, **options: Any):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (source,) = named_sources(path)
    return read_lessons(source, tokenizer, length, **options)


def counted_text(found: Any, tokenizer: Any, row: int = 0) -> str:
    return tokenizer.decode(found.ids[row][found.counted[row]], clean_up_tokenization_spaces=False)


def test_running_text_is_cut_as_for_calibration(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on a mat " * 20)
    (source,) = named_sources(tmp_path / "text.txt")
    found = read_lessons(source, tokenizer, 33)
    assert found.ids.tolist() == token_windows(source.content.text, tokenizer, 33)
    assert found.counted.all()
    assert found.dropped == 20 * 21 - 32 * len(found)


def test_completions_count_with_their_end(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "two and two is ", "completion": "four"}]
    found = lessons(tmp_path / "a.jsonl", rows, tokenizer, 20, completion_only=True)
    assert counted_text(found, tokenizer).replace(" ", "") == "four</s>"
    every = lessons(tmp_path / "a.jsonl", rows, tokenizer, 20)
    assert every.counted.all() and np.array_equal(every.ids, found.ids)


def test_replies_count_in_a_template(chatting: Any, tmp_path: Path) -> None:
    talk = [
        {"role": "user", "content": "say cat"},
        {"role": "assistant", "content": "cat"},
        {"role": "user", "content": "say cat again"},
        {"role": "assistant", "content": " cat "},
    ]
    found = lessons(tmp_path / "a.jsonl", [{"messages": talk}], chatting, 66, completion_only=True)
    assert counted_text(found, chatting).replace(" ", "") == "cat</s>cat</s>"
    marks = np.flatnonzero(found.counted[0])
    assert marks[0] > len("user say cat")  # not the same word in the question


def test_pairs_go_through_the_template_too(chatting: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "say cat", "completion": "cat"}]
    found = lessons(tmp_path / "a.jsonl", rows, chatting, 29, completion_only=True)
    assert counted_text(found, chatting).replace(" ", "") == "cat</s>"


def test_windows_begin_where_a_document_does(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": letter * 4, "completion": letter * 5} for letter in "abcdefg"]
    found = lessons(tmp_path / "a.jsonl", rows, tokenizer, 16)
    texts = [tokenizer.decode(row).replace(" ", "") for row in found.ids]
    assert [text[0] for text in texts] == ["a", "c", "e"]
    assert found.dropped == 7 * 10 - 3 * 16


def test_windows_without_a_counted_token_are_left_out(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "a" * 40, "completion": "b"}, {"prompt": "c", "completion": "d" * 40}]
    found = lessons(tmp_path / "a.jsonl", rows, tokenizer, 20, completion_only=True)
    assert len(found) == 1 and set(tokenizer.decode(found.ids[0][1:])) <= {"d", " "}


def test_what_has_no_completions_says_so(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no completions"):
        lessons(tmp_path / "a.jsonl", [{"text": "cat"}], tokenizer, 8, completion_only=True)
    with pytest.raises(MlakitError, match=r"line 1: 'prompt' and 'completion' must be texts"):
        lessons(tmp_path / "b.jsonl", [{"prompt": "a", "completion": ""}], tokenizer, 8)
