"""Keeps the numbers of a finished ``mlakit compare`` for docs/compare.md.

mlakit compare MODEL -o DIR ...
python -m benchmarks.compare_kept DIR NAME

Writes results/compare.json, docs/compare_NAME.png and the table below ``<!-- table NAME -->``;
numbers in its sentences follow with ``make numbers``, their words are for a person to read again.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.page_numbers import fill

from mlakit.reporting.answers import in_words, mean_recall
from mlakit.reporting.comparison import Comparison, Point
from mlakit.reporting.comparison_page import JSON_NAME
from mlakit.reporting.pareto import pareto
from mlakit.reporting.style import as_png

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "compare.json"
PAGE = ROOT / "docs" / "compare.md"


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
        "pace": point.pace and point.pace.model_dump(),
        "setting": point.setting,
    }


def summary(found: Comparison) -> dict[str, Any]:
    """What is kept of a comparison."""
    points: dict[str, dict[str, Any]] = {}
    for point in found.points:
        points.setdefault(point.method, {})[key(point.setting)] = row(point)
    by_key = {point.key: point for point in found.points}
    return {
        "points": points,
        "titles": {entry.name: entry.title for entry in found.methods},
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


COLUMNS = {
    "% of own": ("percent_of_own", ".0f", " %"),
    "KL, nats": ("kl", ".2g", ""),
    "top-1": ("top1", ".0%", ""),
    "perplexity": ("perplexity", ".2f", ""),
    "recall": ("recall", ".0%", ""),
    "tokens/s": ("pace.tokens_per_second", ",.0f", ""),
    "of own": ("pace.of_original", ".2f", "x"),
    "first token": ("pace.first_token_of_original", ".2f", "x"),
}
"""The page's columns: key, format and unit of their numbers."""


def table(name: str, kept: dict[str, Any]) -> Iterator[str]:
    """Lines of a page's table with every point, its numbers marked; unused columns are left out."""
    points = [point for settings in kept["points"].values() for point in settings.values()]
    used = {
        head: column
        for head, column in COLUMNS.items()
        if any(value(point, column[0]) is not None for point in points)
    }
    yield f"| method | setting | {' | '.join(used)} |"
    yield "|---" * (2 + len(used)) + "|"
    for method, settings in kept["points"].items():
        for label, point in settings.items():
            cells = [
                f"<!--n compare.json#{name}.points.{method}.{label}.{path}|{how}--><!--/n-->{unit}"
                if value(point, path) is not None
                else "-"
                for path, how, unit in used.values()
            ]
            yield f"| {kept['titles'][method]} | {point['setting']} | {' | '.join(cells)} |"


def value(point: dict[str, Any], path: str) -> Any:
    """A number of a point at a dotted path; None where a part of it is."""
    found: Any = point
    for part in path.split("."):
        found = None if found is None else found[part]
    return found


def with_table(page: str, name: str, lines: list[str]) -> str:
    """The page with the table below its mark replaced."""
    start = page.index(f"<!-- table {name} -->\n") + len(f"<!-- table {name} -->\n")
    end = page.index("\n\n", start)
    return page[:start] + "\n".join(lines) + page[end:]


def main() -> None:
    """Adds one comparison to the result, and writes its picture and its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="what mlakit compare wrote")
    parser.add_argument("name", help="of the model, in the result and the picture")
    given = parser.parse_args()
    found = Comparison.model_validate_json((given.folder / JSON_NAME).read_bytes())
    kept = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    kept[given.name] = summary(found)
    RESULT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    (ROOT / "docs" / f"compare_{given.name}.png").write_bytes(as_png(pareto(found)))
    page = PAGE.read_text(encoding="utf-8")
    lines = list(table(given.name, kept[given.name]))
    PAGE.write_text(fill(with_table(page, given.name, lines)), encoding="utf-8")


if __name__ == "__main__":
    main()
