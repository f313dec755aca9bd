"""Numbers in Markdown come from benchmarks/results/*.json: write them, or check that they agree.

A number is marked in a page as ``<!--n FILE.json#KEY.KEY|FORMAT-->text<!--/n-->``; FILE is below
benchmarks/results, KEY walks the JSON (list positions are integers), FORMAT is a Python format
specification (``.1f``, ``.0%``, ``,``); null reads n/a. With --check nothing is written and a
difference fails.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARK = re.compile(r"<!--n (?P<file>[^#]+)#(?P<keys>[^|]+)\|(?P<format>.*?)-->.*?<!--/n-->")


def look_up(file: str, keys: str) -> Any:
    """Value at a dotted path of one result file."""
    value: Any = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    for key in keys.split("."):
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def fill(page: str) -> str:
    """The page with every marked number taken from its result file."""

    def replace(match: re.Match[str]) -> str:
        value = look_up(match["file"], match["keys"])
        text = "n/a" if value is None else format(value, match["format"])
        head = match[0][: match[0].index("-->") + 3]
        return f"{head}{text}<!--/n-->"

    return MARK.sub(replace, page)


def main() -> int:
    """Rewrite (--write) or compare (--check) README.md and docs/*.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true")
    mode.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        page = path.read_text(encoding="utf-8")
        filled = fill(page)
        if filled != page:
            stale.append(path.name)
            if arguments.write:
                path.write_text(filled, encoding="utf-8")
    if arguments.check and stale:
        print(f"numbers differ from benchmarks/results in: {', '.join(stale)}; run make numbers")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
