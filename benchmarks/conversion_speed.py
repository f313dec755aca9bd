"""Time and memory per layer of a conversion: the published code's and ours, same model and text.

    python -m benchmarks.conversion_speed --transmla FOLDER

FOLDER is a checkout of github.com/fxmeng/TransMLA; without it that column says "not given".
Writes results/conversion_speed.json. A llama of random bfloat16 weights at the layer shape of a
1B model, shallow and deeper, each conversion in a process of its own: what the layers between cost
is the cost per layer; starting, loading and saving are told apart. Both sides see the
same windows of tokens, keep the same rank and rotary width, and write the same dtype. Processor
time is given beside the clock's: with one thread it does not depend on what else the machine does.

Twice: "equal work", few tokens, a fixed freqfold and no scoring of test text for the published
code; and with --defaults "as they come", each side with what it does when nobody says otherwise:
32,768 tokens for both, and for the published code the folds it tries and the perplexities it scores
on WikiText-2's test split. Scoring is measured on the shallow model and two windows of 2,048 tokens
and given apart, in proportion for all 141 of them (Llama 3's tokenizer); the model's small
vocabulary spares it the most expensive part. Between the two, "less text" sets ours with few tokens
against the published code with its default: ``calibration_tokens`` says what each then loses.
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

import torch
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.resident import Resident
from transformers import AutoTokenizer

from mlakit.benching.environment import environment
from mlakit.data import builtin_text

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "conversion_speed.json"
SHAPE, CONTEXT = "llama-3.2-1b", 256
EQUAL: dict[str, Any] = {"tokens": 2048, "layers": (2, 8)}
DEFAULTS: dict[str, Any] = {"tokens": 32768, "layers": (2, 16)}
TEST_WINDOWS, TEST_LENGTH, ALL_TEST_WINDOWS = 2, 2048, 141
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


def published(
    model: Path, output: Path, tokens: int, checkout: Path, scored: bool
) -> dict[str, float]:
    """One conversion of the published code's; seconds of its steps."""
    start = time.perf_counter()
    from benchmarks.published_transmla import convert

    from mlakit.checkpoint import open_checkpoint
    from mlakit.conversion.goal import Goal
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
    test = test_windows(model) if scored else None
    imported = time.perf_counter()
    fold = "auto" if scored else FREQFOLD
    found = convert(checkout, model, output, windows, RANK, ROPE, fold, test)
    work = found["partial_rope"] + found["low_rank"]
    return {"import": imported - start, **found, "work": work}


def test_windows(model: Path) -> torch.Tensor:
    """Two windows of the package's evaluation text, ``[2, 2048]``."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(builtin_text("evaluation"))["input_ids"]
    return torch.tensor(ids[: TEST_WINDOWS * TEST_LENGTH]).view(TEST_WINDOWS, TEST_LENGTH)


def child(arguments: argparse.Namespace) -> None:
    """One conversion in this process; the figures are the last line of stdout."""
    with Resident() as resident:
        if arguments.child == PUBLISHED:
            both = (arguments.transmla, arguments.scored)
            found = published(*arguments.paths, arguments.tokens, *both)
        else:
            found = ours(*arguments.paths, arguments.tokens, OURS[arguments.child])
    found["cpu"] = time.process_time()
    print(json.dumps({"seconds": found, **resident.record()}))


def measure(
    name: str, layers: int, tokens: int, checkout: Path | None, scored: bool
) -> dict[str, Any]:
    """Makes the model, converts it in a new process, forgets both."""
    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / "model"
        write_checkpoint(model, SHAPE, layers, CONTEXT)
        command = [sys.executable, "-m", "benchmarks.conversion_speed", "--child", name]
        command += ["--paths", str(model), f"{work}/out", "--tokens", str(tokens)]
        command += ["--transmla", str(checkout)] if checkout else []
        command += ["--scored"] if scored else []
        load = environment()["load_average"][0]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return {"layers": layers, "load": load, **json.loads(done.stdout.splitlines()[-1])}


def per_layer(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What each further layer costs in seconds and bytes, from the shallowest and the deepest.

    Scoring is told apart: of the shallow model, for all test windows in proportion.
    """
    first, last = rows[0], rows[-1]
    more = last["layers"] - first["layers"]
    scoring = [row["seconds"].get("scoring", 0.0) for row in (first, last)]
    cpu = [row["seconds"]["cpu"] for row in (first, last)]
    own = (cpu[1] - scoring[1] - cpu[0] + scoring[0]) / more
    return {
        "cpu_seconds": own,
        "cpu_seconds_scoring": scoring[0] / first["layers"] * ALL_TEST_WINDOWS / TEST_WINDOWS,
        "bytes": (last["own_peak"] - first["own_peak"]) / more,
        "peak_bytes": last["own_peak"],
        "peak_mib": last["own_peak"] / 2**20,
    }


def run(
    output: Path, work: dict[str, Any], names: list[str], checkout: Path | None, defaults: bool
) -> None:
    """Measures every method at both depths; the JSON is written after each."""
    whole = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    record: dict[str, Any] = {"environment": environment(), "shape": SHAPE, **work}
    record |= {"window": CONTEXT, "rank": RANK, "rope": ROPE, "methods": {}}
    whole["defaults" if defaults else "equal"] = record
    for name in names:
        if name == PUBLISHED and checkout is None:
            record["methods"][name] = "not given"
            continue
        rows = []
        for layers in work["layers"]:
            scored = defaults and layers == work["layers"][0]
            rows.append(measure(name, layers, work["tokens"], checkout, scored))
            print(f"{name}, {layers} layers: {json.dumps(rows[-1])}", flush=True)
        record["methods"][name] = {"rows": rows, "per_layer": per_layer(rows)}
        compare(record["methods"])
        whole["less_text"] = less_text(whole)
        output.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def compare(methods: dict[str, Any]) -> None:
    """Every method against the published code, where that was given."""
    base = methods.get(PUBLISHED)
    if not isinstance(base, dict):
        return
    base_layer = base["per_layer"]
    for found in methods.values():
        own = found["per_layer"]
        whole = [part["cpu_seconds"] + part["cpu_seconds_scoring"] for part in (base_layer, own)]
        own["times_faster"] = base_layer["cpu_seconds"] / own["cpu_seconds"]
        own["times_slower"] = 1 / own["times_faster"]
        own["times_faster_with_scoring"] = whole[0] / whole[1]
        own["times_smaller_peak"] = base_layer["peak_bytes"] / own["peak_bytes"]


def less_text(whole: dict[str, Any]) -> dict[str, float]:
    """Ours with few tokens against the published code with its default text, unscored."""
    pairs = (("defaults", PUBLISHED), ("equal", "ours, closed form"))
    found = [whole.get(part, {}).get("methods", {}).get(name) for part, name in pairs]
    if not all(isinstance(one, dict) for one in found):
        return {}
    theirs, ours = (one["per_layer"] for one in found)
    return {
        "times_faster": theirs["cpu_seconds"] / ours["cpu_seconds"],
        "times_smaller_peak": theirs["peak_bytes"] / ours["peak_bytes"],
    }


def main() -> None:
    """Measures all methods, or those named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transmla", type=Path, help="checkout of the published code")
    parser.add_argument("--defaults", action="store_true", help="each side as it comes")
    parser.add_argument("--layers", nargs=2, type=int, help="both depths")
    parser.add_argument("--tokens", type=int, help="of calibration text")
    names = [PUBLISHED, *OURS]
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--scored", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--paths", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
    else:
        known = DEFAULTS if arguments.defaults else EQUAL
        given = {"tokens": arguments.tokens, "layers": arguments.layers}
        work = {name: given[name] or value for name, value in known.items()}
        run(arguments.output, work, arguments.methods, arguments.transmla, arguments.defaults)


if __name__ == "__main__":
    main()
