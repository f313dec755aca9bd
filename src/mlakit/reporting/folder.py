"""All views of a report in one folder."""

from __future__ import annotations

from pathlib import Path

from mlakit.reporting.files import REPORT_NAME, write_file
from mlakit.reporting.html import TITLES, render_html
from mlakit.reporting.plots import draw
from mlakit.reporting.schema import Report
from mlakit.reporting.style import as_png


def write_report(report: Report, folder: str | Path) -> None:
    """Writes ``report.html``, its pictures as PNG and, last, ``report.json``.

    Everything is rendered before the first file is written. A picture of an earlier report that
    this one has no data for is removed.
    """
    target = Path(folder)
    figures = draw(report)
    files = {f"{name}.png": as_png(figure) for name, figure in figures.items()}
    files["report.html"] = render_html(report, figures).encode()
    files[REPORT_NAME] = report.model_dump_json(indent=2).encode()
    for name, content in files.items():
        write_file(target / name, content)
    for name in TITLES.keys() - figures.keys():
        (target / f"{name}.png").unlink(missing_ok=True)
