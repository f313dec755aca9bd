"""The command: what it prints, and the recipes that use it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from healing_cases import QUICK, make_pair
from mlakit.cli import app
from mlakit.cli.heal import Told

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "healing"
RECIPES = sorted(EXAMPLES.glob("*.sh"))
FLAGS = [
    word for name, value in QUICK.items() for word in (f"--{name.replace('_', '-')}", str(value))
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return make_pair(tmp_path_factory.mktemp("heal"))


def run(*words: object) -> tuple[str, str]:
    done = CliRunner().invoke(app, ["heal", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout, done.stderr


def test_a_run_and_its_forecast(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    original, student, text = pair
    words = (student, "--teacher", original, "--data", text, "-o", tmp_path / "out", *FLAGS)
    planned, _ = run(*words, "--dry-run", "--price-per-hour", 3, "--control")
    assert "6 of 1 x 4 x 1 windows" in planned and "768 tokens" in planned
    assert re.search(r"^cost +about 0\.\d\d", planned, re.MULTILINE)
    assert not (tmp_path / "out").exists()
    out, told = run(*words, "--control", "--ce-weight", 1)
    for row in ("original", "converted", "healed", "control"):
        assert re.search(rf"^{row} +\d+\.\d{{4}} +\d+\.\d{{4}} +[\d,]+", out, re.MULTILINE)
    assert f"mlakit eval {original} {tmp_path / 'out'}" in out
    assert "healed step 2/6" in told and "control step 6/6" in told
    report = json.loads(run(*words, "--control", "--ce-weight", 1, "--json")[0])
    assert report["healed"]["steps"] == 6 and len(report["healed"]["losses"]) == 6


def test_progress_says_speed_time_left_and_cost(capsys: pytest.CaptureFixture[str]) -> None:
    told = Told(price_per_hour=36.0)
    told({"arm": "healed", "kind": "plan", "steps": 101})
    step = {"arm": "healed", "kind": "step", "loss": 1.0}
    told({**step, "step": 1, "tokens": 100, "seconds": 10.0})
    told(
        {
            "arm": "healed",
            "kind": "check",
            "step": 51,
            "tokens": 5100,
            "seconds": 60.0,
            "perplexity": 5.0,
            "kl": 0.1,
        }
    )
    line = capsys.readouterr().err
    assert "step 51/101" in line and "100 tokens/s" in line and "left 0:50" in line
    assert "cost 1.10 in all" in line  # 110 seconds at one cent a second


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_use_flags_that_exist(path: Path) -> None:
    subprocess.run(["sh", "-n", str(path)], check=True)
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    known = {
        command.name: set(
            re.findall(r"--[\w-]+", CliRunner().invoke(app, [command.name, "-h"]).stdout)
        )
        for command in app.registered_commands
        if command.name in ("convert", "heal", "eval")
    }
    for line in text.splitlines():
        verb = re.search(r"mlakit (convert|eval) ", line)
        if line.startswith("set -- "):
            used = "heal"
        elif verb:
            used = verb[1]
        else:
            continue
        flags = set(re.findall(r"(?<!\w)--[a-z][\w-]+", line))
        assert flags <= known[used], (line, flags - known[used])
    assert text.index("--dry-run") < text.rindex('heal "$@"')
