"""``mlakit demo``: the whole job on the model that ships with the package."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

PROMPTS = (
    "Once upon a time, there was a little",
    "My fellow citizens, the year that has passed",
    "The code of Anna is 7302.\nThe code of Tom is 1184.\nThe code of Ruth is 9915.\n"
    "What is the code of Tom? The code of Tom is",
)
"""A story, a speech and something to look up: what the demo model was trained on."""

REFINE_STEPS = 20
"""Fewer than the default: two slow cores are to be done in two minutes."""

CALIB_TOKENS, CALIB_WINDOW = 8192, 2048
"""Less text than the default for the same reason, in windows as long."""


def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for the two conversions and the report.")
    ] = Path("mlakit-demo"),
    cache_ratio: Annotated[
        float, typer.Option(help="Share of the cache that the compressed model keeps.")
    ] = 0.5,
) -> None:
    """Do the whole job on the model that ships with mlakit.

    Inspects, converts in both modes, verifies, generates before and after, writes the report.
    """
    from rich.console import Console

    from mlakit.checkpoint import require_writable
    from mlakit.cli.progress import show_progress
    from mlakit.conversion.apply import convert
    from mlakit.evaluation import check, evaluate
    from mlakit.inspection import inspect, print_inspection
    from mlakit.reporting.folder import write_report
    from mlakit.reporting.table import print_report, print_verification

    console, output = Console(), output.expanduser()
    require_writable(output)
    exact, compressed = output / "equal-cache", output / "compressed"
    with resources.as_file(resources.files("mlakit") / "assets" / "demo_model") as source:
        _step(console, f"Look: mlakit inspect {source}")
        print_inspection(inspect(str(source)), console)

        _step(console, f"Same cache, exact: mlakit convert DEMO -o {exact} --equal-cache")
        with show_progress() as progress:
            convert(source, exact, equal_cache=True, progress=progress)
        found = check(str(source), str(exact))
        print_verification(found, console)
        found.require()

        _step(
            console,
            f"Less cache: mlakit convert DEMO -o {compressed} --cache-ratio {cache_ratio} "
            f"--refine-steps {REFINE_STEPS} --calib-tokens {CALIB_TOKENS} "
            f"--calib-window {CALIB_WINDOW}",
        )
        with show_progress() as progress:
            convert(
                source,
                compressed,
                cache_ratio=cache_ratio,
                refine_steps=REFINE_STEPS,
                calibration_tokens=CALIB_TOKENS,
                calibration_window=CALIB_WINDOW,
                progress=progress,
            )
            report = evaluate(
                str(source),
                str(compressed),
                prompts=PROMPTS,
                command=f"mlakit demo --cache-ratio {cache_ratio}",
                progress=progress,
            )
    print_report(report, console)

    _step(console, "Before and after")
    for sample in report.samples:
        for label, text in (("source", sample.source), ("result", sample.result or "")):
            prompt = " ".join(sample.prompt.split())
            typer.echo(f"[{label}] {prompt} >>> {' '.join(text.split())}")
    write_report(report, output)
    summary = {"equal_cache": found.model_dump(), "compressed": report.model_dump()}
    (output / "demo.json").write_text(json.dumps(summary, indent=1, default=str), encoding="utf-8")
    typer.echo(f"\nreport: {output / 'report.html'}")


def _step(console: object, title: str) -> None:
    """A heading that reads the same in a terminal and in a log."""
    typer.echo(f"\n== {title}")
