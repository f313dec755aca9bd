"""One picture of a run: the roofline above, models end to end below."""

from __future__ import annotations

from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from mlakit.benching.clock import Ceilings
from mlakit.benching.published import PUBLISHED
from mlakit.benching.result import ShapeResult
from mlakit.benching.roofline import draw_roofline
from mlakit.reporting.style import QUIET, RESULT, SOURCE, STYLE, WIDTH, as_png

PANELS = 3


def draw(result: dict[str, Any]) -> bytes:
    """PNG of what a run has so far, which may be nothing but the roofs."""
    rows, panels = result["end_to_end"], []
    for row in rows:
        if row["shape"]["name"] not in panels:
            panels.append(row["shape"]["name"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 8.2 if panels else 5.2), layout="constrained")
        parts = figure.subfigures(2, 1, height_ratios=(1.6, 1)) if panels else [figure]
        axes = parts[0].subplots()
        machine = result["environment"].get("gpu" if result["device"] == "cuda" else "cpu")
        axes.set_title(f"MLA decode on {machine}: 512 + 64", fontsize=9, color=QUIET, pad=10)
        if result["ceilings"]:
            shapes = [ShapeResult.from_dict(shape) for shape in result["shapes"]]
            published = PUBLISHED if result["device"] == "cuda" else ()
            draw_roofline(axes, Ceilings(**result["ceilings"]), shapes, published=published)
        else:
            axes.text(0.5, 0.5, "no kernel was timed", ha="center", transform=axes.transAxes)
        if panels:
            several = parts[1].subplots(1, max(PANELS, len(panels)), squeeze=False)[0]
            for panel, name in zip(several, panels):
                _model(panel, [row for row in rows if row["shape"]["name"] == name], name)
            several[0].set_ylabel("tokens per second")
            lines, words = several[0].get_legend_handles_labels()
            parts[1].legend(lines, words, loc="outside lower center", ncols=4, fontsize=8)
            for panel in several[len(panels) :]:
                panel.set_visible(False)
    return as_png(figure)


def _model(axes: Axes, rows: list[dict[str, Any]], name: str) -> None:
    """Tokens per second against context, the source's and ours."""
    rows = sorted(rows, key=lambda row: row["context"])
    for side, colour, label in (("source", SOURCE, "GQA"), ("latent", RESULT, "MLA 512 + 64")):
        for key, line, words in (
            ("at_largest_batch", "o-", "largest batch"),
            ("at_fixed_batch", "s--", "fixed batch"),
        ):
            known = [
                (row["context"], row[side][key]["tokens_per_s"])
                for row in rows
                if "tokens_per_s" in row[side].get(key, {})
            ]
            if known:
                axes.plot(*zip(*known), line, color=colour, label=f"{label}, {words}")
    row = rows[0]
    axes.set_title(f"{name}, {row['layers_run']} of {row['shape']['layers']} layers", fontsize=9)
    axes.set(xscale="log", yscale="log", xlabel="cached tokens")
    ticks = [row["context"] for row in rows]
    axes.set_xticks(ticks, [f"{t // 1024}k" if t >= 1024 else str(t) for t in ticks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.minorticks_off()
    axes.margins(x=0.12, y=0.15)
