"""The numbers of a comparison as words: one table, whatever shows it."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlakit.reporting.answers import mean_recall
from mlakit.reporting.comparison import Comparison, Point
from mlakit.reporting.schema import Recall, TaskScore
from mlakit.reporting.style import number, percent
from mlakit.reporting.summary import KIND_WORDS, estimate

TEXT_COLUMNS = ("method", "setting", "text used")
"""Columns that are words; all others are numbers."""


def table(found: Comparison) -> list[dict[str, str]]:
    """One line per point, by column; a method's title stands at its first."""
    lines = []
    last = ""
    for point in found.points:
        title = found.method(point).title
        lines.append({"method": title if title != last else "", **_cells(point)})
        last = title
    unused = {
        "read, %": "",
        "weights, %": "100",
        "recall, %": "n/a",
        "question seen, %": "",
        "tokens/s": "-",
        "first token": "-",
    }
    for column, usual in unused.items():
        if all(line[column] == usual for line in lines):
            for line in lines:
                del line[column]
    return lines


def _cells(point: Point) -> dict[str, str]:
    used = "none"
    if point.calibration_tokens:
        used = f"{point.calibration_tokens:,} calibrated"
    if point.trained:
        used = f"{point.trained_tokens:,} trained"
    recall = mean_recall(point)
    pace = point.pace
    reads = point.read_percent != point.percent_of_own
    return {
        "setting": point.setting,
        "bytes/token": number(point.bytes_per_token),
        "% of own": percent(point.percent_of_own),
        "% of MHA": percent(point.percent_of_mha),
        "read, %": percent(point.read_percent) if reads else "",
        "weights, %": number(round(point.weight_percent, 1)),
        "KL, nats": estimate(point.kl_mean),
        "top-1, %": number(round(100 * point.top1.value, 1)),
        "perplexity": estimate(point.perplexity),
        "recall, %": "n/a" if recall is None else number(round(100 * recall, 1)),
        "question seen, %": _share(point.recall_seen),
        **{_task_head(score): _task_cell(score) for score in point.tasks},
        "tokens/s": f"{number(pace.tokens_per_second)} ({_times(pace.of_original)})"
        if pace
        else "-",
        "first token": _times(pace.first_token_of_original) if pace else "-",
        "text used": used,
    }


def _task_head(score: TaskScore) -> str:
    return f"{score.task}, {score.measure}{', %' if score.share else ''}"


def _task_cell(score: TaskScore) -> str:
    """The point's own value; the original's stands as the source."""
    value = score.result or score.source
    return estimate(value.mapped(lambda x: round(100 * x, 1)) if score.share else value)


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x"


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
        "rows but LazyLLM, and bytes are those held at its end",
    ]
    if found.recall is not None:
        failing = [
            f"{KIND_WORDS[c.kind]} at {c.length:,}" for c in found.recall.columns() if not c.usable
        ]
        if failing:
            listed.append(f"n/a: the source itself answers fewer than half of {', '.join(failing)}")
    if any(p.pace for p in found.points):
        listed.append(
            "tokens/s are decoded one by one after the prefix, batch 1, and the first token's time "
            "is that of reading and compressing it, both also as a multiple of the original's in "
            "turn: of this package's code on this machine, where most rows unpack their cache at "
            "every step; - where savings are by account"
        )
    listed += task_notes(found)
    if any(p.simulated for p in found.points):
        listed.append("weight bytes of pruned or rounded weights are by account: they ran unpacked")
    listed += [f"{m.method}, {m.setting}: not measured, {m.reason}" for m in found.missing]
    return listed


def task_notes(found: Comparison) -> list[str]:
    """How the tasks were asked, and what their scores do not say."""
    asked = {score.task: score for score in found.original.tasks}
    listed = [
        f"task {name}: {f'{score.problems:,} problems, ' if score.problems else ''}{score.settings}"
        for name, score in asked.items()
    ]
    if listed:
        listed.append(
            "a task's whole prompt, with its question, is read and compressed before the answer is "
            "written; brackets are 95 % intervals over problems"
        )
    return listed + list(dict.fromkeys(w for s in found.original.tasks for w in s.warnings))


def sizes(found: Comparison) -> list[str]:
    """What would have to be trained, one sentence each: bytes by account and no score."""
    return [
        f"{s.title}, not scored: {s.note}; by account {s.nbytes:,} bytes for {s.length:,} tokens, "
        f"{percent(s.percent_of_own)} of your own cache"
        for s in found.sized
    ]


def print_comparison(found: Comparison, console: Console) -> None:
    """Prints the answers, the table and what to know of it.

    A console that is not a terminal gets tab-separated lines that tools can cut.
    """
    answers = [f"{answer.question}\n  {answer.text}" for answer in found.answers]
    caption = "\n".join(f"note: {note}" for note in (*notes(found), *sizes(found)))
    lines = table(found)
    if not console.is_terminal:
        cut = ["\t".join(lines[0]), *("\t".join(line.values()) for line in lines)]
        for text in (*answers, *cut, caption):
            console.file.write(text.rstrip() + "\n")
        return
    for answer in found.answers:
        console.print(Text(answer.question, style="bold"))
        console.print(Text(f"  {answer.text}\n"))
    drawn = Table(box=SIMPLE_HEAD, caption=Text(caption), caption_justify="left")
    for head in lines[0]:
        drawn.add_column(Text(head), justify="left" if head in TEXT_COLUMNS else "right")
    for line in lines:
        drawn.add_row(*map(Text, line.values()))
    console.print(drawn, highlight=False)
