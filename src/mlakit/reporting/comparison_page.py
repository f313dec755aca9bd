"""All views of a comparison in one folder."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from mlakit.reporting.comparison import FAMILY_WORDS, Comparison
from mlakit.reporting.comparison_rows import TEXT_COLUMNS, notes, table
from mlakit.reporting.files import write_file
from mlakit.reporting.pareto import pareto
from mlakit.reporting.plots import as_svg
from mlakit.reporting.style import as_png, number, percent

JSON_NAME, PAGE_NAME, PICTURE_NAME = "compare.json", "compare.html", "compare.png"


def render_comparison(found: Comparison, figure: Figure | None = None) -> str:
    """The page as text; it needs no network.

    Args:
        found: what to show.
        figure: its picture if it is drawn already.
    """
    environment = Environment(
        loader=PackageLoader("mlakit.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    best = next(p for p in found.points if p.key == found.answers[0].best)
    return environment.get_template("comparison.html.j2").render(
        found=found,
        headline=f"{found.method(best).title}, {percent(best.percent_of_own)}",
        picture=Markup(as_svg(figure or pareto(found))),
        text_columns=TEXT_COLUMNS,
        lines=table(found),
        notes=notes(found),
        words=FAMILY_WORDS,
        number=number,
        percent=percent,
    )


def write_comparison(found: Comparison, folder: str | Path) -> None:
    """Writes the page, its picture as PNG and, last, the JSON; all are rendered before."""
    figure = pareto(found)
    files = {
        PICTURE_NAME: as_png(figure),
        PAGE_NAME: render_comparison(found, figure).encode(),
        JSON_NAME: found.model_dump_json(indent=1).encode(),
    }
    for name, content in files.items():
        write_file(Path(folder) / name, content)
