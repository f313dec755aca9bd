"""Texts, windows and recall probes: plain data, so plain tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlakit.data import (
    NAMES,
    Probe,
    builtin_text,
    key_value_prompt,
    passkey_prompt,
    read_text,
    token_windows,
)
from mlakit.errors import MlakitError


def count_words(text: str) -> int:
    return len(text.split())


class CharacterTokenizer:
    """One token a character: enough of a tokenizer to cut windows with."""

    def __init__(self, bos_token_id: int | None) -> None:
        self.bos_token_id = bos_token_id

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        assert options["add_special_tokens"] is False
        return {"input_ids": [ord(character) for character in text]}


depths = st.floats(0, 1)
seeds = st.integers(0, 10_000)


@given(length=st.integers(40, 600), depth=depths, seed=seeds)
def test_passkey_is_in_the_text_once_and_the_length_is_kept(
    length: int, depth: float, seed: int
) -> None:
    probe = passkey_prompt(length, depth, count_tokens=count_words, seed=seed)
    assert probe.text.count(probe.answer) == 1
    assert len(probe.answer) == 5
    assert length - 16 < count_words(f"{probe.prompt} {probe.answer}") <= length
    assert probe == passkey_prompt(length, depth, count_tokens=count_words, seed=seed)


@given(length=st.integers(400, 900), depth=depths, pairs=st.integers(1, 32), seed=seeds)
def test_key_value_pairs_are_all_there_and_the_right_one_is_wanted(
    length: int, depth: float, pairs: int, seed: int
) -> None:
    probe = key_value_prompt(length, depth, count_tokens=count_words, pairs=pairs, seed=seed)
    lines = [line for line in probe.text.splitlines() if line.startswith("The code of")]
    codes = {line.split()[3]: line.split()[5].rstrip(".") for line in lines}
    asked = probe.question.split()[-2]
    assert len(codes) == pairs == len(set(codes.values()))
    assert codes[asked] == probe.answer
    assert set(codes) <= set(NAMES)
    assert count_words(f"{probe.prompt} {probe.answer}") <= length


@settings(max_examples=20)
@given(depth=depths, seed=seeds)
def test_the_answer_stands_at_its_depth(depth: float, seed: int) -> None:
    for make in (passkey_prompt, key_value_prompt):
        probe = make(3000, depth, count_tokens=count_words, seed=seed)
        before = count_words(probe.text[: probe.text.index(probe.answer)])
        assert before / count_words(probe.text) == pytest.approx(depth, abs=0.05)


def test_filler_comes_from_the_given_lines_in_order() -> None:
    lines = ["one", "two", "three"]
    probe = passkey_prompt(60, 0.5, count_tokens=count_words, lines=lines)
    filler = [line for line in probe.text.splitlines() if line in lines]
    start = lines.index(filler[0])
    assert filler == [lines[(start + index) % 3] for index in range(len(filler))]


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (passkey_prompt, {"length": 5, "depth": 0.5}, "do not fit"),
        (passkey_prompt, {"length": 50, "depth": 1.5}, "between 0 and 1"),
        (passkey_prompt, {"length": 50, "depth": 0.5, "lines": []}, "filler"),
        (key_value_prompt, {"length": 500, "depth": 0.5, "pairs": 0}, "pairs"),
        (key_value_prompt, {"length": 500, "depth": 0.5, "pairs": 1000}, "pairs"),
    ],
)
def test_impossible_probes_say_why(make: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(MlakitError, match=words):
        make(**options, count_tokens=count_words)


def test_a_probe_is_frozen() -> None:
    probe = Probe("text ", "question", "1", "passkey", 0.5)
    assert probe.prompt == "text question"
    with pytest.raises(AttributeError):
        probe.answer = "2"  # type: ignore[misc]


@given(
    text=st.text(min_size=20, max_size=200),
    length=st.integers(2, 12),
    bos=st.none() | st.integers(0, 5),
)
def test_windows_are_the_text_in_order(text: str, length: int, bos: int | None) -> None:
    windows = token_windows(text, CharacterTokenizer(bos), length)
    head = 0 if bos is None else 1
    assert all(len(window) == length for window in windows)
    assert all(window[:head] == [bos][:head] for window in windows)
    ids = [token for window in windows for token in window[head:]]
    assert ids == [ord(character) for character in text[: len(ids)]]
    assert len(text) - len(ids) < length


def test_windows_take_the_count_and_bos_asked_for() -> None:
    windows = token_windows("abcdefgh", CharacterTokenizer(1), 3, count=2, bos_id=7)
    assert windows == [[7, ord("a"), ord("b")], [7, ord("c"), ord("d")]]


def test_too_little_text_for_the_windows_is_an_error() -> None:
    with pytest.raises(MlakitError, match=r"enough for 4 windows.*not for 9"):
        token_windows("abcdefgh", CharacterTokenizer(1), 3, count=9)
    with pytest.raises(MlakitError, match="no room"):
        token_windows("abcdefgh", CharacterTokenizer(1), 1)


def test_read_text_reads_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("zwei", encoding="utf-8")
    (tmp_path / "a.txt").write_text("eins ä", encoding="utf-8")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    assert read_text(tmp_path / "a.txt") == "eins ä"
    assert read_text(str(tmp_path)) == "eins ä\n\nzwei"


def test_read_text_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    with pytest.raises(MlakitError, match=r"not UTF-8.*byte 2"):
        read_text(tmp_path / "bad.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MlakitError, match=r"no \*\.txt"):
        read_text(tmp_path / "empty")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MlakitError, match="neither a file nor a folder") as caught:
        read_text("no/such/file")
    assert "datasets" in caught.value.remedy


def test_read_text_reads_a_dataset_when_the_library_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Rows(dict[str, list[str]]):
        column_names = property(lambda self: list(self))

    def load_dataset(name: str, configuration: str | None, split: str) -> Rows:
        if name == "gone":
            raise OSError("no network")
        column = "text" if configuration == "plain" else "other"
        return Rows({column: ["one", "two"]})

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert read_text("some/set:plain") == "one\ntwo"
    with pytest.raises(MlakitError, match="no column 'text', only other"):
        read_text("some/set")
    with pytest.raises(MlakitError, match="no network"):
        read_text("gone")


def test_builtin_texts_differ_and_hold_look_ups() -> None:
    calibration, evaluation = builtin_text("calibration"), builtin_text("evaluation")
    assert len(calibration) > len(evaluation) > 100_000
    assert calibration[:1000] != evaluation[:1000]
    for text in (calibration, evaluation):
        assert "What is the pass key?" in text
        assert "What is the code of" in text
    with pytest.raises(MlakitError, match="no built-in text"):
        builtin_text("test")  # type: ignore[arg-type]


def test_importing_data_loads_no_torch() -> None:
    code = "import sys, mlakit.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
