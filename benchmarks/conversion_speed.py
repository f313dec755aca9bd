"""Time and memory per layer of a conversion: the published code's and ours, same model and text.

    python -m benchmarks.conversion_speed --transmla FOLDER

FOLDER is a checkout of github.com/fxmeng/TransMLA; without it that column says "not given".
Writes results/conversion_speed.json. A llama of random bfloat16 weights at the layer shape of a
1B model, with two and with four layers, each conversion in a process of its own: what two layers
more cost is the cost per layer; starting, loading and saving are told apart. Both sides see the
same windows of tokens, keep the same rank and rotary width, and write the same dtype. The
published code runs with a fixed freqfold and scores no test set, which is less than it does by
default. Processor time is given beside the clock's: with one thread it does not depend on what else
the machine does.
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

from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.resident import Resident

from mlakit.benching.environment import environment

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "conversion_speed.json"
SHAPE, LAYERS, CONTEXT = "llama-3.2-1b", (2, 4), 256
RANK, ROPE, FREQFOLD = 448, 64, 4
OURS: dict[str, dict[str, Any]] = {
    "published method, our code": {"method": "transmla", "freqfold": FREQFOLD, "refine_steps": 0},
    "ours, closed form": {"refine_steps": 0},
    "ours, refined 20 steps": {"refine_steps": 20},
}
PUBLISHED = "published code"


def ours(model: Path, output: Path, tokens: int, goal: dict[str, Any]) -> dict[str, float]:
    """One conversion of ours; seconds of importing and of the work."""
    start = time.perf_counter()
    import mlakit.conversion.run  # noqa: F401
    from mlakit.conversion.apply import convert

    imported = time.perf_counter()
    options = {"kv_lora_rank": RANK, "qk_rope_head_dim": ROPE, "calibration_tokens": tokens}
    stages: dict[str, float] = {}
    last = ["plan", imported]

    def progress(stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        stages[last[0]] = stages.get(last[0], 0.0) + now - last[1]
        last[:] = stage, now

    convert(model, output, progress=progress, **options, **goal)
    return {"import": imported - start, **stages, "work": time.perf_counter() - imported}


def published(model: Path, output: Path, tokens: int, checkout: Path) -> dict[str, float]:
    """One conversion of the published code's; seconds of its steps."""
    start = time.perf_counter()
    from benchmarks.published_transmla import convert

    from mlakit.checkpoint import open_checkpoint
    from mlakit.conversion.budget import Goal
    from mlakit.conversion.plan import make_plan
    from mlakit.conversion.windows import WindowChoice
    from mlakit.data import BUILTIN, named_sources
    from mlakit.families import read_model

    goal = Goal(kv_lora_rank=RANK, qk_rope_head_dim=ROPE, method="transmla")
    checkpoint = open_checkpoint(model)
    plan = make_plan(checkpoint, goal, calibration_tokens=tokens)
    assert plan.calibration is not None
    spec, sources = read_model(checkpoint.config), named_sources([BUILTIN])
    texts = WindowChoice(checkpoint, spec, plan.calibration, sources, "cpu")
    windows = texts.choose(model.parent, lambda *step: None).ids
    imported = time.perf_counter()
    found = convert(checkout, model, output, windows, RANK, ROPE, FREQFOLD)
    work = found["partial_rope"] + found["low_rank"]
    return {"import": imported - start, **found, "work": work}


def child(arguments: argparse.Namespace) -> None:
    """One conversion in this process; the figures are the last line of stdout."""
    with Resident() as resident:
        if arguments.child == PUBLISHED:
            found = published(*arguments.paths, arguments.tokens, arguments.transmla)
        else:
            found = ours(*arguments.paths, arguments.tokens, OURS[arguments.child])
    found["cpu"] = time.process_time()
    print(json.dumps({"seconds": found, **resident.record()}))


def measure(name: str, layers: int, tokens: int, checkout: Path | None) -> dict[str, Any]:
    """Makes the model, converts it in a new process, forgets both."""
    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / "model"
        write_checkpoint(model, SHAPE, layers, CONTEXT)
        command = [sys.executable, "-m", "benchmarks.conversion_speed", "--child", name]
        command += ["--paths", str(model), f"{work}/out", "--tokens", str(tokens)]
        command += ["--transmla", str(checkout)] if checkout else []
        load = environment()["load_average"][0]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return {"layers": layers, "load": load, **json.loads(done.stdout.splitlines()[-1])}


def per_layer(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What each further layer costs in seconds and bytes, from the shallowest and the deepest."""
    first, last = rows[0], rows[-1]
    more = last["layers"] - first["layers"]
    return {
        "cpu_seconds": (last["seconds"]["cpu"] - first["seconds"]["cpu"]) / more,
        "seconds": (last["seconds"]["work"] - first["seconds"]["work"]) / more,
        "seconds_all_in": last["seconds"]["work"] / last["layers"],
        "bytes": (last["own_peak"] - first["own_peak"]) / more,
        "peak_bytes": last["own_peak"],
        "peak_mib": last["own_peak"] / 2**20,
    }


def run(output: Path, tokens: int, names: list[str], checkout: Path | None) -> None:
    """Measures every method at both depths; the JSON is written after each."""
    record: dict[str, Any] = {"environment": environment(), "shape": SHAPE, "tokens": tokens}
    record |= {"window": CONTEXT, "rank": RANK, "rope": ROPE, "methods": {}}
    for name in names:
        if name == PUBLISHED and checkout is None:
            record["methods"][name] = "not given"
            continue
        rows = []
        for layers in LAYERS:
            rows.append(measure(name, layers, tokens, checkout))
            print(f"{name}, {layers} layers: {json.dumps(rows[-1])}", flush=True)
        record["methods"][name] = {"rows": rows, "per_layer": per_layer(rows)}
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    base = record["methods"].get(PUBLISHED)
    if isinstance(base, dict):
        for found in record["methods"].values():
            own = found["per_layer"]
            for kind in ("seconds", "cpu_seconds"):
                own[f"times_faster_{kind}"] = base["per_layer"][kind] / own[kind]
            own["times_smaller_peak"] = base["per_layer"]["peak_bytes"] / own["peak_bytes"]
    output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Measures all methods, or those named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transmla", type=Path, help="checkout of the published code")
    parser.add_argument("--tokens", type=int, default=2048, help="of calibration text")
    known = [PUBLISHED, *OURS]
    parser.add_argument("--methods", nargs="+", choices=known, default=known)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--child", choices=known, help=argparse.SUPPRESS)
    parser.add_argument("--paths", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
    else:
        run(arguments.output, arguments.tokens, arguments.methods, arguments.transmla)


if __name__ == "__main__":
    main()
