"""The command line: exit codes, one clear error, config files, and verbs on a real checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mlakit
from mlakit.cli import app, main
from mlakit.errors import UsageError

COMMAND = [sys.executable, "-m", "mlakit"]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The installed command in a process of its own, as a user would run it."""
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True)


def test_version_and_help() -> None:
    assert CliRunner().invoke(app, ["--version"]).output.startswith("mlakit ")
    listed = CliRunner().invoke(app, ["--help"]).output
    for verb in (
        "inspect",
        "convert",
        "verify",
        "eval",
        "generate",
        "bench",
        "trace",
        "demo",
        "doctor",
    ):
        assert verb in listed


def test_missing_folder_is_one_line_and_exit_1(tmp_path: Path) -> None:
    done = run("inspect", tmp_path / "nowhere")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "nowhere" in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_verbose_shows_the_traceback(tmp_path: Path) -> None:
    assert "Traceback" in run("inspect", tmp_path / "nowhere", "-v").stderr


def test_an_unexpected_failure_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def fail() -> None:
        raise RuntimeError("of a kind nobody thought of")

    monkeypatch.setattr("mlakit.api.doctor", fail)
    monkeypatch.setattr("sys.argv", ["mlakit", "doctor"])
    with pytest.raises(SystemExit) as ending:
        main()
    shown = capsys.readouterr()
    assert ending.value.code == 1 and shown.out == ""
    assert shown.err.startswith("error: unexpected RuntimeError: of a kind nobody thought of\n")


def test_wrong_usage_is_exit_2(tmp_path: Path) -> None:
    assert run("convert", tmp_path, "--no-such-option").returncode == 2
    assert run("generate", tmp_path).returncode == 2  # no prompt


@pytest.mark.parametrize("verb", ["inspect", "trace", "prove"])
def test_a_picture_is_a_png(verb: str, tmp_path: Path) -> None:
    words = [verb, str(tmp_path), "--picture", str(tmp_path / "x.jpg")]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, UsageError) and "PNG" in str(result.exception)


def test_the_package_names_its_verbs() -> None:
    assert {"convert", "evaluate", "heal", "serve"} <= set(dir(mlakit))
    assert all(callable(getattr(mlakit, name)) for name in dir(mlakit) if name != "__version__")


def test_unknown_family_is_exit_3(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_unheard_of"}))
    done = run("inspect", tmp_path)
    assert done.returncode == 3 and "gpt_unheard_of" in done.stderr


def test_config_file_sets_options(shared: Path, tmp_path: Path) -> None:
    settings = tmp_path / "mlakit.toml"
    settings.write_text("[inspect]\ncontext = 128\nbatch = 3\n")
    model = shared / "models" / "stories260k"
    plain = json.loads(run("inspect", model, "--json", "--context", 128, "--batch", 3).stdout)
    configured = json.loads(run("--config", settings, "inspect", model, "--json").stdout)
    assert configured == plain


def test_config_file_may_follow_the_verb_and_spells_options_as_the_command_line(
    shared: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "mlakit.toml"
    settings.write_text("[inspect]\njson = true\nkv-lora-rank = 12\n")
    found = json.loads(
        run("inspect", shared / "models" / "stories260k", "--config", settings).stdout
    )
    assert 12 in [variant["kv_lora_rank"] for variant in found["variants"]]


@pytest.mark.parametrize(
    "content",
    ["[nonsense]\nx = 1\n", "not toml", "inspect = 3\n", "[doctor]\nno-such-option = 1\n"],
)
def test_bad_config_file(content: str, tmp_path: Path) -> None:
    settings = tmp_path / "mlakit.toml"
    settings.write_text(content)
    done = run("--config", settings, "doctor")
    assert done.returncode == 2 and "mlakit.toml" in done.stderr


def test_prompts_from_a_file_and_standard_input(shared: Path, tmp_path: Path) -> None:
    model, prompts = shared / "models" / "stories260k", tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time\n\nThe cat\n")
    rows = run("generate", model, "--prompt-file", prompts, "--max-new-tokens", 2).stdout
    assert "[1] Once upon a time" in rows and "[2] The cat" in rows and "[3]" not in rows
    done = subprocess.run(
        [*COMMAND, "generate", str(model), "-", "--max-new-tokens", "2"],
        input="The cat\n",
        capture_output=True,
        text=True,
    )
    assert done.stdout == rows[rows.index("The cat") :]


def test_nothing_is_computed_for_a_report_that_cannot_be_written(
    shared: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    done = run("eval", shared / "models" / "stories260k", "-o", tmp_path / "file" / "report")
    assert done.returncode == 1 and "is a file" in done.stderr and done.stdout == ""


def test_a_damaged_tokenizer_is_one_error(shared: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(shared / "models" / "stories260k", model, copy_function=shutil.copyfile)
    model.chmod(0o755)
    (model / "tokenizer.json").write_text("{")
    for verb in (("generate", model, "hi"), ("trace", model)):
        done = run(*verb)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith("error: ") and "tokenizer" in done.stderr


def test_the_whole_job(shared: Path, tmp_path: Path) -> None:
    source, text = shared / "models" / "stories260k", shared / "data/tinystories/valid.txt"
    exact = tmp_path / "exact"
    assert run("convert", source, "-o", exact, "--equal-cache").returncode == 0
    verified = run("verify", source, exact, "--text", text, "--json")
    assert verified.returncode == 0 and json.loads(verified.stdout)["kl_mean"] < 1e-9
    written = [run("generate", model, "Once upon a time", "--json") for model in (source, exact)]
    before, after = (json.loads(done.stdout)["results"] for done in written)
    assert before == after
    assert not any(done.stderr for done in written)  # no library talks to the user


def test_compress_and_refuse_below_threshold(shared: Path, tmp_path: Path) -> None:
    source, text = shared / "models" / "stories260k", shared / "data/tinystories/train.txt"
    small = tmp_path / "small"
    options = ["--cache-ratio", "0.5", "--calib", text, "--calib-tokens", 4096, "--refine-steps", 0]
    assert run("convert", source, "-o", small, *options).returncode == 0
    done = run("verify", source, small, "--text", text, "--max-kl", 1e-6)
    assert done.returncode == 4 and "KL" in done.stderr


def test_doctor_names_the_kernel() -> None:
    found = json.loads(run("doctor", "--json").stdout)
    assert found["decode on cpu"].startswith("cpu ")
