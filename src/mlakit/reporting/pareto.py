"""The picture of a comparison: cache bytes on a logarithmic axis, what they buy above.

One colour per family, one marker per method, hollow where gradients were taken.
"""

from __future__ import annotations

from collections.abc import Callable

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, StrMethodFormatter
from matplotlib.transforms import Bbox

from mlakit.reporting.answers import mean_recall
from mlakit.reporting.comparison import FAMILY_WORDS, Comparison, Family, Point
from mlakit.reporting.style import GRID, INK, QUIET, RESULT, SOURCE, STYLE, number, percent

COLOURS: dict[Family, str] = {
    "original": INK,
    "latent": RESULT,
    "bits": SOURCE,
    "tokens": "#009e73",
    "heads": "#cc79a7",
    "dimensions": "#b8860b",
    "layers": "#56b4e9",
    "states": "#7f6fb0",
    "reads": QUIET,
    "weights": QUIET,
}
MARKERS = "osD^vPX<>h*"
FLOOR = 1e-5
"""KL below this is drawn here: float rounding, not the method."""
LEGEND_LINE = 0.162
"""Inches that a line of the legend takes."""
PLACES = (
    ((-7, 3), "right", "bottom"),
    ((7, -3), "left", "top"),
    ((-7, -3), "right", "top"),
    ((7, 3), "left", "bottom"),
)
"""Where a name may stand: points from its own, and which of its corners is there; best first."""


def pareto_front(points: list[Point]) -> list[Point]:
    """Points that no other beats in both bytes and KL, by ascending bytes."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bytes_per_token, p.kl_mean.value)):
        if not front or point.kl_mean.value < front[-1].kl_mean.value:
            front.append(point)
    return front


def pareto(found: Comparison) -> Figure:
    """KL and, where there are questions, recall against cache bytes per token."""
    with matplotlib.rc_context(STYLE):
        asked = mean_recall(found.original) is not None
        legend = _legend(found)
        height = max(6.9 if asked else 4.9, LEGEND_LINE * (len(legend) + 2))
        figure = Figure(figsize=(8.6, height), layout="constrained")
        panels = figure.subplots(
            2 if asked else 1, 1, sharex=True, squeeze=False,
            gridspec_kw={"height_ratios": [2.1, 1] if asked else [1]},
        )[:, 0]  # fmt: skip
        _lines(panels[0], found, lambda p: max(p.kl_mean.value, FLOOR), intervals=True)
        names = _front(panels[0], found)
        panels[0].set_yscale("log")
        panels[0].invert_yaxis()
        panels[0].set_ylabel("KL to the original, nats per token (better is up)")
        if asked:
            _lines(panels[1], found, lambda p: 100 * (mean_recall(p) or 0.0))
            panels[1].set_ylim(-4, 104)
            panels[1].set_ylabel("questions answered, %")
        _bytes_axis(panels[-1], panels[0], found)
        figure.legend(
            handles=legend, loc="outside right upper", fontsize=8, labelspacing=0.32,
            handlelength=1.2,
        )  # fmt: skip
        figure.draw_without_rendering()
        _make_room(panels[0], names)
    return figure


def _style(found: Comparison, method: str) -> tuple[str, str]:
    """Colour and marker of a method."""
    entry = next(m for m in found.methods if m.name == method)
    family = [m.name for m in found.methods if m.family == entry.family]
    return COLOURS[entry.family], MARKERS[family.index(method) % len(MARKERS)]


def _drawn(found: Comparison) -> list[str]:
    """Methods with a point that changes the cache."""
    return [
        m.name
        for m in found.methods
        if m.family not in ("original", "weights", "reads")
        and any(p.method == m.name for p in found.points)
    ]


def _lines(
    axes: Axes, found: Comparison, height: Callable[[Point], float], intervals: bool = False
) -> None:
    """Every method's points, joined in the order of their bytes."""
    for name in _drawn(found):
        colour, marker = _style(found, name)
        points = sorted(
            (p for p in found.points if p.method == name), key=lambda p: p.bytes_per_token
        )
        x, y = [p.bytes_per_token for p in points], [height(p) for p in points]
        axes.plot(x, y, "-", color=colour, linewidth=1.0, alpha=0.55, zorder=2)
        for point, a, b in zip(points, x, y, strict=True):
            low, high = point.kl_mean.low, point.kl_mean.high
            if intervals and low is not None and high is not None:
                ends = [max(low, FLOOR), max(high, FLOOR)]
                axes.plot([a, a], ends, color=colour, linewidth=0.8, alpha=0.5, zorder=2)
            axes.plot(
                [a], [b], marker, color=colour, markersize=6, zorder=3,
                markerfacecolor="white" if point.trained else colour, markeredgewidth=1.3,
            )  # fmt: skip
    axes.axvline(found.original.bytes_per_token, color=INK, linewidth=0.9, linestyle=":", zorder=1)


def _front(axes: Axes, found: Comparison) -> list[Annotation]:
    """The line of the best, and the names of the points on it."""
    names = _drawn(found)
    front = pareto_front([p for p in found.points if p.method in names])
    axes.plot(
        [p.bytes_per_token for p in front],
        [max(p.kl_mean.value, FLOOR) for p in front],
        color=GRID, linewidth=6, solid_capstyle="round", zorder=0,
    )  # fmt: skip
    return [
        axes.annotate(
            found.title(point),
            (point.bytes_per_token, max(point.kl_mean.value, FLOOR)),
            PLACES[0][0],
            textcoords="offset points",
            fontsize=7.5,
            in_layout=False,  # or a long one would take the axes' room
            color=_style(found, point.method)[0],
        )
        for point in front
    ]


def _make_room(axes: Axes, names: list[Annotation]) -> None:
    """Puts each name beside its point; one without room goes, as the legend has it too."""
    inside = axes.get_window_extent()
    taken: list[Bbox] = []
    markers = [
        axes.transData.transform(np.asarray(line.get_xydata())[0])
        for line in axes.lines
        if line.get_marker() not in ("None", "", None)
    ]
    for name in names:
        free = {}
        for place in PLACES:
            name.xyann, across, up = place
            name.set(ha=across, va=up)
            box = name.get_window_extent()
            fits = inside.contains(*box.min) and inside.contains(*box.max)
            if fits and not any(box.overlaps(other) for other in taken):
                free[place] = sum(box.contains(*marker) for marker in markers)
        if not free:
            name.remove()
            continue
        name.xyann, across, up = min(free, key=free.__getitem__)
        name.set(ha=across, va=up)
        taken.append(name.get_window_extent())


def _bytes_axis(bottom: Axes, top: Axes, found: Comparison) -> None:
    """Bytes below, shares of the source's own cache above."""
    own = found.original.bytes_per_token
    points = [p for p in found.points if p.method in _drawn(found)]
    least = min([p.bytes_per_token for p in points], default=own)
    shares = [100 / 2**power for power in range(12) if own / 2**power > least / 2.2]
    ticks = [own * share / 100 for share in shares]
    bottom.set_xscale("log")
    bottom.set_xlim(least / 1.9, own * 1.35)
    bottom.xaxis.set_major_locator(FixedLocator(ticks))
    bottom.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    bottom.xaxis.set_minor_locator(NullLocator())
    bottom.set_xlabel("cache, bytes per token (all layers, every overhead counted)")
    above = top.secondary_xaxis("top")
    above.xaxis.set_major_locator(FixedLocator(ticks))
    above.set_xticks(ticks, [percent(float(number(share))) for share in shares])
    above.xaxis.set_minor_locator(NullLocator())
    above.xaxis.set_minor_formatter(NullFormatter())
    above.set_xlabel(f"of {found.source.name}'s own cache")
    above.spines["top"].set_visible(False)
    above.tick_params(length=0)


def _legend(found: Comparison) -> list[Line2D]:
    """Methods under the names of their families."""
    handles: list[Line2D] = []
    for family, words in FAMILY_WORDS.items():
        members = [m for m in found.methods if m.family == family and m.name in _drawn(found)]
        if members:
            handles.append(Line2D([], [], linestyle="", label=f"$\\bf{{{_bold(words)}}}$"))
        for entry in members:
            colour, marker = _style(found, entry.name)
            trained = any(p.trained for p in found.points if p.method == entry.name)
            handles.append(
                Line2D(
                    [], [], linestyle="", marker=marker, color=colour, label=entry.title,
                    markersize=6, markerfacecolor="white" if trained else colour,
                    markeredgewidth=1.3,
                )
            )  # fmt: skip
    handles.append(Line2D([], [], color=GRID, linewidth=6, label="best at each size"))
    handles.append(
        Line2D([], [], linestyle="", marker="o", color=QUIET, markerfacecolor="white",
               markersize=6, label="hollow: gradients taken")
    )  # fmt: skip
    return handles


def _bold(words: str) -> str:
    """Words as mathtext takes them."""
    return words.replace(" ", r"\ ")
