"""Pictures of a report, drawn with matplotlib and without its global state.

Colours are Okabe and Ito's, told apart by colour-blind readers. In SVG the ink, the grid and the
two models' colours become CSS variables, so that one picture suits light and dark pages.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter

from mlakit.reporting.schema import Recall, RecallKind, Report, SpeedPoint
from mlakit.reporting.style import (
    GRID,
    INK,
    QUIET,
    RESULT,
    SOURCE,
    STYLE,
    WIDTH,
    number,
    percent,
)
from mlakit.reporting.summary import KIND_WORDS
from mlakit.reporting.task_scores import task_scores

HEAT = matplotlib.colormaps["Blues"]
CSS_COLOURS = {
    INK: "var(--ink)",
    QUIET: "var(--quiet)",
    GRID: "var(--grid)",
    SOURCE: "var(--source)",
    RESULT: "var(--result)",
}


def draw(report: Report) -> dict[str, Figure]:
    """Every picture the report has data for, by file name without ending."""
    painters: dict[str, Callable[[Report], Figure | None]] = {
        "cache": cache_bars,
        "quality": quality_by_position,
        "recall": recall_maps,
        "tasks": task_scores,
        "stages": stages,
        "layers": layer_errors,
        "speed": speed,
    }
    with matplotlib.rc_context(STYLE):
        drawn = {name: paint(report) for name, paint in painters.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def as_svg(figure: Figure) -> str:
    """The picture as an ``<svg>`` element for a page that defines the CSS variables."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for colour, variable in CSS_COLOURS.items():
        svg = svg.replace(colour, variable)
    return svg


def _figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), layout="constrained")


def cache_bars(report: Report) -> Figure:
    """Cache bytes per token: the model as MHA, the source, the result."""
    source, result = report.source, report.result
    mha = 100 * source.bytes_per_token / source.percent_of_mha
    bars = [
        ("as MHA", mha, GRID, ""),
        (source.name, source.bytes_per_token, SOURCE, f"{percent(source.percent_of_mha)} of MHA"),
    ]
    if result:
        of_own, of_mha = percent(result.percent_of_own), percent(result.percent_of_mha)
        share = f"{of_own} of your own, {of_mha} of MHA"
        bars.append((result.name, result.bytes_per_token, RESULT, share))
    figure = _figure(0.9 + 0.42 * len(bars))
    axes = figure.subplots()
    for row, (_, value, colour, share) in enumerate(bars):
        axes.barh(row, value, color=colour, height=0.62)
        label = f"{number(value)} ({share})" if share else number(value)
        axes.annotate(label, (value, row), (6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(bars)), [_short(name) for name, *_ in bars])
    axes.invert_yaxis()
    # Labels stand right of the bars: leave them room.
    axes.set_xlim(0, 1.6 * max(value for _, value, *_ in bars))
    axes.set_xlabel("cache, bytes per token (all layers)")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    return figure


def quality_by_position(report: Report) -> Figure:
    """NLL, and with a result KL, along the continuation: does the cache decay with distance?"""
    quality = report.quality
    figure = _figure(3.0)
    panels = figure.subplots(1, 2 if quality.agreement else 1, squeeze=False)[0]
    nll = panels[0]
    nll.plot(quality.positions, quality.source.nll_by_position, "o-", color=SOURCE)
    nll.set_title("negative log-likelihood")
    nll.set_ylabel("nats per token")
    if quality.agreement and quality.result and report.result:
        nll.plot(quality.positions, quality.result.nll_by_position, "s--", color=RESULT)
        nll.legend([_short(report.source.name), _short(report.result.name)])
        kl = panels[1]
        kl.plot(quality.positions, quality.agreement.kl_by_position, "s-", color=RESULT)
        kl.set_title("KL(source || result)")
        kl.set_ylabel("nats per token")
        kl.set_ylim(0, 1.12 * max(quality.agreement.kl_by_position) or 1)
    for axes in panels:
        axes.set_xlabel("position in the continuation, tokens")
        axes.set_xlim(left=0)
    return figure


def recall_maps(report: Report) -> Figure | None:
    """Share of answers found by length and depth, one map per kind of question and model."""
    recall = report.recall
    if recall is None:
        return None
    names = [report.source.name, *([report.result.name] if report.result else [])]
    kinds = list(dict.fromkeys(cell.kind for cell in recall.cells))
    depths = len({cell.depth for cell in recall.cells})
    figure = _figure(len(kinds) * (1.0 + 0.3 * depths))
    grid = figure.subplots(len(kinds), len(names), squeeze=False, sharex="row", sharey="row")
    for row, kind in zip(grid, kinds, strict=True):
        for axes, name, is_result in zip(row, names, (False, True), strict=False):
            axes.set_title(f"{KIND_WORDS[kind]}: {_short(name)}")
            _recall_map(axes, recall, kind, is_result)
            axes.set_xlabel("length, tokens")
        row[0].set_ylabel("depth in the text")
    return figure


def _recall_map(axes: Axes, recall: Recall, kind: RecallKind, is_result: bool) -> None:
    cells = [cell for cell in recall.cells if cell.kind == kind]
    usable = {c.length: c.usable for c in recall.columns() if c.kind == kind}
    lengths, depths = sorted(usable), sorted({cell.depth for cell in cells})
    for cell in cells:
        x, y = lengths.index(cell.length), depths.index(cell.depth)
        hits = (cell.result_hits if is_result else cell.source_hits) or 0
        if is_result and not usable[cell.length]:
            axes.text(x, y, "n/a", ha="center", va="center", color=QUIET)
            continue
        share = hits / cell.trials
        axes.barh(y, 0.94, left=x - 0.47, height=0.9, color=HEAT(0.08 + 0.82 * share))
        ink = "white" if share > 0.5 else "black"
        axes.text(x, y, f"{hits}/{cell.trials}", ha="center", va="center", color=ink)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    axes.set_ylim(len(depths) - 0.5, -0.5)
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def stages(report: Report) -> Figure | None:
    """KL and perplexity after each step of the conversion."""
    if not report.stages:
        return None
    rows = range(len(report.stages))
    figure = _figure(0.9 + 0.4 * len(rows))
    values = {
        "KL(source || stage), nats per token": [stage.kl_mean for stage in report.stages],
        "perplexity after a cached prefix": [stage.perplexity for stage in report.stages],
    }
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (title, widths) in zip(panels, values.items(), strict=True):
        axes.barh(rows, widths, color=RESULT, height=0.62)
        for row, width in enumerate(widths):
            axes.annotate(
                number(width), (width, row), (6, 0), textcoords="offset points", va="center"
            )
        axes.set_xlabel(title)
        axes.margins(x=0.2)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
    labels = [f"{stage.name}, {number(stage.bytes_per_token)} B/token" for stage in report.stages]
    panels[0].set_yticks(rows, labels)
    panels[0].invert_yaxis()
    return figure


def layer_errors(report: Report) -> Figure | None:
    """Relative output error of each converted layer."""
    if not report.layer_errors:
        return None
    figure = _figure(2.6)
    axes = figure.subplots()
    layers = [e.layer for e in report.layer_errors]
    axes.bar(layers, [e.error for e in report.layer_errors], color=RESULT, width=0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error of the output")
    axes.grid(False, axis="x")
    return figure


def speed(report: Report) -> Figure | None:
    """Decoded tokens per second under the roof that memory bandwidth sets, and prefill time."""
    if report.speed is None:
        return None
    figure = _figure(3.2)
    decode, prefill = figure.subplots(1, 2)
    lines = [(report.source.name, report.speed.source, SOURCE, "o")]
    if report.result and report.speed.result:
        lines.append((report.result.name, report.speed.result, RESULT, "s"))
    for name, points, colour, marker in lines:
        lengths = [p.length for p in points]
        rates = [p.decode_tokens_per_second for p in points]
        decode.plot(lengths, rates, marker + "-", color=colour, label=_short(name))
        roof = [_roof(p, report.speed.copy_bandwidth) for p in points]
        label = f"roof at {report.speed.copy_bandwidth / 1e9:.0f} GB/s"
        decode.plot(lengths, roof, ":", color=colour, label=label)
        prefill.plot(lengths, [p.prefill_seconds for p in points], marker + "-", color=colour)
    decode.set_title("decode, tokens per second")
    prefill.set_title("prefill, seconds")
    for axes in (decode, prefill):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.set_xlabel("cached length, tokens")
        ticks = [p.length for p in lines[0][1]]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
    decode.legend(fontsize=8)
    return figure


def _roof(point: SpeedPoint, bandwidth: float) -> float:
    return bandwidth / point.bytes_moved


def _short(name: str) -> str:
    """Long names (hub ids, paths) lose their middle."""
    return name if len(name) <= 28 else f"{name[:13]}…{name[-14:]}"
