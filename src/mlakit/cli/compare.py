"""``mlakit compare``: every way to shrink a model's cache, with its bytes and its quality."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from mlakit.cli.options import (
    Chat,
    Device,
    Dtype,
    Limit,
    PrefixLength,
    Recall,
    RunGeneratedCode,
    Shots,
    SuffixLength,
    Tasks,
    Text,
    WindowsScored,
)
from mlakit.errors import UsageError


def compare(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder for compare.html, compare.json and points."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Names between commas; default: all but mla-refined, which takes many minutes."
            " --dry-run lists them."
        ),
    ] = None,
    budgets: Annotated[
        str, typer.Option(help="Shares of the model's own cache, between commas.")
    ] = "0.5,0.25,0.125",
    text: Text = None,
    calib: Annotated[
        list[str] | None,
        typer.Option(help="Text for methods that calibrate, as --text; default: the package's."),
    ] = None,
    prefix_length: PrefixLength = None,
    suffix_length: SuffixLength = None,
    windows: WindowsScored = 8,
    recall: Recall = True,
    speed: Annotated[bool, typer.Option(help="Time decoding and the first token.")] = True,
    train_steps: Annotated[
        int,
        typer.Option(
            min=0,
            help="Gradient steps for what exists only trained (MLKV, YOCO, linear attention, RWKV,"
            " Mamba), e.g. 200; 0 gives their sizes alone.",
        ),
    ] = 0,
    tasks: Tasks = None,
    limit: Limit = None,
    shots: Shots = None,
    chat: Chat = False,
    run_generated_code: RunGeneratedCode = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all that is random.")] = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Every way to shrink this model's KV cache, in one table and one picture.

    Answers two questions: the smallest cache within 1 % of the original, and the best quality at
    your budget. A run that was cut off goes on when it is started again.
    """
    from mlakit.checkpoint import require_writable
    from mlakit.cli.progress import show_progress
    from mlakit.comparison import Plan
    from mlakit.comparison import compare as run

    if output is None and not dry_run:
        raise UsageError("No output folder was given", remedy="add -o OUT, or --dry-run")
    folder = (output or Path()).expanduser()
    if not dry_run:
        require_writable(folder)
    again = shlex.join(["mlakit", *sys.argv[1:]])
    try:
        with show_progress() as progress:
            found = run(
                model,
                folder,
                methods=None if methods is None else _items(methods),
                budgets=_shares(budgets),
                text=text or None,
                calibration=calib or None,
                prefix_length=prefix_length,
                suffix_length=suffix_length,
                windows=windows,
                recall=recall,
                speed=speed,
                train_steps=train_steps,
                tasks=tasks or (),
                limit=limit,
                shots=shots,
                chat=chat,
                run_generated_code=run_generated_code,
                seed=seed,
                dtype=dtype,
                device=device,
                dry_run=dry_run,
                command=again,
                progress=progress,
            )
    except KeyboardInterrupt:
        typer.echo(f"interrupted; finished points are kept. To go on:\n  {again}", err=True)
        raise typer.Exit(130) from None
    if isinstance(found, Plan):
        _show_plan(found, as_json)
        return
    from rich.console import Console

    from mlakit.reporting.comparison_page import PAGE_NAME, write_comparison
    from mlakit.reporting.comparison_rows import print_comparison

    write_comparison(found, folder)
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
    else:
        print_comparison(found, Console())
        typer.echo(f"report: {folder / PAGE_NAME}")


def _show_plan(plan: object, as_json: bool) -> None:
    """Methods, their settings and what they do not reproduce."""
    import json

    from mlakit.comparison import Plan

    assert isinstance(plan, Plan)
    rows = [
        {
            "method": method.name,
            "title": method.title,
            "settings": [setting.label for setting in settings],
            "differs": method.differs,
        }
        for method, settings in plan.steps
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    width = max(len(row["method"]) for row in rows)
    for row in rows:
        settings = ", ".join(row["settings"]) or "no setting for this model"
        typer.echo(f"{row['method']:{width}} {row['title']} ({settings})")
        typer.echo(f"{'':{width}} {row['differs']}")


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _shares(text: str) -> list[float]:
    try:
        return [float(item) for item in _items(text)]
    except ValueError:
        raise UsageError(
            f"--budgets {text}: not numbers", remedy="give shares: 0.5,0.25,0.125"
        ) from None
