"""Runs the notebook examples/tour.ipynb without Jupyter, and keeps what it shows in it.

    python examples/run_tour.py           # runs it, stores its outputs and the pictures of docs/
    python examples/run_tour.py --check   # runs it, fails where a text output differs

A picture is the last expression of a cell, as in Jupyter. Numbers below 1e-9 are rounding, which
differs from machine to machine: they are compared as such.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mlakit.reporting.style import as_png

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "tour.ipynb"
SHOWN_WIDTH = 860
ROUNDING = re.compile(r"\d(\.\d+)?e-(09|[1-9]\d+)")


def run_cell(source: str, names: dict[str, Any]) -> tuple[str, Any]:
    """What a cell prints, and the value of its last expression; lines for Jupyter are left out."""
    own = [line for line in source.splitlines() if not line.startswith("%")]
    tree = ast.parse("\n".join(own))
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), names)
        value = eval(compile(ast.Expression(last.value), "cell", "eval"), names) if last else None
    return printed.getvalue(), value


def outputs_of(text: str, value: Any) -> list[dict[str, Any]]:
    """A cell's outputs in the notebook's format."""
    found: list[dict[str, Any]] = []
    if text:
        lines = text.splitlines(keepends=True)
        found.append({"output_type": "stream", "name": "stdout", "text": lines})
    if isinstance(value, Figure):
        picture = base64.b64encode(as_png(value)).decode()
        found.append({
            "output_type": "display_data",
            "data": {"image/png": picture, "text/plain": ["a picture"]},
            "metadata": {"image/png": {"width": SHOWN_WIDTH}},
        })  # fmt: skip
    return found


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """Its cells of code, in order."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def text_of(outputs: list[dict[str, Any]]) -> str:
    """What was printed, and that a picture was shown, with rounding made equal."""
    parts = ["".join(out.get("text", ["[picture]\n"])) for out in outputs]
    return ROUNDING.sub("rounding", "".join(parts))


def run(notebook: dict[str, Any]) -> list[tuple[dict[str, Any], list[dict[str, Any]], Any]]:
    """Every cell of code with its outputs now and its last value."""
    names: dict[str, Any] = {}
    found = []
    for cell in code_cells(notebook):
        text, value = run_cell("".join(cell["source"]), names)
        found.append((cell, outputs_of(text, value), value))
    return found


def main() -> int:
    """Stores outputs, or compares them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    arguments = parser.parse_args()
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    stale = 0
    for count, (cell, outputs, _) in enumerate(run(notebook), 1):
        if arguments.check:
            if text_of(cell["outputs"]) != text_of(outputs):
                stale += 1
                print(f"cell {count} prints something else now:\n{text_of(outputs)}")
            continue
        cell["outputs"], cell["execution_count"] = outputs, count
        if "picture" in cell["metadata"]:
            picture = base64.b64decode(outputs[-1]["data"]["image/png"])
            (ROOT / cell["metadata"]["picture"]).write_bytes(picture)
    if not arguments.check:
        text = json.dumps(notebook, indent=1, ensure_ascii=False)
        NOTEBOOK.write_text(text + "\n", encoding="utf-8")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
