"""Whether the queries' up-projection should train with the key/value path of a compressed model.

    python -m benchmarks.heal_queries

Writes results/heal_queries.json. Default conversions keep the source's ``q_proj`` and hold the
keys' rotary up-projection on the queries' side, in ``q_up_proj``. Each conversion is healed with
and without it, on the same windows in the same order, three seeds; measured on text that no run
trains on. The demo model's conversion is by algebra alone. Runs that the JSON has are not
repeated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.conversion_quality import DEMO, ROOT, SHARED

from mlakit.benching.environment import environment
from mlakit.checkpoint import write_json_atomic
from mlakit.conversion.apply import convert
from mlakit.healing import trainable
from mlakit.healing.recipe import Recipe
from mlakit.healing.run import heal

RESULT = ROOT / "benchmarks" / "results" / "heal_queries.json"
STORIES = SHARED / "data" / "tinystories"


@dataclass(frozen=True)
class Source:
    """A model, its texts to train and to measure on, its conversions, and the length of a run."""

    model: Path
    text: str
    held_out: str
    ratios: tuple[float, ...]
    convert: dict[str, Any]
    size: dict[str, int]


SOURCES = {
    "stories260k": Source(
        SHARED / "models" / "stories260k",
        str(STORIES / "train.txt"),
        str(STORIES / "valid.txt"),
        (0.5, 0.25),
        {},
        {"steps": 60, "batch": 8, "sequence_length": 256},
    ),
    "demo": Source(
        DEMO,
        "builtin",
        "builtin:evaluation",
        (0.28,),
        {"refine_steps": 0},
        {"steps": 16, "batch": 4, "sequence_length": 512},
    ),
}
SEEDS = (0, 1, 2)
ARMS = {
    "without q_up_proj": tuple(name for name in trainable.LATENT_KV if name != "q_up_proj"),
    "with q_up_proj": trainable.LATENT_KV,
}


def measure(name: str, ratio: float, student: Path, seed: int, arm: str) -> dict[str, Any]:
    """One run."""
    source = SOURCES[name]
    recipe = Recipe(data=(source.text,), seed=seed, checks=3, patience=1000, **source.size)
    with patch.object(trainable, "key_value_parts", lambda module: ARMS[arm]):
        report = heal(student, teacher=source.model, recipe=recipe, held_out=source.held_out)
    healed = report.healed
    return {
        "model": name, "ratio": ratio, "arm": arm, "seed": seed, "trained": healed.trained,
        "tokens": healed.tokens, "original_nll": healed.before["original_nll"],
        "before": {key: healed.before[key] for key in ("nll", "kl")},
        "after": {key: healed.checks[-1][key] for key in ("nll", "kl")},
    }  # fmt: skip


def summary(runs: dict[str, Any]) -> dict[str, Any]:
    """Means over seeds, and the lowest and highest."""
    found: dict[str, Any] = {}
    for run in runs.values():
        key = f"{run['model']} {1000 * run['ratio']:g} {run['arm']}"
        cell = found.setdefault(key, {"before": run["before"], "trained": run["trained"], "kl": []})
        cell["kl"].append(run["after"]["kl"])
    for cell in found.values():
        kls = cell.pop("kl")
        cell |= {"kl": sum(kls) / len(kls), "lowest": min(kls), "highest": max(kls)}
    return found


def main() -> None:
    """Measures what is not in the JSON yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    path = arguments.output
    record = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    with tempfile.TemporaryDirectory() as work:
        for name, source in SOURCES.items():
            for ratio in source.ratios:
                student = Path(work) / f"{name}-{ratio}"
                for seed in SEEDS:
                    for arm in ARMS:
                        key = f"{name}, {ratio:g}, {arm}, seed {seed}"
                        if key in record["runs"]:
                            continue
                        if not student.exists():
                            convert(source.model, student, cache_ratio=ratio,
                                    calibration=source.text, calibration_tokens=8192,
                                    dtype="float32", **source.convert)  # fmt: skip
                        record["runs"][key] = measure(name, ratio, student, seed, arm)
                        record |= {"environment": environment(), "summary": summary(record["runs"])}
                        write_json_atomic(path, record)
                        print(key, record["runs"][key]["after"], flush=True)


if __name__ == "__main__":
    main()
