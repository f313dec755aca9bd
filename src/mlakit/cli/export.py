"""``mlakit export``: a converted checkpoint for stock engines."""

from __future__ import annotations

from typing import Annotated

import typer

from mlakit.cli.options import Device


def export(
    model: Annotated[str, typer.Argument(help="Converted checkpoint: folder or hub id.")],
    output: Annotated[str, typer.Option("-o", "--output", help="Folder for the result, new.")],
    to: Annotated[
        str,
        typer.Option(
            help="transformers, transformers-code, vllm, vllm-transformers, sglang, tensorrt-llm,"
            " llama.cpp."
        ),
    ] = "transformers",
    pad: Annotated[
        bool,
        typer.Option(
            "--pad", help="Fill sizes up with zeros to those the engine takes; zeros are cached."
        ),
    ] = False,
    width: Annotated[
        int | None,
        typer.Option(min=1, help="Fill rank + rope up to this width, one that the engine takes."),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="What the result is checked on, PLACE or NAME=PLACE, repeatable."),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each text to read.")] = 2,
    device: Device = "cpu",
    report: Annotated[
        str | None,
        typer.Option(help="Report of mlakit eval SOURCE MODEL, for the model card's quality."),
    ] = None,
) -> None:
    """Write a converted checkpoint as other engines load it.

    That is the layout of DeepSeek-V3 or, for transformers-code and vllm-transformers, mlakit's with
    a file of modelling code. The result is loaded in transformers and compared before the folder
    appears.
    """
    from rich.console import Console

    from mlakit.engines.export import LOADS
    from mlakit.engines.export import export as run

    found = run(
        model,
        output,
        to=to,
        pad=pad,
        width=width,
        text=text or None,
        windows=windows,
        device=device,
        report=report,
    )
    shape, check, console = found.shape, found.check, Console()
    console.print(
        f"[bold]{output}[/bold]: rank {shape.rank} + rope {shape.rope}, heads of {shape.nope} +"
        f" {shape.rope} (keys) and {shape.value} (values)"
    )
    if shape.rank + shape.rope > found.width:
        console.print(
            f"caches {shape.rank + shape.rope} numbers per token and layer; the converted folder"
            f" {found.width:.4g}: the rest are zeros"
        )
    console.print(
        f"checked in transformers on {check.tokens} tokens: logits differ by"
        f" {check.one_pass.rms:.2g} of their deviation, KL {check.kl_mean:.2g} nats, same top"
        f" token {check.top1:.1%}"
    )
    console.print(f"next: {LOADS[to].replace('FOLDER', output)}", markup=False)
