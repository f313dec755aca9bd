"""The roofline: where each kernel stands under what the machine can do.

Williams, Waterman and Patterson, "Roofline", Communications of the ACM 52 (4), 2009.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from mlakit.account import DecodeCost, attention_cost
from mlakit.benching.clock import Ceilings
from mlakit.benching.problem import Shape
from mlakit.benching.result import Bench, Point, ShapeResult
from mlakit.benching.view import headline
from mlakit.reporting.style import GRID, INK, QUIET, STYLE, WIDTH, number
from mlakit.spec import AttentionSpec

COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
"""Okabe and Ito's, told apart by colour-blind readers; ours come first."""

APART = 1.05
"""Factor between the places of two kernels with the same intensity, so that both are seen."""

SMALL, LARGE = 14.0, 64.0
"""Areas of the points of the shortest and the longest length."""


def roofline(done: Bench) -> Figure:
    """FLOP per byte against TFLOPS, both logarithmic, under the measured roofs."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 5.2), layout="constrained")
        axes = figure.subplots()
        draw_roofline(axes, done.ceilings, done.shapes, published=done.published)
        axes.set_title(headline(done), fontsize=9, color=QUIET, pad=10)
    return figure


def attention_roofline(
    kinds: Mapping[str, AttentionSpec], ceilings: Ceilings, *, context: int, itemsize: int
) -> Figure:
    """Where kinds of attention stand while a token is decoded, by account: nothing is timed.

    Left: the most that each can compute under the roofs. Right: the least time of one layer.

    Args:
        kinds: name and layer of each.
        ceilings: of a device, measured or stated.
        context: tokens in the cache.
        itemsize: bytes per cached number.
    """
    costs = {name: attention_cost(spec, context, itemsize) for name, spec in kinds.items()}
    places = [cost.intensity for cost in costs.values()]
    ridge = 1e3 * ceilings.matmul_tflops / ceilings.gb_per_s
    left, right = min(*places, ridge) / 9, max(*places, ridge) * 4
    low, high = ceilings.roof(left) / 1.6, ceilings.matmul_tflops * 2.2
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.7), layout="constrained")
        axes, bars = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1.5, 1]})
        axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(low, high))
        axes.set_xlabel("arithmetic intensity, FLOP per byte of cache")
        axes.set_ylabel("TFLOPS")
        _ticks(axes, left, right, low, high)
        _roofs(axes, ceilings, 1.0)
        _stand(axes, costs, ceilings)
        _least_times(bars, costs, ceilings)
        bars.set_title(f"attention over {context:,} tokens", fontsize=9.5, color=QUIET)
    return figure


def _stand(axes: Axes, costs: Mapping[str, DecodeCost], ceilings: Ceilings) -> None:
    """A dot on the roof for each kind, and what share of the arithmetic it can use."""
    for (name, cost), colour in zip(costs.items(), COLOURS):
        rate = ceilings.roof(cost.intensity)
        axes.plot(cost.intensity, rate, "o", color=colour, markersize=8, zorder=4)
        share = f"{100 * rate / ceilings.matmul_tflops:.2g} % of its arithmetic"
        left = cost.intensity > math.sqrt(math.prod(axes.get_xlim()))  # where there is room
        axes.annotate(
            f"{name}, {share}", (cost.intensity, rate), (-9, 4) if left else (9, -10),
            textcoords="offset points", fontsize=8, color=colour, ha="right" if left else "left",
        )  # fmt: skip


def _least_times(axes: Axes, costs: Mapping[str, DecodeCost], ceilings: Ceilings) -> None:
    """Microseconds that the two roofs leave no way around, one bar a kind."""
    seconds = [
        cost.seconds(1e12 * ceilings.matmul_tflops, 1e9 * ceilings.gb_per_s)
        for cost in costs.values()
    ]
    rows = range(len(seconds))
    axes.barh(rows, [1e6 * value for value in seconds], color=COLOURS[: len(seconds)], height=0.6)
    for row, value in zip(rows, seconds):
        axes.annotate(
            f"{number(1e6 * value)} µs", (1e6 * value, row), (5, 0), textcoords="offset points",
            va="center", fontsize=9,
        )  # fmt: skip
    axes.set_yticks(rows, list(costs))
    axes.invert_yaxis()
    axes.margins(x=0.28)
    axes.set_xlabel("least time per token and layer, µs")
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)


def draw_roofline(
    axes: Axes,
    ceilings: Ceilings,
    shapes: Sequence[ShapeResult],
    *,
    published: Sequence[dict] = (),
) -> None:
    """Draws roofs and points of a sweep, which may have no point at all."""
    points = [(found.shape, point) for found in shapes for point in found.points]
    best = max([ceilings.matmul_tflops, *(found.matmul_tflops or 0.0 for found in shapes)])
    ceilings = replace(ceilings, matmul_tflops=best)
    unit, factor = ("TFLOPS", 1.0) if ceilings.matmul_tflops >= 1 else ("GFLOPS", 1e3)
    left, right, low, high = _limits(points, ceilings, factor)
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(low, high))
    axes.set_xlabel("arithmetic intensity, FLOP per byte")
    axes.set_ylabel(unit)
    _ticks(axes, left, right, low, high)
    _roofs(axes, ceilings, factor)
    if points:
        _guides(axes, points, low)
        _points(axes, points, factor)
    _published(axes, published)


def _limits(
    points: list[tuple[Shape, Point]], ceilings: Ceilings, factor: float
) -> tuple[float, float, float, float]:
    """Both sides of the ridge and every point, with room around them."""
    ridge = 1e3 * ceilings.matmul_tflops / ceilings.gb_per_s
    places = [shape.intensity for shape, _ in points] + [ridge]
    left, right = min(places) / 2.9, max(places) * 2.2
    rates = [factor * point.tflops for _, point in points]
    roof = factor * ceilings.matmul_tflops
    low = min([*rates, factor * ceilings.roof(left) * 1.2]) / 2.2
    return left, right, low, max([roof, *rates]) * 1.9


def _ticks(axes: Axes, left: float, right: float, low: float, high: float) -> None:
    for axis, start, end in ((axes.xaxis, left, right), (axes.yaxis, low, high)):
        steps = (1, 2, 5) if end / start < 3e3 else (1,)
        powers = range(math.floor(math.log10(start)), math.ceil(math.log10(end)) + 1)
        places = [step * 10.0**power for power in powers for step in steps]
        axis.set_major_locator(FixedLocator([p for p in places if start <= p <= end]))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.grid(False, axis="x")  # the head counts have their own lines


def _roofs(axes: Axes, ceilings: Ceilings, factor: float) -> None:
    """The best roof as a line with the space above it shaded, the copy's as a thin one."""
    left, right = axes.get_xlim()
    high = axes.get_ylim()[1]
    flat = factor * ceilings.matmul_tflops
    ridge = 1e3 * ceilings.matmul_tflops / ceilings.gb_per_s
    xs = [left, ridge, right]
    ys = [factor * ceilings.roof(x) for x in xs]
    axes.fill_between(xs, ys, [high] * 3, color=GRID, alpha=0.28, linewidth=0, zorder=0)
    axes.plot(xs, ys, color=INK, linewidth=1.8, solid_joinstyle="miter", zorder=2)
    slower, name = min((ceilings.copy_gb_per_s, "copy"), (ceilings.read_gb_per_s, "read"))
    end = 1e3 * ceilings.matmul_tflops / slower
    thin = [factor * left * slower / 1e3, flat]
    if slower < 0.97 * ceilings.gb_per_s:
        axes.plot([left, end], thin, color=QUIET, linewidth=0.9, linestyle=(0, (4, 2)), zorder=2)
    faster = "read" if name == "copy" else "copy"
    x = left * 1.12
    _along(axes, x, factor * ceilings.roof(x) * 1.1, f"{faster} {ceilings.gb_per_s:,.0f} GB/s", INK)
    if slower < 0.97 * ceilings.gb_per_s:
        below = factor * x * slower / 1e3 / 1.27
        _along(axes, x, below, f"{name} {slower:,.0f} GB/s", QUIET)
    unit = "TFLOPS" if factor == 1.0 else "GFLOPS"
    label = f"matmul {flat:,.0f} {unit} ({ceilings.matmul})"
    axes.text(right / 1.05, flat * 1.07, label, ha="right", color=INK, fontsize=8.5)


def _along(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    """Text along a line of slope 1 in logarithms, whose slope in the data is y / x."""
    axes.text(
        x, y, text, color=colour, fontsize=8.5, rotation=math.degrees(math.atan2(y, x)),
        rotation_mode="anchor", transform_rotates_text=True,
    )  # fmt: skip


def _guides(axes: Axes, points: list[tuple[Shape, Point]], low: float) -> None:
    """A faint vertical line per number of query rows, with its name at the bottom."""
    places: dict[str, list[float]] = {}
    for shape, _ in points:
        several = f"\n{shape.queries} queries" if shape.queries > 1 else ""
        name = f"{shape.heads} heads{several}"
        places.setdefault(name, []).append(shape.intensity)
    for name, found in places.items():
        middle = math.exp(sum(map(math.log, found)) / len(found))
        axes.axvline(middle, color=GRID, linewidth=0.8, zorder=0.5)
        axes.text(
            middle, low * 1.09, name, fontsize=7.5, color=QUIET, ha="center", va="bottom",
            linespacing=1.25, zorder=1,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip


def _points(axes: Axes, points: list[tuple[Shape, Point]], factor: float) -> None:
    """Colour: kernel. Area: length, joined by lines. Ring: ragged. Square: several queries."""
    names = list(dict.fromkeys(point.contender for _, point in points))
    names.sort(key=lambda name: not any(p.ours for _, p in points if p.contender == name))
    lengths = sorted({shape.length for shape, _ in points})
    for index, name in enumerate(names):
        colour = COLOURS[index % len(COLOURS)]
        shift = APART ** (index - (len(names) - 1) / 2)
        mine = [(shape, point) for shape, point in points if point.contender == name]
        for line in _lines(mine):
            places = [shape.intensity * shift for shape, _ in line]
            rates = [factor * point.tflops for _, point in line]
            axes.plot(places, rates, color=colour, linewidth=1.0, alpha=0.6, zorder=3)
        for shape, point in sorted(mine, key=lambda pair: -pair[0].length):
            axes.scatter(
                shape.intensity * shift,
                factor * point.tflops,
                s=_area(shape.length, lengths),
                marker="o" if shape.queries == 1 else "s",
                facecolor="white" if shape.varlen else colour,
                edgecolor=colour if shape.varlen else "white",
                linewidth=1.1 if shape.varlen else 0.6,
                zorder=5 if point.ours else 4,
            )
    _legends(axes, names, points, lengths)


def _lines(points: list[tuple[Shape, Point]]) -> list[list[tuple[Shape, Point]]]:
    """Points that differ in length only, shortest first."""
    lines: dict[tuple[int, int, bool], list[tuple[Shape, Point]]] = {}
    for shape, point in points:
        lines.setdefault((shape.heads, shape.queries, shape.varlen), []).append((shape, point))
    return [sorted(line, key=lambda pair: pair[0].length) for line in lines.values()]


def _area(length: int, lengths: list[int]) -> float:
    if len(lengths) == 1:
        return 48.0
    share = math.log(length / lengths[0]) / math.log(lengths[-1] / lengths[0])
    return SMALL + share * (LARGE - SMALL)


def _legends(
    axes: Axes, names: list[str], points: list[tuple[Shape, Point]], lengths: list[int]
) -> None:
    """Kernels, and below them only those signs that occur."""
    dots = [
        Line2D([], [], linestyle="", marker="o", markersize=7, color=COLOURS[i % len(COLOURS)])
        for i in range(len(names))
    ]
    texts = list(names)
    if any(shape.queries > 1 for shape, _ in points):
        dots.append(Line2D([], [], linestyle="", marker="s", markersize=6, color=QUIET))
        texts.append("several queries")
    if any(shape.varlen for shape, _ in points):
        dots.append(
            Line2D([], [], linestyle="", marker="o", markersize=6, markerfacecolor="white",
                   markeredgecolor=QUIET, markeredgewidth=1.3)
        )  # fmt: skip
        texts.append("ragged lengths")
    for length in (lengths[0], lengths[-1]) if len(lengths) > 1 else ():
        size = math.sqrt(_area(length, lengths))
        dots.append(Line2D([], [], linestyle="", marker="o", markersize=size, color=GRID))
        texts.append(f"{length:,} tokens")
    axes.legend(
        dots, texts, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), borderaxespad=0.0
    )


def _published(axes: Axes, published: Sequence[dict]) -> None:
    """Others' best figure as a dotted line, clearly not of this machine."""
    known = [entry for entry in published if entry["tflops"]]
    if not known:
        return
    best = max(known, key=lambda entry: entry["tflops"])
    axes.axhline(best["tflops"], color=QUIET, linewidth=1.0, linestyle=":", zorder=1)
    axes.text(
        axes.get_xlim()[0] * 1.05, best["tflops"] * 1.05, f"{best['kernel']} on {best['gpu']}: "
        f"{best['tflops']} published", va="bottom", color=QUIET, fontsize=7.5,
    )  # fmt: skip
