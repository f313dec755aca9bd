"""Task scores as a picture: shares of right answers with their 95 % intervals, model by model."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mlakit.errors import UsageError
from mlakit.reporting.schema import Estimate, Report, TasksBefore, TaskScore
from mlakit.reporting.style import QUIET, RESULT, SOURCE, WIDTH, percent


def require_same_source(earlier: Report, fingerprint: str | None, name: str) -> None:
    """Refuses an earlier report that has no result, or that of another source.

    Raises:
        UsageError: before anything is measured.
    """
    if earlier.result is None or earlier.source.fingerprint != fingerprint:
        raise UsageError(
            f"the report of --before does not compare a result with {name}",
            remedy="make it with: mlakit eval MODEL STUDENT --tasks ... -o FOLDER",
        )


def tasks_before(earlier: Report, tasks: Sequence[TaskScore]) -> TasksBefore:
    """Scores of an earlier report's result on the tasks of a new one.

    Args:
        earlier: a report of the same source.
        tasks: as they were asked now.
    """
    assert earlier.result is not None

    def key(score: TaskScore) -> tuple[object, ...]:
        return score.task, score.measure, score.problems, score.settings

    known = {key(score): score for score in earlier.tasks}
    return TasksBefore(
        name=earlier.result.name,
        tasks=[known[key(score)] for score in tasks if key(score) in known],
        missing=[f"{s.task}, {s.measure}" for s in tasks if key(s) not in known],
    )


def task_scores(report: Report) -> Figure | None:
    """One panel for each measure that is a share; the result before healing where it is known."""
    shown = [score for score in report.tasks if score.share]
    if not shown:
        return None
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    models = 1 + (report.result is not None) + (report.before is not None)
    figure = Figure(figsize=(WIDTH, rows * (0.95 + 0.38 * models)), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, score in zip(panels, shown, strict=False):
        _panel(axes, _bars(report, score))
        problems = f"\n{score.problems:,} problems" if score.problems else ""
        axes.set_title(f"{score.task}, {score.measure}{problems}", fontsize=9)
    for place, axes in enumerate(panels):
        if place >= len(shown):
            axes.set_axis_off()
        elif place % columns:
            axes.set_yticklabels([])
    return figure


Bar = tuple[str, Estimate, str]
"""A model's name, its score, its colour."""


def _bars(report: Report, score: TaskScore) -> list[Bar]:
    bars: list[Bar] = [(report.source.name, score.source, SOURCE)]
    if report.before and (then := report.before.score(score)):
        bars.append((report.before.name, then, QUIET))
    if report.result and score.result:
        bars.append((report.result.name, score.result, RESULT))
    return bars


def _panel(axes: Axes, bars: Sequence[Bar]) -> None:
    """Points with intervals, in percent; the value beside each."""
    for row, (_, score, colour) in enumerate(bars):
        value = 100 * score.value
        low, high = (value if end is None else 100 * end for end in (score.low, score.high))
        axes.plot([low, high], [row, row], "-", color=colour, linewidth=2.4)
        axes.plot(value, row, "o", color=colour, markersize=7)
        axes.annotate(
            percent(round(value, 1)), (value, row), (0, 7), textcoords="offset points",
            ha="center", fontsize=8.5,
        )  # fmt: skip
    axes.set_yticks(range(len(bars)), [_short(name) for name, *_ in bars])
    axes.set_ylim(len(bars) - 0.5, -0.7)
    highest = max(100 * (score.value if score.high is None else score.high) for _, score, _ in bars)
    axes.set_xlim(0, min(104, 1.1 * highest + 2))
    axes.set_xlabel("right answers, %")
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)


def _short(name: str) -> str:
    return name if len(name) <= 20 else f"{name[:9]}…{name[-10:]}"
