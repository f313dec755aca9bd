"""One rank for all layers or one for each; predicted beside measured loss.

    python -m benchmarks.conversion_ranks [MODEL ...]

Writes results/conversion_ranks.json. Models and texts are those of benchmarks.conversion_quality;
the prediction is the algebra's own, the measurement on held-out calibration text is the one that
``convert`` prints, and the test text is only ever scored.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.conversion_quality import DEMO, SHARED, TOKENS, Case, log_probabilities, open_case

from mlakit.benching.environment import environment
from mlakit.checkpoint import open_checkpoint
from mlakit.conversion.apply import convert
from mlakit.errors import UsageError
from mlakit.evaluation.quality import kl_divergence
from mlakit.families import read_model

RESULT = Path(__file__).resolve().parent / "results" / "conversion_ranks.json"
RATIOS = (0.5, 0.375, 0.25, 0.125)


def measure(case: Case, work: Path, **goal: Any) -> dict[str, Any] | None:
    """Converts and scores; None where the size leaves no rank."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        try:
            plan = convert(
                case.folder, folder, calibration=case.calibration, calibration_tokens=TOKENS,
                dtype="float32", **goal,
            )  # fmt: skip
        except UsageError:
            return None
        scores = log_probabilities(Path(folder), case.windows)
    kl = [kl_divergence(a, b).mean() for a, b in zip(case.log_probabilities, scores)]
    return {
        "rope": plan.target.qk_rope_head_dim,
        "ranks": plan.ranks,
        "cache_ratio": plan.cache_ratio,
        "predicted_kl": plan.measured["predicted_kl"],
        "held_out_kl": plan.measured["held_out_kl"],
        "test_kl": float(sum(kl) / len(kl)),
    }


def run(case: Case, work: Path, steps: list[int]) -> list[dict[str, Any]]:
    """Every size of one model."""
    layer = read_model(open_checkpoint(case.folder).config).layers[0]
    cells = []
    for ratio in RATIOS:
        for halving in (1, 2):
            rope = layer.rotary_dim // halving
            for refine_steps in steps:
                for ranks in ("even", "measured"):
                    options = {"qk_rope_head_dim": rope, "refine_steps": refine_steps}
                    found = measure(case, work, cache_ratio=ratio, ranks=ranks, **options)
                    if found is None:
                        continue
                    cells.append({"ratio": ratio, "halving": halving, "ranks_by": ranks,
                                  "refine_steps": refine_steps, **found})  # fmt: skip
                    print(case.folder.name, json.dumps(cells[-1]), flush=True)
    return cells


def summary(models: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Measured over even, and measured over predicted: medians and extremes by size."""
    by_size: dict[str, dict[str, list[float]]] = {}
    for cells in models.values():
        pairs: dict[tuple[Any, ...], dict[str, float]] = {}
        for cell in cells:
            kind = "refined" if cell["refine_steps"] else "closed"
            name = f"{kind}_{round(1000 * cell['ratio'])}"
            key = (name, cell["halving"])
            pairs.setdefault(key, {})[cell["ranks_by"]] = cell["test_kl"]
            scale = cell["held_out_kl"] / cell["predicted_kl"]
            by_size.setdefault(f"scale_{kind}", {}).setdefault("share", []).append(scale)
        for (name, _), pair in pairs.items():
            if len(pair) == 2:
                share = pair["measured"] / pair["even"]
                by_size.setdefault(name, {}).setdefault("share", []).append(share)
    return {
        name: {
            "median": statistics.median(found["share"]),
            "least": min(found["share"]),
            "most": max(found["share"]),
            "count": len(found["share"]),
        }
        for name, found in by_size.items()
    }


def main() -> None:
    """Measures the models given, or all at hand, and writes the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path, help="folders; default: all at hand")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--steps", nargs="+", type=int, default=[0])
    arguments = parser.parse_args()
    at_hand = sorted(path.parent for path in (SHARED / "models").glob("*/config.json"))
    record: dict[str, Any] = {"models": {}}
    if arguments.output.exists():
        record = json.loads(arguments.output.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as work:
        for folder in arguments.models or [*at_hand, DEMO]:
            case = open_case(folder.resolve(), Path(work))
            kept = [
                cell
                for cell in record["models"].get(case.folder.name, [])
                if cell["refine_steps"] not in arguments.steps
            ]
            record["models"][case.folder.name] = kept + run(case, Path(work), arguments.steps)
            record["environment"] = environment()
            record["summary"] = summary(record["models"])
            arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
