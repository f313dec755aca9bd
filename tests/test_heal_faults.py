"""Healing when something goes wrong: kills, memory, numbers, and inputs of no use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import mlakit
from healing_cases import QUICK, log, make_pair, quick_heal, stored, write_text
from mlakit import heal
from mlakit.checkpoint import open_checkpoint
from mlakit.errors import MlakitError, UsageError
from mlakit.healing.forecast import Forecast
from mlakit.healing.journal import Journal
from mlakit.healing.latent_norm import needed_exponent
from mlakit.healing.pair import Pair as Models
from tiny_models import save_tiny

Pair = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("heal"))


class Killed(BaseException):
    """Ends a run as a signal would."""


@pytest.mark.parametrize(
    "kind,count",
    [
        ("step", 5),
        pytest.param("step", 1, marks=pytest.mark.slow),
        pytest.param("step", 9, marks=pytest.mark.slow),  # in the control arm
        pytest.param("check", 2, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_with_the_same_losses(
    pair: Pair, tmp_path: Path, kind: str, count: int
) -> None:
    options: dict[str, Any] = {"control": True, "ce_weight": 1.0, "learning_rate": 1e-3}
    quick_heal(pair, tmp_path / "whole", **options)
    seen = 0

    def kill(row: dict[str, Any]) -> None:
        nonlocal seen
        seen += row["kind"] == kind
        if seen == count:
            raise Killed

    with pytest.raises(Killed):
        quick_heal(pair, tmp_path / "out", told=kill, **options)
    assert not (tmp_path / "out").exists()
    quick_heal(pair, tmp_path / "out", **options)
    assert log(tmp_path / "out") == log(tmp_path / "whole")
    ours, theirs = stored(tmp_path / "out"), stored(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )


def test_half_a_checkpoint_is_not_gone_on_from(pair: Pair, tmp_path: Path) -> None:
    def kill(row: dict[str, Any]) -> None:
        if row["kind"] == "step" and row["step"] == 5:
            raise Killed

    quick_heal(pair, tmp_path / "whole")
    with pytest.raises(Killed):
        quick_heal(pair, tmp_path / "out", told=kill)
    arm = tmp_path / "out.partial" / "arms" / "healed"
    assert {path.name for path in arm.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    (arm / "checkpoint-4" / "complete.json").unlink()
    (arm / "checkpoint-4" / "weights.safetensors").write_bytes(b"half")
    quick_heal(pair, tmp_path / "out")
    assert log(tmp_path / "out") == log(tmp_path / "whole")


def test_too_little_memory_halves_the_micro_batch(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = Models.losses

    def scarce(self: Models, ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return losses(self, ids, *args, **kwargs)

    small = quick_heal(pair, None, micro_batch=1)
    monkeypatch.setattr(Models, "losses", scarce)
    report = quick_heal(pair, tmp_path / "out", micro_batch=4)
    events = [(event["micro_batch"], event["accumulation"]) for event in report.healed.events]
    assert events == [(2, 2), (1, 4)]
    assert [row["loss"] for row in report.healed.losses] == [
        row["loss"] for row in small.healed.losses
    ]
    assert "out of memory" in (tmp_path / "out" / "README.md").read_text()


def test_no_memory_at_all_is_one_error(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def scarce(self: Models, *args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Models, "losses", scarce)
    with pytest.raises(MlakitError, match="out of memory with 1 windows"):
        quick_heal(pair, None)


@pytest.mark.parametrize("times", [1, 5])
def test_divergence_goes_back_at_half_the_rate(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    losses, left = Models.losses, times

    def broken(self: Models, *args: Any, **kwargs: Any) -> Any:
        nonlocal left
        loss, facts = losses(self, *args, **kwargs)
        if self.steps_seen >= 5 and left:
            left -= 1
            return loss * torch.nan, facts * torch.nan
        self.steps_seen += 1
        return loss, facts

    Models.steps_seen = 0
    monkeypatch.setattr(Models, "losses", broken)
    report = quick_heal(pair, tmp_path / "out", learning_rate=1e-3)
    events = report.healed.events
    assert [event["what"] for event in events] == ["diverged"] * min(times, 3)
    assert events[0]["back_to"] == 4 and events[0]["scale"] == 0.5
    assert all(torch.isfinite(tensor).all() for tensor in stored(tmp_path / "out").values())
    if times == 1:
        assert report.healed.steps == 6 and report.healed.losses[-1]["rate"] <= 0.5
    else:
        assert "diverged 3 times" in report.healed.stopped


def test_the_latent_norm_grows_with_the_latent(pair: Pair, tmp_path: Path) -> None:
    student = open_checkpoint(pair[1])
    stored_eps = student.config["latent_norm_eps"]
    assert 4.0 ** (needed_exponent(student, {}) or 0) == stored_eps
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    longer = {name: student.read(name) * 2**12}
    raised = needed_exponent(student, longer)
    assert raised is not None and 4.0**raised > stored_eps
    from mlakit.checkpoint import ShardWriter
    from mlakit.healing.export import write_healed

    with ShardWriter(tmp_path / "out", len(student.shards)) as shards:
        assert write_healed(student, shards, longer, {}) == raised
    written = open_checkpoint(tmp_path / "out")
    assert written.config["latent_norm_eps"] == 4.0**raised
    norm = mlakit.load(tmp_path / "out").model.layers[1].self_attn.kv_a_layernorm
    latent = torch.randn(5, 8) * 2**12
    torch.testing.assert_close(norm(latent), latent, rtol=2**-22, atol=0)  # two roundings


def refusals(pair: Pair, tmp_path: Path) -> dict[str, tuple[dict[str, Any], str]]:
    jsonl, numbers = tmp_path / "rows.jsonl", tmp_path / "short.txt"
    jsonl.write_text('{"text": "the cat"}\n{"text": "the\n')
    numbers.write_text("too short")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    return {
        "no text": ({"data": []}, "nothing to train on"),
        "half a row": ({"data": jsonl}, "line 2 is not JSON"),
        "empty file": ({"data": tmp_path / "empty.jsonl"}, "is empty"),
        "short": ({"data": numbers}, "too few for one window"),
        "long windows": ({"sequence_length": 65}, "longer than the context of 64"),
        "no completions": ({"completion_only": True}, "no completions"),
        "unknown part": ({"train": "mlp"}, "none of kv, attention, all, lora"),
        "unknown setting": ({"momentum": 0.9}, "no setting 'momentum'"),
        "nothing to learn": ({"kl_weight": 0}, "nothing to learn"),
        "a rank without lora": ({"lora_rank": 4}, "for --train lora"),
        "odd micro batch": ({"micro_batch": 3}, "does not divide"),
        "unknown recipe": ({"recipe": "quick"}, "no recipe 'quick'"),
        "weights": ({"weights": [1, 2]}, "2 weights were given for 1 texts"),
        "narrow": ({"dtype": "float16"}, "none of float32, bfloat16"),
        "second GPU": ({"device": "cuda:1"}, "not on 'cuda:1'"),
    }


@pytest.mark.parametrize(
    "case",
    [
        *("no text", "half a row", "empty file", "short", "long windows", "no completions"),
        *("unknown part", "unknown setting", "nothing to learn", "odd micro batch"),
        *("unknown recipe", "weights", "narrow", "second GPU"),
    ],
)
def test_bad_input_is_one_error(pair: Pair, tmp_path: Path, case: str) -> None:
    given, message = refusals(pair, tmp_path)[case]
    with pytest.raises(MlakitError, match=message):
        quick_heal(pair, tmp_path / "out", **given)
    assert not list(tmp_path.glob("out*"))


def test_models_that_speak_otherwise_are_refused(pair: Pair, tmp_path: Path) -> None:
    larger = save_tiny(tmp_path / "larger", vocab_size=60)
    with pytest.raises(UsageError, match=r"58 tokens and .* has 60"):
        quick_heal((larger, pair[1], pair[2]), None)
    other = shutil.copytree(pair[0], tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["t"] = vocabulary["t"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match="cut the same text differently"):
        quick_heal((other, pair[1], pair[2]), None)


def test_what_cannot_be_written_back_is_refused(tmp_path: Path) -> None:
    goal = {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "refine_steps": 0}
    pair = make_pair(tmp_path, "mixtral", **goal)
    for options in ({}, {"dry_run": True}):
        with pytest.raises(MlakitError, match="stored in another form"):
            quick_heal(pair, tmp_path / "out", train="all", **options)


def test_a_folder_of_something_else_stays(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        quick_heal(pair, tmp_path / "out")
    with pytest.raises(UsageError, match="never written"):
        quick_heal(pair, pair[1] / "below")

    def kill(row: dict[str, Any]) -> None:
        raise Killed

    with pytest.raises(Killed):
        quick_heal(pair, tmp_path / "new", told=kill)
    with pytest.raises(UsageError, match="beginning of another run"):
        quick_heal(pair, tmp_path / "new", seed=1)


def test_empty_rows_are_reported(pair: Pair, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    words = write_text(tmp_path / "words.txt").read_text()
    rows.write_text(json.dumps({"text": words}) + "\n\n" + json.dumps({"text": ""}) + "\n")
    report = quick_heal(pair, tmp_path / "out", data=rows)
    assert f"2 empty rows were passed over, the first is {rows}, line 2" in str(
        report.healed.events
    )


def test_a_missing_package_is_named(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlakit.healing.inputs.find_spec", lambda name: None)
    with pytest.raises(MlakitError, match=r"pip install 'mlakit\[heal\]'"):
        quick_heal(pair, None)


def test_a_dry_run_writes_nothing(pair: Pair, tmp_path: Path) -> None:
    found = heal(
        pair[1], tmp_path / "out", teacher=pair[0], data=pair[2], dry_run=True,
        price_per_hour=3600.0, **QUICK,
    )  # fmt: skip
    assert isinstance(found, Forecast)
    assert found.tokens == 6 * 4 * 32 and found.price == pytest.approx(found.seconds)
    report = quick_heal(pair, None)
    assert (found.trained, found.parameters) == (report.healed.trained, report.healed.parameters)
    assert not list(tmp_path.iterdir())


def test_half_a_line_of_the_log_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "heal.jsonl"
    journal = Journal(path, writes=True)
    journal.add("healed", "check", 1, intervals={"nll": 1.0}, objective=2.0)
    whole = path.read_text()
    for torn in (whole[:-3], whole[:-2]):  # the second ends in a brace
        path.write_text(whole + torn)
        again = Journal(path, writes=True)
        assert again.rows == journal.rows and path.read_text() == whole
    path.write_text("{}}\n" + whole)
    with pytest.raises(MlakitError, match="is damaged"):
        Journal(path, writes=True)
