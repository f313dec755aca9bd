"""``mlakit eval``: quality, recall, cache bytes and, when asked, tasks and speed."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from mlakit.cli.options import (
    CacheFormat,
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


def eval(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id: the source.")],
    result: Annotated[
        str | None, typer.Argument(help="A second checkpoint to compare, e.g. its conversion.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder for report.html, report.json and pictures."),
    ] = None,
    text: Text = None,
    prefix_length: PrefixLength = None,
    suffix_length: SuffixLength = None,
    windows: WindowsScored = 8,
    recall: Recall = True,
    speed: Annotated[bool, typer.Option("--speed", help="Also time prefill and decode.")] = False,
    tasks: Tasks = None,
    limit: Limit = None,
    shots: Shots = None,
    samples: Annotated[
        int, typer.Option(min=1, help="humaneval: programs per problem, for pass@k.")
    ] = 1,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, help="humaneval: of the samples; default: 0 for one, else 0.8."),
    ] = None,
    chat: Chat = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Tasks: prompts at a time.")] = 8,
    run_generated_code: RunGeneratedCode = False,
    before: Annotated[
        Path | None,
        typer.Option(
            help="Tasks: report folder of the result before healing, to stand beside this one."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Continue this side by side; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of probes and intervals.")] = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    cache_format: CacheFormat = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Measure quality, recall and cache bytes, alone or side by side; also tasks and speed.

    Quality is that of a continuation after a cached prefix.
    """
    from rich.console import Console

    from mlakit.checkpoint import require_writable
    from mlakit.cli.progress import show_progress
    from mlakit.evaluation import evaluate
    from mlakit.reporting.folder import write_report
    from mlakit.reporting.table import print_report

    if output is not None:
        output = output.expanduser()
        require_writable(output)
    try:
        with show_progress() as progress:
            report = evaluate(
                model,
                result,
                text=text or None,
                prefix_length=prefix_length,
                suffix_length=suffix_length,
                windows=windows,
                recall=recall,
                speed=speed,
                tasks=tasks or (),
                limit=limit,
                shots=shots,
                samples=samples,
                temperature=temperature,
                chat=chat,
                batch_size=batch_size,
                run_generated_code=run_generated_code,
                generations=output and output / "tasks" if tasks else None,
                before=before,
                prompts=prompt,
                seed=seed,
                device=device,
                dtype=dtype,
                cache_format=cache_format,
                command=shlex.join(["mlakit", *sys.argv[1:]]),
                progress=progress,
            )
    except KeyboardInterrupt:
        if output is not None and tasks:
            again = shlex.join(["mlakit", *sys.argv[1:]])
            typer.echo(f"interrupted; answers to tasks are kept. To go on:\n  {again}", err=True)
        raise typer.Exit(130) from None
    if output is not None:
        write_report(report, output)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        print_report(report, Console())
        if output is not None:
            typer.echo(f"report: {output / 'report.html'}")
