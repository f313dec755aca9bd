"""The loss curves of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from mlakit.healing.report import ArmReport, HealReport
from mlakit.reporting.files import write_file
from mlakit.reporting.style import QUIET, RESULT, SOURCE, STYLE, WIDTH, as_png

PICTURE_NAME = "heal.png"


def write_picture(report: HealReport, folder: Path) -> None:
    """Writes ``heal.png``: training loss, held-out perplexity and KL against tokens."""
    with matplotlib.rc_context(STYLE):
        figure = draw_healing(report)
    write_file(folder / PICTURE_NAME, as_png(figure))


def draw_healing(report: HealReport) -> Figure:
    """Three panels; the control arm beside the healed one where there is one."""
    figure = Figure(figsize=(WIDTH * 1.25, 3.2), layout="constrained")
    loss, perplexity, kl = figure.subplots(1, 3)
    arms = [("healed", report.healed, RESULT, "o-")]
    if report.control is not None:
        arms.append(("control", report.control, SOURCE, "s--"))
    for name, arm, colour, line in arms:
        tokens = [row["tokens"] for row in arm.losses]
        values = [row["loss"] for row in arm.losses]
        loss.plot(tokens, values, "-", color=colour, alpha=0.25, linewidth=1)
        loss.plot(tokens, smoothed(values), "-", color=colour, label=name)
        _checks(perplexity, arm, "perplexity", colour, line)
        _checks(kl, arm, "kl", colour, line)
    perplexity.axhline(report.original_perplexity, color=QUIET, linestyle=":", label="original")
    loss.set_title("training loss")
    perplexity.set_title("held-out perplexity, cached prefix")
    kl.set_title("held-out KL(original || model), nats")
    for axes in (perplexity, kl):
        axes.margins(y=0.1)  # room for the ring
    kl.set_ylim(0, kl.get_ylim()[1])
    for axes in (loss, perplexity, kl):
        axes.set_xlabel("tokens")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k, 1M
    loss.legend()
    perplexity.legend()
    return figure


def _checks(axes: matplotlib.axes.Axes, arm: ArmReport, key: str, colour: str, line: str) -> None:
    """A line through the checks, the kept one ringed."""
    axes.plot(
        [row["tokens"] for row in arm.checks], [row[key] for row in arm.checks], line, color=colour
    )
    axes.plot(arm.best["tokens"], arm.best[key], "o", color=colour, markersize=9, fillstyle="none")


def smoothed(values: Sequence[float]) -> list[float]:
    """Means over a twentieth of the run, before each point."""
    span = max(1, len(values) // 20)
    return [
        sum(values[max(0, i + 1 - span) : i + 1]) / min(span, i + 1) for i in range(len(values))
    ]
