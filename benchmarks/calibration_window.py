"""How far back calibration looks, and what a conversion loses at what distance.

    python -m benchmarks.calibration_window

Writes results/calibration_window.json: the packaged model at 28 % of its cache, by algebra alone
and refined, calibrated on as many tokens in shorter or longer windows, scored after short and long
prefixes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.conversion_quality import DEMO, ROOT

from mlakit.benching.environment import environment
from mlakit.checkpoint import write_json_atomic
from mlakit.conversion.apply import convert
from mlakit.evaluation import evaluate

RESULT = ROOT / "benchmarks" / "results" / "calibration_window.json"
WINDOWS = (512, 1024, 2048)
STEPS = {"algebra": 0, "refined": "auto"}
PREFIXES = (128, 512, 1792)


def main() -> None:
    """Converts once for every window, and scores after every prefix."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    record: dict[str, Any] = {"environment": environment(), "windows": {}}
    for window in WINDOWS:
        record["windows"][str(window)] = {}
        for name, steps in STEPS.items():
            found = measure(window, steps)
            record["windows"][str(window)][name] = found
            write_json_atomic(arguments.output, record)
            print(window, name, {k: round(v["value"], 3) for k, v in found["kl"].items()},
                  flush=True)  # fmt: skip


def measure(window: int, steps: int | str) -> dict[str, Any]:
    """Processor seconds of one conversion, and its KL divergence after every prefix."""
    with tempfile.TemporaryDirectory() as work:
        start = time.process_time()
        convert(DEMO, f"{work}/out", cache_ratio=0.28, refine_steps=steps, dtype="float32",
                calibration_window=window)  # fmt: skip
        found: dict[str, Any] = {"cpu_seconds": time.process_time() - start, "kl": {}}
        for prefix in PREFIXES:
            report = evaluate(DEMO, f"{work}/out", prefix_length=prefix, suffix_length=128,
                              windows=8, recall=False, max_new_tokens=0,
                              dtype="float32")  # fmt: skip
            assert report.quality.agreement is not None
            found["kl"][str(prefix)] = report.quality.agreement.kl_mean.model_dump()
    return found


if __name__ == "__main__":
    main()
