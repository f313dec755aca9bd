"""How every report looks: colours, strokes and numbers. Needs nothing but matplotlib.

Colours are Okabe and Ito's, told apart by colour-blind readers.
"""

from __future__ import annotations

import io
import math
from typing import Any

import matplotlib
from matplotlib.figure import Figure

INK, QUIET, GRID = "#1f2328", "#5b636d", "#d5d9de"
SOURCE, RESULT = "#0072b2", "#d55e00"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "svg.fonttype": "none",
    "svg.hashsalt": "mlakit",
}
WIDTH = 8.6


def as_png(figure: Figure) -> bytes:
    """The picture on white, 200 dots per inch."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()


def number(value: float) -> str:
    """Three significant digits, thousands separated, integers whole."""
    if not math.isfinite(value):
        return str(value)
    if value == round(value) and abs(value) < 1e15:
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:,.1f}"
    return f"{value:#.3g}"


def percent(value: float) -> str:
    """One decimal, or none for whole numbers."""
    return f"{value:.1f} %".replace(".0 %", " %")
