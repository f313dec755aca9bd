"""Several texts, the model's own samples, and what is held out of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from typer.testing import CliRunner

from mlakit.checkpoint import open_checkpoint
from mlakit.cli import app
from mlakit.conversion import samples
from mlakit.conversion.apply import convert
from mlakit.conversion.calibrate import split_held_out
from mlakit.conversion.card import findings
from mlakit.conversion.goal import Goal
from mlakit.conversion.plan import make_plan
from mlakit.conversion.samples import Script, draw_samples, read_script, require_memory
from mlakit.conversion.windows import (
    WindowChoice,
    Windows,
    held_out_count,
    held_out_record,
    shares_held_out,
)
from mlakit.data import named_sources
from mlakit.errors import MlakitError, UsageError
from mlakit.families import read_model
from mlakit.nn.hf import load
from mlakit.reporting.domains import disagreement
from tiny_models import LETTERS, TEXT, save_tiny

SMALL: dict[str, Any] = {"cache_ratio": 0.5, "refine_steps": 0, "calibration_tokens": 2048}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("calibration") / "tiny")
    (folder.parent / "one.txt").write_text(TEXT)
    (folder.parent / "two.txt").write_text(TEXT[::-1])
    rows = [{"messages": [{"role": "user", "content": TEXT[i : i + 50]}]} for i in range(60)]
    (folder.parent / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def chosen(tiny: Path, work: Path, places: list[str], checks: list[str], tokens: int) -> Windows:
    checkpoint = open_checkpoint(tiny)
    texts, more = named_sources(places), named_sources(checks)
    plan = make_plan(
        checkpoint,
        Goal(cache_ratio=0.5),
        calibration=texts,
        calibration_tokens=tokens,
        check=more,
    )
    assert plan.calibration is not None
    model = read_model(checkpoint.config)
    choice = WindowChoice(checkpoint, model, plan.calibration, [*texts, *more], "cpu")
    return choice.choose(work, lambda *step: None)


def test_every_text_has_its_share_and_some_of_it_is_held_out(tiny: Path, tmp_path: Path) -> None:
    places = [str(tiny.parent / name) for name in ("one.txt", "two.txt", "chat.jsonl")]
    found = chosen(tiny, tmp_path, places, [f"other={places[1]}"], 64 * 25)
    assert found.ids.shape == (25, 64)
    assert [found.domains.count(name) for name in ("one", "two", "chat")] == [9, 8, 8]
    assert held_out_count(25) == 3 and sorted(found.domains[-3:]) == ["chat", "one", "two"]
    assert torch.equal(split_held_out(found.ids)[1], found.ids[-3:])
    assert found.checks.shape == (3, 64) and found.check_domains == ("other",) * 3


def test_one_text_is_held_out_from_its_end(tiny: Path, tmp_path: Path) -> None:
    found = chosen(tiny, tmp_path, [str(tiny.parent / "one.txt")], [], 64 * 16)
    ids = [LETTERS.index(letter) + 2 for letter in TEXT]
    starts = [ids.index(row[1]) for row in found.ids.tolist()]
    assert len(found.ids) == 16 and found.check_domains == () and len(found.checks) == 0
    assert all(row[0] == 0 for row in found.ids.tolist()) and starts


@given(st.lists(st.integers(2, 200), min_size=1, max_size=8))
def test_held_out_shares_add_up(counts: list[int]) -> None:
    if len(counts) > 1 and held_out_count(sum(counts)) < len(counts):
        return  # refused before
    held = shares_held_out(counts)
    assert sum(held) == held_out_count(sum(counts)) and min(held) >= 1
    assert all(part < count for part, count in zip(held, counts, strict=True))
    for part, count in zip(held, counts, strict=True):
        assert part <= max(1, count // 8 + 1)


def test_too_little_of_a_text_is_named(tiny: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text(TEXT[:100])
    one = str(tiny.parent / "one.txt")
    with pytest.raises(MlakitError, match="text short gives 1 window of 64"):
        chosen(tiny, tmp_path, [one, str(short)], [], 64 * 30)
    with pytest.raises(MlakitError, match="2 calibration texts give 6 windows"):
        chosen(tiny, tmp_path, [one, str(tiny.parent / "two.txt")], [], 64 * 6)
    short.write_text("x")
    with pytest.raises(MlakitError, match="short: the text has 1 tokens"):
        chosen(tiny, tmp_path, [one], [str(short)], 64 * 30)
    with pytest.raises(UsageError, match="two texts are called 'one'"):
        chosen(tiny, tmp_path, [one], [one], 64 * 30)


def test_the_hash_covers_texts_but_not_their_names(tiny: Path) -> None:
    checkpoint, goal = open_checkpoint(tiny), Goal(cache_ratio=0.5)
    one, two = (str(tiny.parent / f"{name}.txt") for name in ("one", "two"))

    def key(texts: Any, **options: Any) -> str:
        return make_plan(checkpoint, goal, calibration=texts, **options).hash

    assert key(one) == key(f"prose={one}") == key([one])
    keys = [
        key(one), key(two), key([one, two]), key([two, one]), key("self"), key("self", seed=1),
        key(one, check=two), key(None),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    plan = make_plan(checkpoint, goal, calibration="self")
    assert plan.calibration and plan.calibration.domains[0].sha256 is None
    assert any("whole model" in warning for warning in plan.warnings)


def test_conversion_reports_every_text(tiny: Path, tmp_path: Path) -> None:
    places = [tiny.parent / "one.txt", f"talk={tiny.parent / 'chat.jsonl'}"]
    plan = convert(
        tiny, tmp_path / "out", calibration=places, check=tiny.parent / "two.txt", **SMALL
    )
    domains = {domain["name"]: domain for domain in plan.measured["domains"]}
    assert {name: domain["calibrated"] for name, domain in domains.items()} == {
        "one": True, "talk": True, "two": False,
    }  # fmt: skip
    assert all(domain["kl"] > 0 for domain in domains.values())
    weights = [domains[name]["tokens"] for name in ("one", "talk")]
    mean = sum(domains[n]["kl"] * w for n, w in zip(("one", "talk"), weights)) / sum(weights)
    assert plan.measured["held_out_kl"] == pytest.approx(mean)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "two (not calibrated on)" in card and "talk (chat.jsonl)" in card
    # the check is the KL of the model as it loads, from the same windows
    found = chosen(tiny, tmp_path, [str(place) for place in places], [str(tiny.parent / "two.txt")],
                   2048)  # fmt: skip
    with torch.no_grad():
        logits = [
            load(folder)(input_ids=found.checks).logits.double().log_softmax(-1)
            for folder in (tiny, tmp_path / "out")
        ]
    kl = (logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean()
    loss = -logits[0][:, :-1].gather(2, found.checks[:, 1:, None]).mean()
    assert domains["two"]["kl"] == pytest.approx(float(kl), rel=1e-3)  # float32 layers
    assert domains["two"]["source_loss"] == pytest.approx(float(loss), rel=1e-5)


def test_texts_that_disagree_are_said_so() -> None:
    assert disagreement({"a": (0.1, 1.0), "b": (0.19, 1.0)}) is None
    assert disagreement({"a": (0.1, 1.0), "b": (0.5, 5.0)}) is None  # hard for the source itself
    assert disagreement({"a": (0.1, 1.0)}) is None
    assert "b 3.0 times" in (disagreement({"a": (0.1, 2.0), "b": (0.3, 2.0)}) or "")
    assert disagreement({"a": (0.1, 1.0), "b": (0.3, 1.0)}, ["b"]) is None
    three = {"a": (0.1, 1.0), "b": (0.2, 1.0), "c": (2.0, 2.0)}
    assert "c 10.0 times" in (disagreement(three, ["a", "b"]) or "")
    record = held_out_record(
        Windows(torch.zeros(8, 4), ("a",) * 8, torch.zeros(2, 4), ("b", "b")),
        [(1.0, 5.0), (12.0, 5.0), (14.0, 7.0)],
    )
    assert record["held_out_kl"] == 1.0
    assert [domain["kl"] for domain in record["domains"]] == [1.0, 13.0]
    assert [domain["source_loss"] for domain in record["domains"]] == [5.0, 6.0]
    plan = SimpleNamespace(measured=record, method="mlakit", ranks=(8, 8))
    found = dict(findings(plan))  # type: ignore[arg-type]
    assert "b (not calibrated on) 13 " in found["KL by text"]
    assert found["note"].startswith("texts disagree") and "b 10.8 times" in found["note"]


class Talker:
    """A model that writes down a list of tokens, over and over; and its tokenizer."""

    device, dtype = torch.device("cpu"), torch.float32
    generation_config = SimpleNamespace(eos_token_id=[9, 8])

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.calls = tokens, 0

    def __call__(self, input_ids: torch.Tensor, **options: Any) -> Any:
        assert options["attention_mask"].shape[1] >= input_ids.shape[1]
        logits = torch.full((len(input_ids), 1, 20), -1e9)
        logits[:, 0, self.tokens[self.calls % len(self.tokens)]] = 0.0
        self.calls += 1
        return SimpleNamespace(logits=logits)


class Turns:
    """A tokenizer whose tokens are digits; a template ``12 user 9 3 assistant``."""

    bos_token_id, eos_token_id, chat_template = 1, 9, "yes"

    def __init__(self, **options: Any) -> None:
        vars(self).update(options)

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(digit) for digit in text if digit.isdigit()]}

    def apply_chat_template(self, talk: list[dict[str, str]], **options: Any) -> str:
        assert options == {"tokenize": False, "add_generation_prompt": True}
        return f"12{talk[0]['content']}93"


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "new_cache", lambda *arguments: None)
    monkeypatch.setattr(samples, "attention_specs", lambda model: [])


def written(model: Talker, tokenizer: Turns, length: int) -> list[int]:
    script = read_script(model, tokenizer)
    found = draw_samples(model, script, 2, length, seed=0)
    assert found.shape == (2, length) and torch.equal(found[0], found[1])
    return found[0].tolist()


def test_a_chat_model_writes_both_sides(drawing: None) -> None:
    # 5 is the user's word; 9 ends the turn and the assistant's header 9 3 follows; 6 answers
    model = Talker([5, 9, 0, 6, 9, 0, 0, 5])
    assert written(model, Turns(), 12) == [1, 2, 5, 9, 3, 6, 9, 1, 2, 5, 5, 9]


def test_a_template_that_ends_turns_with_words_lets_the_model_go_on(drawing: None) -> None:
    class Words(Turns):
        def apply_chat_template(self, talk: list[dict[str, str]], **options: Any) -> str:
            return f"12{talk[0]['content']}73"  # 7 is no end of text

    assert written(Talker([5, 7, 3, 6, 8, 0, 0]), Words(), 10) == [1, 2, 5, 7, 3, 6, 8, 1, 2, 5]


def test_a_base_model_begins_with_bos_and_again_after_a_text(drawing: None) -> None:
    plain = Turns(chat_template=None)
    assert written(Talker([5, 6, 9, 0]), plain, 8) == [1, 5, 6, 9, 1, 5, 6, 9]
    ends_with_bos = Talker([5, 6, 1])
    ends_with_bos.generation_config = SimpleNamespace(eos_token_id=[1, 2])
    assert written(ends_with_bos, plain, 7) == [1, 5, 6, 1, 5, 6, 1]
    no_bos = Turns(chat_template=None, bos_token_id=None)  # begins after the end of another text
    assert read_script(Talker([]), no_bos) == Script([9], [], frozenset({8, 9}), dropped=1)
    assert written(Talker([5, 6, 8, 0, 5, 9, 7]), no_bos, 8) == [5, 6, 8, 9, 5, 9, 7, 5]
    silent = Turns(chat_template=None, bos_token_id=None, eos_token_id=None)
    model = Talker([])
    model.generation_config = SimpleNamespace(eos_token_id=None)
    with pytest.raises(UsageError, match="nothing to begin"):
        read_script(model, silent)


def test_samples_follow_the_model_and_the_seed(tiny: Path) -> None:
    model = load(tiny)
    script = Script([0], [], frozenset({1}))
    found = draw_samples(model, script, 64, 12, seed=3)
    assert torch.equal(found, draw_samples(model, script, 64, 12, seed=3))
    assert not torch.equal(found, draw_samples(model, script, 64, 12, seed=4))
    assert len({tuple(row) for row in found.tolist()}) == 64
    with torch.no_grad():
        logits = model(input_ids=found).logits[:, :-1].double().log_softmax(-1)
    free = found[:, :-1] != 1  # what follows an end is not drawn
    chosen = logits.gather(2, found[:, 1:, None])[..., 0][free]
    entropy = -(logits.exp() * logits).sum(-1)[free]
    # surprise of tokens from the model itself is its entropy: five deviations of the mean
    assert abs(float(chosen.mean() + entropy.mean())) < 5 * float(chosen.std()) / len(chosen) ** 0.5


def test_own_samples_are_kept_for_a_later_start(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = chosen(tiny, tmp_path, ["self"], [], 64 * 8)
    assert found.domains == ("self",) * 8
    monkeypatch.setattr(samples, "load", lambda *a, **k: pytest.fail("drawn twice"))
    assert torch.equal(chosen(tiny, tmp_path, ["self"], [], 64 * 8).ids, found.ids)


def test_own_samples_beside_a_text_resume_bit_for_bit(tiny: Path, tmp_path: Path) -> None:
    texts = ["self", str(tiny.parent / "one.txt")]
    convert(tiny, tmp_path / "whole", calibration=texts, **SMALL)

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("convert", 1):
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(tiny, out, calibration=texts, progress=stop, **SMALL)
    assert (out / ".work" / "samples-0.json").exists()
    plan = convert(tiny, out, calibration=texts, **SMALL)
    assert [domain["name"] for domain in plan.measured["domains"]] == ["self", "one"]
    for file in (tmp_path / "whole").iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_chat_template_shapes_conversations_and_samples(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "chat"
    shutil.copytree(tiny, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'][0] }} {{ m['content'] | trim }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>a {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    found = chosen(folder, tmp_path, [str(tiny.parent / "chat.jsonl"), "self"], [], 64 * 16)
    talk, own = (found.ids[[name == who for name in found.domains]] for who in ("chat", "self"))
    header = tokenizer("<s>u ", add_special_tokens=False)["input_ids"]
    assert len(talk) == len(own) == 8
    assert talk[:, :3].tolist() == own[:, :3].tolist() == [header] * 8  # bos is the template's
    answer = tokenizer("</s><s>a ", add_special_tokens=False)["input_ids"]
    ended = [row for row in own.tolist() if 1 in row[:-4]]
    assert ended and all(row[row.index(1) :][:4] == answer for row in ended)


def test_a_model_that_does_not_fit_is_refused_before_any_work(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "free_memory", lambda device: 1000)
    with pytest.raises(MlakitError, match="whole model has to be in memory") as caught:
        convert(tiny, tmp_path / "out", calibration="self", **SMALL)
    assert "--calib FILE" in caught.value.remedy and not (tmp_path / "out").exists()
    monkeypatch.setattr(samples, "free_memory", lambda device: None)
    checkpoint = open_checkpoint(tiny)
    require_memory(checkpoint, read_model(checkpoint.config), 64, "cpu")
    monkeypatch.undo()
    assert (samples.free_memory("cpu") or 2**30) > 2**20


def test_the_command_line_takes_several_texts(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [
        "convert",
        str(tiny),
        "-o",
        str(out),
        "--cache-ratio",
        "0.5",
        "--refine-steps",
        "0",
    ]
    arguments += ["--calib", f"prose={tiny.parent / 'one.txt'}", "--calib", "self"]
    arguments += ["--check", str(tiny.parent / "two.txt"), "--calib-tokens", "1024"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for part in ("prose (one.txt), self", "checked on", "KL by text", "two (not calibrated on)"):
        assert part in result.output
    result = CliRunner().invoke(app, ["convert", str(tiny), "--equal-cache", "--calib", "self",
                                      "--dry-run"])  # fmt: skip
    assert isinstance(result.exception, UsageError) and "needs no text" in str(result.exception)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good"}\n{oops\n')
    result = CliRunner().invoke(
        app, ["convert", str(tiny), "--cache-ratio", "0.5", "--dry-run", "--calib", str(bad)]
    )
    assert isinstance(result.exception, MlakitError) and "line 2" in str(result.exception)
