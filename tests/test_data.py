"""Texts, windows and recall probes: plain data, so plain tests."""

from __future__ import annotations

import json
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
    Source,
    builtin_text,
    key_value_prompt,
    named_sources,
    passkey_prompt,
    source_windows,
    token_windows,
)
from mlakit.data.texts import Content
from mlakit.errors import MlakitError, UsageError


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


def read(place: Any) -> Any:
    (source,) = named_sources(place)
    return source.content


def test_files_and_folders_are_read(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("zwei", encoding="utf-8")
    (tmp_path / "a.txt").write_text("eins ä", encoding="utf-8")
    (tmp_path / "c.jsonl").write_text('{"text": "drei"}\n\n{"text": "vier"}\n', encoding="utf-8")
    (tmp_path / "d.bin").write_bytes(b"\xff")
    assert read(tmp_path / "a.txt").text == "eins ä"
    assert read(str(tmp_path)).text == "eins ä\n\nzwei\n\ndrei\n\nvier"


def test_what_cannot_be_read_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    with pytest.raises(MlakitError, match=r"not UTF-8.*byte 2"):
        read(tmp_path / "bad.txt")
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(MlakitError, match=r"blank\.txt is empty"):
        read(tmp_path / "blank.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MlakitError, match=r"no \*\.txt or \*\.jsonl"):
        read(tmp_path / "empty")
    with pytest.raises(UsageError, match="to convert with only"):
        read("self")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MlakitError, match="neither a file nor a folder") as caught:
        read("no/such/file")
    assert "datasets" in caught.value.remedy


TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize(
    "line,message",
    [
        ("{oops", r"line 3 is not JSON"),
        ('{"question": 1, "answer": 2}', r"line 3 has neither .* its keys are question, answer"),
        ("[1]", r"line 3 has neither .* it is no object"),
        ('{"text": 5}', r"line 3: neither a text nor a list of messages"),
        ('{"messages": []}', r"line 3: neither a text nor a list of messages"),
        ('{"messages": [{"role": "user"}]}', r"line 3: neither a text nor a list of messages"),
        ('{"messages": [{"role": "user", "content": [1]}]}', r"line 3: neither a text"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "good"}}\n\n{line}\n{{"text": "more"}}\n')
    with pytest.raises(MlakitError, match=message) as caught:
        read(path)
    assert caught.value.remedy


def test_conversations_are_read_and_hashed(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": TALK, "extra": 1}) + '\n{"text": "and"}\n')
    content = read(path)
    assert content.conversations == (tuple(TALK),) and content.text == "and"
    assert content.plain == "and\n\nhi\n\nho"
    path.write_text(json.dumps({"messages": TALK}))
    assert read(path).sha256 != content.sha256 and read(path).plain == "hi\n\nho"


def test_sources_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tales.txt").write_text("a")
    (tmp_path / "x=y.txt").write_text("b")
    monkeypatch.chdir(tmp_path)
    given = ["tales.txt", "x=y.txt", "code=tales.txt", "self", "builtin", "org/set:plain:test", "."]
    found = named_sources(given)
    names = ["tales", "x=y", "code", "self", "builtin", "set", tmp_path.name]
    assert [source.name for source in found] == names
    assert [source.own for source in found] == [name == "self" for name in names]
    assert found[2].content.text == "a" and found[2].label == "tales.txt"
    assert named_sources(found) == found
    with pytest.raises(UsageError, match="two texts are called 'tales'"):
        named_sources(["tales.txt", "tales=x=y.txt"])
    with pytest.raises(UsageError, match="names no text"):
        named_sources("name=")


def test_a_dataset_is_read_when_the_library_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(name: str, configuration: str | None, **options: Any) -> list[dict[str, Any]]:
        calls.append((name, configuration, options["split"]))
        if name == "gone":
            raise OSError("no network")
        if configuration == "chat":
            return [{"messages": TALK}]
        return [{"text" if configuration == "plain" else "other": word} for word in ("one", "two")]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert read("some/set:plain").text == "one\ntwo"
    assert read("some/set:::other").text == "one\ntwo"
    assert read("some/set:chat:test").conversations == (tuple(TALK),)
    assert calls == [
        ("some/set", "plain", "train"), ("some/set", None, "train"), ("some/set", "chat", "test"),
    ]  # fmt: skip
    with pytest.raises(MlakitError, match="no column 'text', only other"):
        read("some/set")
    with pytest.raises(MlakitError, match="no column 'wrong'"):
        read("some/set:::wrong")
    tried = "tried: dataset gone, configuration maths, split train.*no network"
    with pytest.raises(MlakitError, match=tried):
        read("gone:maths")
    assert not read("some/set:plain").cut
    monkeypatch.setattr("mlakit.data.texts.LONGEST", 2)
    found = read("some/set:plain")  # enough is enough, and said
    assert found.text == "one" and found.cut == "some/set:plain: its first 1 rows, 3 characters"


class ChatTokenizer(CharacterTokenizer):
    """Turns as ``<role:content>``."""

    chat_template = "yes"

    def apply_chat_template(self, talk: list[dict[str, str]], **options: Any) -> str:
        if talk[0]["role"] != "user":
            raise ValueError("the user speaks first")
        return "".join(f"<{turn['role'][0]}:{turn['content']}>" for turn in talk)


def test_windows_of_conversations_begin_where_one_does() -> None:
    talks = tuple(({"role": "user", "content": word * 3},) for word in "abcdefg")
    source = Source("chat", "chat.jsonl")
    source.__dict__["content"] = Content("", talks)
    windows = source_windows(source, ChatTokenizer(1), 8)
    assert ["".join(map(chr, window)) for window in windows] == [
        "<u:aaa><", "<u:ccc><", "<u:eee><",
    ]  # fmt: skip
    assert source_windows(source, ChatTokenizer(1), 8, 2) == windows[:2]
    with pytest.raises(MlakitError, match=r"enough for 3 windows.*not for 9"):
        source_windows(source, ChatTokenizer(1), 8, 9)
    plain = source_windows(source, CharacterTokenizer(1), 8)
    assert plain[0] == [1, *map(ord, "aaa\n\nbb")]
    source.__dict__["content"] = Content("", ((TALK[1], TALK[0]),))
    with pytest.raises(MlakitError, match=r"conversation 1 of chat\.jsonl: the user speaks first"):
        source_windows(source, ChatTokenizer(1), 8)


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
