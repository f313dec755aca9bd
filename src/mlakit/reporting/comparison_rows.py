"""The numbers of a comparison as words: one table, whatever shows it."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlakit.reporting.answers import mean_recall
from mlakit.reporting.comparison import Comparison, Point
from mlakit.reporting.schema import Recall
from mlakit.reporting.style import number, percent
from mlakit.reporting.summary import KIND_WORDS, estimate

HEADS = (
    "method", "setting", "bytes/token", "% of own", "% of MHA", "KL, nats", "top-1, %",
    "perplexity", "recall, %", "question seen, %", "text used",
)  # fmt: skip


def table(found: Comparison) -> list[list[str]]:
    """One line per point, as ``HEADS``; a method's title stands at its first."""
    lines = []
    last = ""
    for point in found.points:
        title = found.method(point).title
        lines.append([title if title != last else "", point.setting, *_numbers(point)])
        last = title
    return lines


def _numbers(point: Point) -> list[str]:
    used = "none"
    if point.calibration_tokens:
        used = f"{point.calibration_tokens:,} calibrated"
    if point.trained:
        used = f"{point.trained_tokens:,} trained"
    recall = mean_recall(point)
    return [
        number(point.bytes_per_token),
        percent(point.percent_of_own),
        percent(point.percent_of_mha),
        estimate(point.kl_mean),
        number(round(100 * point.top1.value, 1)),
        estimate(point.perplexity),
        "n/a" if recall is None else number(round(100 * recall, 1)),
        _share(point.recall_seen),
        used,
    ]


def _share(recall: Recall | None) -> str:
    columns = list(recall.columns()) if recall else []
    if not columns:
        return ""
    return number(round(100 * sum(c.result or 0.0 for c in columns) / len(columns), 1))


def notes(found: Comparison) -> list[str]:
    """What a reader must know of the numbers, one sentence each."""
    listed = [
        f"{found.windows} windows of {found.text.name}: {found.prefix_length:,} tokens are read "
        f"and their cache is compressed, then {found.suffix_length:,} more are scored through it",
        "brackets are 95 % intervals over windows; the tokens after the prefix stay exact in all "
        "rows, and bytes are those held at its end",
    ]
    if found.recall is not None:
        failing = [
            f"{KIND_WORDS[c.kind]} at {c.length:,}" for c in found.recall.columns() if not c.usable
        ]
        if failing:
            listed.append(f"n/a: the source itself answers fewer than half of {', '.join(failing)}")
    listed += [f"{m.method}, {m.setting}: not measured, {m.reason}" for m in found.missing]
    return listed


def print_comparison(found: Comparison, console: Console) -> None:
    """Prints the answers, the table and what to know of it.

    A console that is not a terminal gets tab-separated lines that tools can cut.
    """
    answers = [f"{answer.question}\n  {answer.text}" for answer in found.answers]
    caption = "\n".join(f"note: {note}" for note in notes(found))
    if not console.is_terminal:
        lines = ["\t".join(HEADS), *("\t".join(line) for line in table(found))]
        for line in (*answers, *lines, caption):
            console.file.write(line.rstrip() + "\n")
        return
    for answer in found.answers:
        console.print(Text(answer.question, style="bold"))
        console.print(Text(f"  {answer.text}\n"))
    drawn = Table(box=SIMPLE_HEAD, caption=Text(caption), caption_justify="left")
    for index, head in enumerate(HEADS):
        drawn.add_column(Text(head), justify="left" if index in (0, 1, 10) else "right")
    for cells in table(found):
        drawn.add_row(*map(Text, cells))
    console.print(drawn, highlight=False)
