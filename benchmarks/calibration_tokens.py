"""How much calibration text the algebra needs: ours and the published method's.

    python -m benchmarks.calibration_tokens [MODEL ...]

Writes results/calibration_tokens.json. Each model is converted to half its cache, the head size
staying rotated, from more and more tokens in windows of one length, by both methods and without
refinement; the test text is that of ``conversion_quality``. Every loss is given as a share of what
the published method loses with its own default of 32,768 tokens. What a layer must learn from the
text is a covariance of all its keys and values, so tokens per cached number say more than tokens
when sizes of models are compared.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.conversion_quality import (
    DEMO,
    METHODS,
    SEEDS,
    SHARED,
    Cell,
    goal_of,
    measure,
    open_case,
    read,
)

from mlakit.benching.environment import environment
from mlakit.checkpoint import open_checkpoint, write_json_atomic
from mlakit.families import read_model

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "calibration_tokens.json"
COMPARED = ("published", "ours, closed form")
TOKENS, WINDOW, RATIO = (512, 1024, 2048, 4096, 8192, 16384, 32768), 128, 0.5


def run(folder: Path, record: dict[str, Any], output: Path, seeds: list[int]) -> None:
    """One model: what is not in the record yet."""
    layer = read_model(open_checkpoint(folder).config).layers[0]
    model = record["models"].setdefault(folder.name, {"rows": []})
    model["cached_numbers"] = layer.cache_width
    goal = goal_of(folder, RATIO, 1)
    assert goal is not None
    known = {(row["tokens"], row["method"], row["seed"]) for row in model["rows"]}
    with tempfile.TemporaryDirectory() as work:
        case = open_case(folder, Path(work))
        for seed in seeds:
            for tokens in TOKENS:
                for method in COMPARED:
                    if (tokens, method, seed) in known:
                        continue
                    cell = Cell("cells", RATIO, 1, method, seed)
                    sizes = {"calibration_tokens": tokens, "calibration_window": WINDOW}
                    found = measure(case, cell, goal, Path(work), sizes)
                    facts = {"tokens": tokens, "method": method, "seed": seed}
                    model["rows"].append(facts | found)
                    record["environment"], record["summary"] = environment(), summary(record)
                    write_json_atomic(output, record)
                    loss = f"excess {found['excess']['value']:.4f}, KL {found['kl']['value']:.4f}"
                    print(f"{folder.name}, {tokens:,} tokens, {method}, seed {seed}: {loss}")


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """By tokens and method the excess log loss over the published method's with most tokens.

    Medians over seeds; of models the median, least and most, and each model's own.
    """
    found: dict[str, Any] = {"models": {}, "tokens": {}}
    for name, model in record["models"].items():
        own = {
            (tokens, method): statistics.median(values)
            for tokens in TOKENS
            for method in COMPARED
            if (values := _excess(model["rows"], tokens, method))
        }
        if base := own.get((TOKENS[-1], COMPARED[0])):
            for (tokens, method), value in own.items():
                row = found["models"].setdefault(name, {}).setdefault(str(tokens), {})
                row["per_cached_number"] = tokens / model["cached_numbers"]
                row[method] = value / base
    for tokens in map(str, TOKENS):
        for method in COMPARED:
            rows = [row[tokens] for row in found["models"].values() if tokens in row]
            if values := [row[method] for row in rows if method in row]:
                spread = {"median": statistics.median(values), "most": max(values)}
                found["tokens"].setdefault(tokens, {})[method] = spread
    return found


def _excess(rows: list[dict[str, Any]], tokens: int, method: str) -> list[float]:
    return [
        row["excess"]["value"]
        for row in rows
        if row["tokens"] == tokens and row["method"] == method
    ]


def main() -> None:
    """Measures the models given, or all at hand; what was measured before stays."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path, help="folders; default: all at hand")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    assert set(COMPARED) <= set(METHODS)
    at_hand = sorted(path.parent for path in (SHARED / "models").glob("*/config.json"))
    for folder in arguments.models or [*at_hand, DEMO]:
        run(folder.resolve(), read(arguments.output), arguments.output, arguments.seeds)


if __name__ == "__main__":
    main()
