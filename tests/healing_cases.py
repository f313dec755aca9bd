"""A tiny original, its conversions and a text to heal them with."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mlakit import convert, heal
from mlakit.healing.report import HealReport
from tiny_models import save_tiny

QUICK: dict[str, Any] = {
    "steps": 6,
    "batch": 4,
    "checks": 3,
    "held_out_windows": 2,
    "sequence_length": 32,
}
"""A run of a second or two."""


def write_text(path: Path, letters: int = 6000) -> Path:
    """Words in no order: enough for a model of letters to learn from."""
    draw = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "ran", "home", "again"]
    text = " ".join(draw.choice(words) for _ in range(letters // 4))
    path.write_text(text[:letters], encoding="utf-8")
    return path


def make_pair(folder: Path, family: str = "llama", **goal: Any) -> tuple[Path, Path, Path]:
    """An original, a student and a text."""
    original = save_tiny(folder / "original", family, **goal.pop("config", {}))
    goal = goal or {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "refine_steps": 0}
    if not goal.get("equal_cache"):
        goal.setdefault("calibration_tokens", 256)
        goal.setdefault("calibration", write_text(folder / "calibration.txt", 3000))
    convert(original, folder / "student", **goal)
    return original, folder / "student", write_text(folder / "text.txt")


def quick_heal(pair: tuple[Path, Path, Path], output: Path | None, **given: Any) -> HealReport:
    """Heals with the text of ``make_pair``."""
    original, student, text = pair
    report = heal(student, output, teacher=original, **{"data": text, **QUICK, **given})
    assert isinstance(report, HealReport)
    return report


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def changed(before: Path, after: Path) -> set[str]:
    """Names of the tensors that are not the same bit for bit."""
    old, new = stored(before), stored(after)
    assert old.keys() == new.keys()
    assert all(old[name].dtype == new[name].dtype for name in old)
    return {name for name in old if not torch.equal(old[name], new[name])}


def log(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's log, without clocks."""
    rows = [json.loads(line) for line in (folder / "heal.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
