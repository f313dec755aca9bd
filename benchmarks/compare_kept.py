"""Keeps the numbers of a finished ``mlakit compare`` for docs/compare.md.

mlakit compare MODEL -o DIR ...
python -m benchmarks.compare_kept DIR NAME    # results/compare.json and docs/compare_NAME.png
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from mlakit.reporting.answers import in_words, mean_recall
from mlakit.reporting.comparison import Comparison, Point
from mlakit.reporting.comparison_page import JSON_NAME
from mlakit.reporting.pareto import pareto
from mlakit.reporting.style import as_png

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "compare.json"


def key(label: str) -> str:
    """A setting's label as a key that marks in pages can name: ``12.5 %`` is ``12_5``."""
    return re.sub(r"[^0-9A-Za-z]+", "_", label).strip("_")


def row(point: Point) -> dict[str, Any]:
    """The numbers that the page shows of a point."""
    return {
        "percent_of_own": point.percent_of_own,
        "percent_of_mha": point.percent_of_mha,
        "read_percent": point.read_percent,
        "weight_percent": point.weight_percent,
        "bytes_per_token": point.bytes_per_token,
        "kl": point.kl_mean.value,
        "top1": point.top1.value,
        "perplexity": point.perplexity.value,
        "recall": mean_recall(point),
    }


def summary(found: Comparison) -> dict[str, Any]:
    """What is kept of a comparison."""
    points: dict[str, dict[str, Any]] = {}
    for point in found.points:
        points.setdefault(point.method, {})[key(point.setting)] = row(point)
    by_key = {point.key: point for point in found.points}
    return {
        "points": points,
        "answers": [
            {
                "question": answer.question,
                "best": found.title(by_key[answer.best]),
                "words": in_words(found, by_key[answer.best]),
                "ties": ", ".join(found.title(by_key[tie]) for tie in answer.ties) or "none",
            }
            for answer in found.answers
        ],
        "sized": {key(each.title): each.model_dump() for each in found.sized},
        "windows": found.windows,
        "prefix_length": found.prefix_length,
        "suffix_length": found.suffix_length,
        "seed": found.seed,
        "versions": found.environment.versions,
    }


def main() -> None:
    """Adds one comparison to the result, and writes its picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="what mlakit compare wrote")
    parser.add_argument("name", help="of the model, in the result and the picture")
    given = parser.parse_args()
    found = Comparison.model_validate_json((given.folder / JSON_NAME).read_bytes())
    kept = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    kept[given.name] = summary(found)
    RESULT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    (ROOT / "docs" / f"compare_{given.name}.png").write_bytes(as_png(pareto(found)))


if __name__ == "__main__":
    main()
