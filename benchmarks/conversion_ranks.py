"""One rank for all layers or one for each, the rotary width chosen; predicted and measured loss.

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

from benchmarks.conversion_quality import DEMO, SHARED, Case, log_probabilities, open_case

from mlakit.benching.environment import environment
from mlakit.checkpoint import open_checkpoint
from mlakit.conversion.apply import convert
from mlakit.errors import UsageError
from mlakit.evaluation.quality import kl_divergence
from mlakit.families import read_model

RESULT = Path(__file__).resolve().parent / "results" / "conversion_ranks.json"
RATIOS = (0.75, 0.5, 0.375, 0.25, 0.125)
CHOSEN = 0
"""In place of a halving of the head size: calibration chooses the rotary width."""
TOKENS = 12288


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


def run(
    case: Case, work: Path, steps: list[int], ratios: list[float], halvings: list[int]
) -> list[dict[str, Any]]:
    """Every size of one model."""
    layer = read_model(open_checkpoint(case.folder).config).layers[0]
    cells = []
    for ratio in ratios:
        for halving in halvings:
            rope = None if halving == CHOSEN else layer.rotary_dim // halving
            for refine_steps in steps:
                for ranks in ("even", "measured") if rope else ("measured",):
                    options = {"qk_rope_head_dim": rope, "refine_steps": refine_steps}
                    found = measure(case, work, cache_ratio=ratio, ranks=ranks, **options)
                    if found is None:
                        continue
                    cells.append({"ratio": ratio, "halving": halving, "ranks_by": ranks,
                                  "refine_steps": refine_steps, **found})  # fmt: skip
                    print(case.folder.name, json.dumps(cells[-1]), flush=True)
    return cells


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two records are of the same size, steps and way to divide ranks."""
    return key(first) == key(second) and first["ranks_by"] == second["ranks_by"]


def summary(models: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Loss with measured ranks over that with even ones, with a chosen rotary width over that
    with the head size; measured over predicted loss."""
    shares: dict[str, list[float]] = {}
    chosen: dict[str, list[float]] = {}
    scales: dict[str, dict[str, list[float]]] = {}
    for name, cells in models.items():
        even = {key(cell): cell["test_kl"] for cell in cells if cell["ranks_by"] == "even"}
        own = {key(c): c["test_kl"] for c in cells if c["ranks_by"] == "measured"}
        for cell in cells:
            kind = "refined" if cell["refine_steps"] else "closed"
            scale = cell["held_out_kl"] / cell["predicted_kl"]
            scales.setdefault(name, {}).setdefault(kind, []).append(scale)
            if cell["ranks_by"] == "measured" and key(cell) in even:
                size = f"{kind}_{round(1000 * cell['ratio'])}"
                shares.setdefault(size, []).append(cell["test_kl"] / even[key(cell)])
            same_size = (cell["ratio"], 1, cell["refine_steps"])
            if cell["halving"] == CHOSEN and same_size in own:
                size = f"{kind}_{round(1000 * cell['ratio'])}"
                chosen.setdefault(size, []).append(cell["test_kl"] / own[same_size])
    return {
        "chosen_over_own_width": {size: spread(found) for size, found in chosen.items()},
        "measured_over_even": {size: spread(found) for size, found in shares.items()},
        "measured_over_predicted": {
            name: {kind: spread(found) for kind, found in kinds.items()}
            for name, kinds in scales.items()
        },
    }


def key(cell: dict[str, Any]) -> tuple[float, int, int]:
    """What two ways to divide ranks have in common."""
    return cell["ratio"], cell["halving"], cell["refine_steps"]


def spread(found: list[float]) -> dict[str, float]:
    """Median and extremes."""
    return {
        "median": statistics.median(found),
        "least": min(found),
        "most": max(found),
        "count": len(found),
    }


def main() -> None:
    """Measures the models given, or all at hand, and writes the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path, help="folders; default: all at hand")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--steps", nargs="+", type=int, default=[0])
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    parser.add_argument("--halvings", nargs="+", type=int, choices=(0, 1, 2), default=[0, 1, 2])
    arguments = parser.parse_args()
    at_hand = sorted(path.parent for path in (SHARED / "models").glob("*/config.json"))
    record: dict[str, Any] = {"models": {}}
    if arguments.output.exists():
        record = json.loads(arguments.output.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as work:
        for folder in arguments.models or [*at_hand, DEMO]:
            case = open_case(folder.resolve(), Path(work))
            sizes = (arguments.steps, arguments.ratios, arguments.halvings)
            found = run(case, Path(work), *sizes)
            kept = [
                cell
                for cell in record["models"].get(case.folder.name, [])
                if not any(same(cell, new) for new in found)
            ]
            record["models"][case.folder.name] = kept + found
            record["environment"] = environment()
            record["summary"] = summary(record["models"])
            arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
