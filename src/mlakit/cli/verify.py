"""``mlakit verify``: does a result do what its source does?"""

from __future__ import annotations

from typing import Annotated

import typer

from mlakit.cli.options import AsJson, Device, Dtype, Text


def verify(
    source: Annotated[str, typer.Argument(help="Checkpoint folder or hub id: the source.")],
    result: Annotated[str, typer.Argument(help="Its conversion.")],
    max_kl: Annotated[
        float | None, typer.Option(help="Largest mean KL allowed, nats per token; else exit 4.")
    ] = None,
    text: Text = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each text to read.")] = 2,
    device: Device = "cpu",
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Check that a result keeps what its conversion promised.

    Compares logits in one pass and through the cache; exit code 4 when a promise is broken.
    """
    from rich.console import Console

    from mlakit.evaluation import check
    from mlakit.reporting.table import print_verification

    found = check(
        source,
        result,
        max_kl=max_kl,
        text=text or None,
        windows=windows,
        device=device,
        dtype=dtype,
    )
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        print_verification(found, Console())
    found.require()
