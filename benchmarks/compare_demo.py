"""Every way to shrink the demo model's cache, for docs/compare.md.

    python -m benchmarks.compare_demo --work DIR   # results/compare.json and docs/compare.png

The same as ``mlakit compare`` on the model that ships with the package, with its defaults. A run
that was cut off goes on when it is started again with the same folder.
"""

from __future__ import annotations

import argparse
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from mlakit.cli.progress import show_progress
from mlakit.comparison import Comparison, compare
from mlakit.reporting.answers import in_words, mean_recall
from mlakit.reporting.comparison import Point
from mlakit.reporting.comparison_page import PICTURE_NAME, write_comparison

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "compare.json"
PICTURE = ROOT / "docs" / "compare.png"


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
        "missing": [missing.model_dump() for missing in found.missing],
        "sized": {key(each.title): each.model_dump() for each in found.sized},
        "windows": found.windows,
        "prefix_length": found.prefix_length,
        "suffix_length": found.suffix_length,
        "versions": found.environment.versions,
    }


def main() -> None:
    """Runs, or goes on, and writes the result and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for finished points")
    parser.add_argument("--methods", help="names between commas; default: as mlakit compare")
    given = parser.parse_args()
    names = given.methods.split(",") if given.methods else None
    with (
        resources.as_file(resources.files("mlakit") / "assets" / "demo_model") as model,
        show_progress() as progress,
    ):
        found = compare(model, given.work, methods=names, progress=progress)
    assert isinstance(found, Comparison)
    write_comparison(found, given.work)
    RESULT.write_text(json.dumps(summary(found), indent=1) + "\n", encoding="utf-8")
    PICTURE.write_bytes((given.work / PICTURE_NAME).read_bytes())


if __name__ == "__main__":
    main()
