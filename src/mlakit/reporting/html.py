"""The report as one HTML page that needs no network: style and pictures are inside it."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from mlakit.reporting.files import write_file
from mlakit.reporting.plots import as_svg, draw
from mlakit.reporting.schema import Report
from mlakit.reporting.summary import estimate, headline, notes, number, percent, rows

TITLES = {
    "cache": "Cache",
    "quality": "Quality along the continuation",
    "recall": "Recall",
    "tasks": "Tasks",
    "stages": "Stages of the conversion",
    "layers": "Error per layer",
    "speed": "Speed",
}
CAPTIONS = {
    "cache": "Bytes really held per cached token, all layers together. MHA is the same model "
    "with one key/value head per query head.",
    "quality": "Only tokens fed through the cache of the prefix are scored; a rising line would "
    "mean that the cache decays.",
    "recall": "Questions answered exactly by greedy decoding, of those asked. Depth 0 % is the "
    "beginning of the text. n/a: the source itself answers fewer than half at this length.",
    "tasks": "Share of right answers with its 95 % interval. Overlapping intervals do not mean "
    "that two models are alike: all had the same problems, and the paired difference in the "
    "table is the sharper test.",
    "stages": "Each step of the conversion and what it cost.",
    "layers": "Attention output of the converted layer against the original's.",
    "speed": "Medians, batch 1, models timed in turn. The dotted roof is the measured copy "
    "bandwidth over the weight and cache bytes that one token reads; small models may stay in "
    "the processor's own caches and pass it.",
}


def render_html(report: Report, figures: dict[str, Figure] | None = None) -> str:
    """The page as text.

    Args:
        report: what to show.
        figures: the report's pictures if they are drawn already.
    """
    environment = Environment(
        loader=PackageLoader("mlakit.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = draw(report) if figures is None else figures
    pictures = [
        {"title": TITLES[name], "caption": CAPTIONS[name], "svg": Markup(as_svg(figure))}
        for name, figure in drawn.items()
    ]
    return environment.get_template("report.html.j2").render(
        report=report,
        headline=headline(report),
        rows=rows(report),
        notes=notes(report),
        pictures=pictures,
        number=number,
        percent=percent,
        estimate=estimate,
    )


def write_html(report: Report, path: str | Path) -> None:
    """Writes the page; an existing file is replaced whole or not at all."""
    write_file(Path(path), render_html(report).encode())
