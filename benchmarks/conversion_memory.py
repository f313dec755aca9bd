"""What a conversion needs: memory against depth, and memory and time against the estimate.

    python -m benchmarks.conversion_memory

Writes results/conversion_memory.json and docs/conversion_memory.png.
Checkpoints of random bfloat16 weights, a small vocabulary but for one; each conversion is the
command itself in a process of its own, which samples its own memory. Own pages must be there; pages
of mapped files (weights, libraries) are the kernel's to drop, so they are told apart. The estimate
is that of ``--dry-run`` just before. With one thread, processor time is what the clock would say
on an idle machine. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from benchmarks.random_checkpoint import SHAPES, write_checkpoint
from benchmarks.resident import Resident

from mlakit.benching.environment import environment

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "conversion_memory.json"
PICTURE = ROOT / "docs" / "conversion_memory.png"
CASES = {
    "moderate, closed form": ("moderate", (8, 16, 32), 1024, 512, 0, None),
    "moderate, refined": ("moderate", (8, 16, 32), 1024, 512, 2, None),
    "moderate, long windows": ("moderate", (4,), 8192, 2048, 0, None),
    "moderate, long windows, refined": ("moderate", (4,), 8192, 2048, 2, None),
    "moderate, many words": ("moderate", (2,), 8192, 2048, 0, 131072),
    "llama-3-8b, closed form": ("llama-3-8b", (2, 4), 2048, 512, 0, None),
    "llama-3-8b, refined": ("llama-3-8b", (2,), 2048, 512, 2, None),
    "llama-3-8b, long windows": ("llama-3-8b", (2,), 4096, 2048, 0, None),
    "llama-3-8b, long windows, refined": ("llama-3-8b", (2,), 4096, 2048, 2, None),
}
"""Shape, numbers of layers, calibration tokens and windows, gradient steps per layer; how many
tokens the vocabulary has, if more than the tokenizer."""


def child(arguments: list[str]) -> None:
    """Runs the command in this process; its memory and time go to the last line of stdout."""
    from mlakit.cli import app

    start = time.perf_counter()
    with Resident() as resident:
        app(arguments, standalone_mode=False)
    seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time()}
    print(json.dumps({**seconds, **resident.record()}))


def measure(model: Path, work: Path, tokens: int, window: int, steps: int) -> dict[str, Any]:
    """One conversion and its estimate."""
    options = [
        *("convert", str(model), "--cache-ratio", "0.5", "--json"),
        *("--calib-tokens", str(tokens), "--calib-window", str(window)),
        *("--refine-steps", str(steps)),
    ]
    start = time.perf_counter()
    planned = last_line_of("--child", *options, "--dry-run", whole=True)
    dry_run = time.perf_counter() - start
    with tempfile.TemporaryDirectory(dir=work) as folder:
        found = last_line_of("--child", *options, "-o", f"{folder}/out")
    estimate = planned["estimate"]
    return {
        **found,
        "dry_run_seconds": dry_run,
        "estimated_memory": estimate["memory_bytes"],
        "estimated_seconds": estimate["seconds"],
        "memory_over_estimate": found["own_peak"] / estimate["memory_bytes"],
        "seconds_over_estimate": found["seconds"] / estimate["seconds"],
        "cpu_seconds_over_estimate": found["cpu_seconds"] / estimate["seconds"],
    }


def last_line_of(*arguments: str, whole: bool = False) -> dict[str, Any]:
    """The JSON object that this module prints last in a new process, or the one before it."""
    command = [sys.executable, "-m", "benchmarks.conversion_memory", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    head, _, last = done.stdout.rstrip().rpartition("\n")
    return json.loads(head if whole else last)


def draw(rows: list[dict[str, Any]]) -> None:
    """Peak memory against depth, one panel per shape; the estimate dashed."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, panels = plt.subplots(1, len(shapes), figsize=(3.6 * len(shapes), 3.0), squeeze=False)
    for panel, shape in zip(panels[0], shapes):
        ticks: set[int] = set()
        for name, colour in (("closed form", "#ee7733"), ("refined", "#cc3311")):
            found = [row for row in rows if row["case"] == f"{shape}, {name}"]
            found.sort(key=lambda row: row["layers"])
            if not found:
                continue
            layers = [row["layers"] for row in found]
            ticks |= set(layers)
            for key, style, what in (
                ("own_peak", "o-", "measured"),
                ("estimated_memory", "x--", "estimate"),
            ):
                sizes = [row[key] / 2**20 for row in found]
                panel.plot(layers, sizes, style, color=colour, ms=7, label=f"{name}, {what}")
        hidden, heads, groups, dim, _ = SHAPES[shape]
        panel.set_title(f"{shape}: D {hidden}, {heads} heads on {groups} x {dim}", fontsize=8)
        panel.set_ylim(0, 1.35 * panel.get_ylim()[1])
        panel.set_xticks(sorted(ticks))
        panel.set_xlabel("layers")
        panel.grid(axis="y", color="#e6e8ec")
    panels[0][0].set_ylabel("peak memory of the process, MiB")
    panels[0][0].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=160)


def run(output: Path, cases: list[str], repeats: int) -> None:
    """Measures the cases and writes the JSON after each conversion."""
    record: dict[str, Any] = {"rows": []}
    if output.exists():
        old = json.loads(output.read_text(encoding="utf-8"))["rows"]
        record["rows"] = [row for row in old if row["case"] not in cases]
    for case in cases:
        shape, depths, tokens, window, steps, words = CASES[case]
        for layers in depths * repeats:
            with tempfile.TemporaryDirectory() as work:
                write_checkpoint(Path(work) / "model", shape, layers, vocabulary=words)
                found = measure(Path(work) / "model", Path(work), tokens, window, steps)
            row = {"case": case, "shape": shape, "layers": layers, "tokens": tokens, **found}
            row |= {"window": window, "steps": steps, "environment": environment()}
            record["rows"].append(row)
            record["growth"] = growth(record["rows"])
            record["table"] = table(record["rows"])
            output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            print(
                f"{case}, {layers} layers: {found['own_peak'] / 2**20:,.0f} MiB of own pages"
                f" ({found['memory_over_estimate']:.2f} of the estimate) and"
                f" {found['mapped_peak'] / 2**20:,.0f} mapped, {found['seconds']:.1f} s"
                f" ({found['seconds_over_estimate']:.2f} of the estimate;"
                f" {found['cpu_seconds_over_estimate']:.2f} in processor time), load"
                f" {row['environment']['load_average'][0]}",
                flush=True,
            )
    if output == RESULT:
        draw(record["rows"])


def growth(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Peak at the greatest depth over that at the smallest, by case; the highest of repeats."""
    found: dict[str, float] = {}
    for case in dict.fromkeys(row["case"] for row in rows):
        peaks: dict[int, int] = {}
        for row in rows:
            if row["case"] == case:
                peaks[row["layers"]] = max(row["own_peak"], peaks.get(row["layers"], 0))
        found[case] = peaks[max(peaks)] / peaks[min(peaks)] - 1
    return found


def table(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """MiB and seconds by case and depth, for the pages."""
    highest = sorted(rows, key=lambda row: row["own_peak"])
    return {
        f"{row['case']}, {row['layers']}": {
            "own": row["own_peak"] / 2**20,
            "mapped": row["mapped_peak"] / 2**20,
            "estimate": row["estimated_memory"] / 2**20,
            "seconds": row["seconds"],
            "cpu_seconds": row["cpu_seconds"],
            "estimated_seconds": row["estimated_seconds"],
            "time_over_estimate": row["cpu_seconds_over_estimate"],
        }
        for row in highest
    }


def main() -> None:
    """Measures all cases, or those named."""
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=1, help="what is free differs by a few %%")
    arguments = parser.parse_args()
    run(arguments.output, arguments.cases, arguments.repeats)


if __name__ == "__main__":
    main()
