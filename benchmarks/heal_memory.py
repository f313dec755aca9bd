"""What healing needs: peak memory against the forecast of the dry run.

    python -m benchmarks.heal_memory

Writes results/heal_memory.json. Checkpoints of random bfloat16 weights; each run is the command
itself on a CPU, in a process of its own which samples its own pages (pages of mapped files are the
kernel's to drop): as it is, and with every large block given back to the kernel as soon as it is
free (``MALLOC_MMAP_THRESHOLD_``), which tells what is needed from what the allocator holds on to.
The forecast is that of ``--dry-run`` just before. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.random_checkpoint import SHAPES, write_checkpoint
from benchmarks.resident import Resident

from mlakit.benching.environment import environment
from mlakit.checkpoint import write_json_atomic

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "heal_memory.json"
TEXT = ROOT / "src" / "mlakit" / "assets" / "text" / "calibration.txt"


@dataclass(frozen=True)
class Case:
    """One run: a shape, its layers and vocabulary, and flags of ``mlakit heal``."""

    shape: str
    layers: int
    flags: str
    vocabulary: int | None = None


CASES = {
    "key/value path": Case("moderate", 4, "--micro-batch 2 --sequence-length 256"),
    "all weights": Case("moderate", 4, "--micro-batch 2 --sequence-length 256 --train all"),
    "recomputed": Case("moderate", 4, "--micro-batch 2 --sequence-length 512 --checkpointing"),
    "bfloat16": Case("moderate", 4, "--micro-batch 2 --sequence-length 512 --dtype bfloat16"),
    "large vocabulary": Case("moderate", 2, "--micro-batch 2 --sequence-length 512", 32768),
}
COMMON = "--batch 4 --steps 2 --checks 1 --held-out-windows 2"


def child(arguments: list[str]) -> None:
    """Runs the command in this process; its memory goes to the last line of stdout."""
    from mlakit.cli import app

    with Resident() as resident:
        app(arguments, standalone_mode=False)
    print(json.dumps(resident.record()))


def measure(case: Case, work: Path) -> dict[str, Any]:
    """One run and its forecast."""
    model, student = work / "model", work / "student"
    write_checkpoint(model, case.shape, case.layers, vocabulary=case.vocabulary)
    last_line_of(
        "convert", str(model), "--kv-lora-rank", "192", "--qk-rope-head-dim",
        str(SHAPES[case.shape][3]), "--refine-steps", "0", "--calib-tokens", "1024",
        "-o", str(student), "--json",
    )  # fmt: skip
    words = ["heal", str(student), "--teacher", str(model), "--data", str(TEXT), "--json"]
    words += [*COMMON.split(), *case.flags.split()]
    planned = last_line_of(*words, "--dry-run", whole=True)
    found = last_line_of(*words, "-o", str(work / "healed"))
    strict = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
    needed = last_line_of(*words, "-o", str(work / "again"), environ=strict)["own_peak"]
    parts = ("weights", "optimiser", "activation", "program")
    forecast = {f"{part}_bytes": planned[f"{part}_bytes"] for part in parts}
    return {
        **found,
        **forecast,
        "forecast": sum(forecast.values()),
        "needed_peak": needed,
        "needed_over_forecast": needed / sum(forecast.values()),
        "over_forecast": found["own_peak"] / sum(forecast.values()),
    }


def last_line_of(
    *arguments: str, whole: bool = False, environ: dict[str, str] | None = None
) -> dict[str, Any]:
    """The JSON object that this module prints last in a new process, or the one before it."""
    command = [sys.executable, "-m", "benchmarks.heal_memory", "--child", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True,
        env={**os.environ, **(environ or {})},
    )  # fmt: skip
    head, _, last = done.stdout.rstrip().rpartition("\n")
    return json.loads(head if whole else last)


def main() -> None:
    """Measures the cases and writes the JSON after each."""
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    arguments = parser.parse_args()
    path = arguments.output
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"cases": {}}
    for name in arguments.cases:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as work:
            found = measure(case, Path(work))
        record["cases"][name] = {"layers": case.layers, "flags": case.flags, **found}
        record["environment"] = environment()
        for key in ("over_forecast", "needed_over_forecast"):
            ratios = [row[key] for row in record["cases"].values()]
            record[key] = {"lowest": min(ratios), "highest": max(ratios)}
        write_json_atomic(path, record)
        print(
            f"{name}: {found['own_peak'] / 2**20:,.0f} MiB, {found['needed_peak'] / 2**20:,.0f}"
            f" needed, forecast {found['forecast'] / 2**20:,.0f}: {found['over_forecast']:.2f} and"
            f" {found['needed_over_forecast']:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
