"""``mlakit convert`` as a command: plan, next commands, and the way on after an interruption."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from mlakit.checkpoint import open_checkpoint
from mlakit.cli import app
from mlakit.conversion.apply import convert
from mlakit.errors import MlakitError, UnsupportedModelError, UsageError
from tiny_models import TEXT, save_tiny


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return save_tiny(tmp_path / "tiny")


def test_dry_run_prints_the_plan_and_writes_nothing(tiny: Path) -> None:
    result = CliRunner().invoke(app, ["convert", str(tiny), "--equal-cache", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "100.0% of its own, 50.0% of MHA" in result.output
    assert [path.name for path in tiny.parent.iterdir() if path.is_dir()] == ["tiny"]


def test_a_dry_run_looks_at_the_output_folder_too(tiny: Path) -> None:
    out = tiny.parent / "out"
    convert(tiny, out, equal_cache=True)
    for folder, word in ((out, "another plan"), (tiny, "lies in the source")):
        with pytest.raises(UsageError, match=word):
            convert(tiny, folder, equal_cache=True, form="article", dry_run=True)
    assert convert(tiny, out, equal_cache=True, dry_run=True).goal.equal_cache
    words = ["convert", str(tiny), "-o", str(out), "--equal-cache"]
    assert "out was complete already. Next:" in CliRunner().invoke(app, words).output


def test_what_calibration_decides_is_said_with_its_bound(tiny: Path) -> None:
    words = ["convert", str(tiny), "--cache-ratio", "0.5", "--cache-bits", "auto", "--dry-run"]
    output = CliRunner().invoke(app, [*words, "--calib", str(tiny.parent / "text.txt")]).output
    assert "256 -> at most 128 bytes: 50.0% of its own, 25.0% of MHA" in output
    assert "full rank saves no cache" not in output


@pytest.mark.parametrize(
    "goal", [{"equal_cache": True}, {"cache_ratio": 0.5}], ids=["exact", "half"]
)
def test_weights_that_are_no_numbers_are_named(tiny: Path, goal: dict[str, Any]) -> None:
    path, name = tiny / "model.safetensors", "model.layers.1.self_attn.k_proj.weight"
    tensors = load_file(path)
    tensors[name][3, 4] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    texts = {} if "equal_cache" in goal else {"calibration": tiny.parent / "text.txt"}
    with pytest.raises(MlakitError, match=f"{name} of .* not finite"):
        convert(tiny, tiny.parent / "out", **goal, **texts)


def test_convert_prints_what_was_measured_and_what_comes_next(tiny: Path) -> None:
    out = tiny.parent / "out"
    arguments = ["convert", str(tiny), "-o", str(out), "--cache-ratio", "0.5"]
    arguments += ["--calib", str(tiny.parent / "text.txt")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for part in ("50.0% of its own", "output error", "held-out", "mlakit eval"):
        assert part in result.output
    assert re.search(r"; peak [\d,]+ MiB", result.output) or sys.platform == "win32"
    card = (out / "README.md").read_text()
    assert "| this model | 128 | 50.0% | 25.0% |" in card and str(tiny.parent) not in card
    again = CliRunner().invoke(app, [*arguments, "--json"])
    plan = json.loads(again.stdout)
    assert plan["status"] == "complete" and plan["measured"]["layers"][0]["error"] > 0
    published = [*arguments[:3], str(tiny.parent / "other"), *arguments[4:], "--method", "transmla"]
    result = CliRunner().invoke(app, published)
    assert "held-out perplexity" in result.output and "energy kept" in result.output


def test_every_stored_dtype_is_the_planned_one(tiny: Path) -> None:
    """Queries that stay the source's own are copies, in the source's bytes."""
    out = tiny.parent / "wide"
    arguments = ["convert", str(tiny), "-o", str(out), "--cache-ratio", "0.75", "--json"]
    arguments += ["--calib", str(tiny.parent / "text.txt"), "--calib-tokens", "1024"]
    result = CliRunner().invoke(app, [*arguments, "--refine-steps", "0"])
    planned = {t["name"]: t["dtype"] for t in json.loads(result.stdout)["tensors"]}
    written = open_checkpoint(out)
    stored = {name: written.dtype(name) for name in written.names}
    assert stored == planned
    assert any(name.endswith("q_up_proj.weight") for name in stored)


def test_windows_are_as_long_as_asked_for(tiny: Path) -> None:
    common = ["convert", str(tiny), "--dry-run", "--cache-ratio", "0.5", "--calib",
              str(tiny.parent / "text.txt")]  # fmt: skip
    for window, said in (("8", "windows of 8 tokens"), ("64", "windows of 64 tokens")):
        result = CliRunner().invoke(app, [*common, "--calib-window", window])
        assert said in result.output and ("losses grow" in result.output) == (window == "8")


def test_the_source_folder_is_never_written_to(tiny: Path) -> None:
    before = sorted(path.name for path in tiny.iterdir())
    for output in (tiny, tiny / "inside"):
        result = CliRunner().invoke(app, ["convert", str(tiny), "-o", str(output), "--equal-cache"])
        assert isinstance(result.exception, UsageError) and "source" in str(result.exception)
    assert sorted(path.name for path in tiny.iterdir()) == before


def test_a_config_that_makes_no_model_is_refused_before_anything_is_written(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({**config, "hidden_act": "frobnicate"}))
    arguments = ["convert", str(tiny), "-o", str(tiny.parent / "out"), "--cache-ratio", "0.5"]
    arguments += ["--calib", str(tiny.parent / "text.txt")]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UnsupportedModelError)
    assert "frobnicate" in str(result.exception) and not (tiny.parent / "out").exists()


def test_a_tokenizer_of_another_model_is_refused(tiny: Path) -> None:
    config = json.loads((tiny / "tokenizer.json").read_text())
    known = max(config["model"]["vocab"].values())
    config["model"]["vocab"] = {
        token: index + known for token, index in config["model"]["vocab"].items()
    }
    (tiny / "tokenizer.json").write_text(json.dumps(config))
    arguments = ["convert", str(tiny), "-o", str(tiny.parent / "out"), "--cache-ratio", "0.5"]
    arguments += ["--calib", str(tiny.parent / "text.txt")]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, MlakitError) and "embeddings" in str(result.exception)
    assert not (tiny.parent / "out").exists()


def test_the_result_cuts_text_as_its_source_whatever_the_tokenizer_config_says(
    tmp_path: Path,
) -> None:
    source = save_tiny(tmp_path / "qwen", "qwen2")
    convert(source, tmp_path / "out", equal_cache=True)
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (source, tmp_path / "out"))
    assert type(ours) is type(theirs)
    assert ours(TEXT[:500])["input_ids"] == theirs(TEXT[:500])["input_ids"]


def test_an_interrupted_run_says_how_to_go_on(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlakit.conversion.run.Run.write", interrupt)
    arguments = ["convert", str(tiny), "-o", str(tiny.parent / "my out"), "--equal-cache"]
    monkeypatch.setattr(sys, "argv", ["mlakit", *arguments])
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 130
    assert f"mlakit convert {tiny} -o '{tiny.parent}/my out' --equal-cache" in result.output


@pytest.mark.parametrize(
    "options,message",
    [
        (["--equal-cache"], "No output folder"),
        (["--cache-ratio", "0.5", "--freqfold", "many", "--dry-run"], "neither a number"),
        (["--cache-ratio", "0.5", "--without", "wings", "--dry-run"], "no such part"),
        (["--dry-run"], "how much cache"),
    ],
)
def test_usage_errors(tiny: Path, options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["convert", str(tiny), *options])
    assert isinstance(result.exception, UsageError) and message in str(result.exception)
