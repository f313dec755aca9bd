"""The report in a terminal; plain lines where there is none."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlakit.reporting.domains import disagreement
from mlakit.reporting.schema import Report
from mlakit.reporting.summary import (
    Row,
    headline,
    notes,
    rows,
    verification_headline,
    verification_rows,
)
from mlakit.reporting.verified import Verification


def print_report(report: Report, console: Console) -> None:
    """Prints the headline, what was scored and the table.

    A console that is not a terminal gets tab-separated lines that tools can cut.
    """
    quality = report.quality
    scored = (
        f"{quality.windows} windows of {quality.text.name}: {quality.suffix_length} tokens each, "
        f"scored through the cache of {quality.prefix_length:,} tokens before them; "
        "brackets are 95 % intervals"
    )
    scored = "\n".join([scored, *(f"note: {note}" for note in notes(report))])
    heads = ["", report.source.name, *([report.result.name] if report.result else []), ""]
    print_rows(headline(report), heads, rows(report), scored, console)


def print_verification(found: Verification, console: Console) -> None:
    """Prints the verdict and every number behind it."""
    lines = [f"broken: {failure}" for failure in found.failures]
    lines = lines or [f"kept: {promise}" for promise in found.promises]
    warning = disagreement(found.domains)
    caption = "\n".join([*lines, *([f"note: {warning}"] if warning else [])])
    heads = ["", f"{found.source} → {found.result}", ""]
    print_rows(verification_headline(found), heads, verification_rows(found), caption, console)


def print_rows(
    title: str, heads: list[str], lines: list[Row], caption: str, console: Console
) -> None:
    """Prints rows under their heads (label, one or two models, note)."""
    cells = [[r.label, r.source, *([r.result] if len(heads) == 4 else []), r.note] for r in lines]
    if not console.is_terminal:
        for line in (title, "\t".join(heads), *("\t".join(c) for c in cells), caption):
            console.file.write(line.rstrip() + "\n")
        return
    table = Table(
        title=Text(title, style="bold"),
        caption=Text(caption),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    for index, head in enumerate(heads):
        inner = 0 < index < len(heads) - 1
        table.add_column(Text(head), justify="right" if inner else "left", overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    console.print(table, highlight=False)
