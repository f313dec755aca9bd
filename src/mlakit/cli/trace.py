"""``mlakit trace``: the shapes a token goes through in the attention layers of any model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlakit.cli.options import AsJson, Device, Dtype, png
from mlakit.errors import UsageError

if TYPE_CHECKING:
    from mlakit.nn.journey import LayerJourney


def trace(
    model: Annotated[
        str | None,
        typer.Argument(help="Checkpoint folder or hub id; default: the lesson, 128 → 4×32 → 128."),
    ] = None,
    text: Annotated[str, typer.Option(help="What the model reads.")] = "Once upon a time",
    layer: Annotated[
        int | None, typer.Option(min=0, help="Only this layer; default: all, alike ones once.")
    ] = None,
    heads: Annotated[
        bool, typer.Option("--heads", help="Show what every head looks at; for short texts.")
    ] = False,
    picture: Annotated[
        Path | None,
        typer.Option(
            callback=png, help="Draw what every head looks at, a PNG file; with --layer larger."
        ),
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Follow a token through attention, tensor by tensor.

    Shows every tensor's shape, meaning and bytes: of a text, then of one more token.
    """
    from mlakit.api import trace as read
    from mlakit.nn.journey import heat_map, tell

    wanted = heads or picture is not None
    journeys, tokens = read(model, text, heads=wanted, device=device, dtype=dtype)
    if layer is not None:
        names = list(dict.fromkeys(journey.layer for journey in journeys))
        if layer >= len(names):
            raise UsageError(
                f"There is no layer {layer}: {model or 'the lesson'} has {len(names)} of them",
                remedy=f"use --layer 0 to {len(names) - 1}",
            )
        journeys = [journey for journey in journeys if journey.layer == names[layer]]
    texts = journeys[: len({journey.layer for journey in journeys})]
    if picture is not None:
        from mlakit.reporting.files import write_file
        from mlakit.reporting.heads import draw_heads
        from mlakit.reporting.style import as_png

        write_file(picture, as_png(draw_heads(texts, tokens)))
    if as_json:
        typer.echo(json.dumps(_as_dict(journeys, tokens, heads), indent=2, ensure_ascii=False))
        return
    _print(tell(journeys))
    if heads:
        for journey in texts:
            typer.echo(f"\n{journey.layer}: who looks (lines) at whom (columns)")
            typer.echo(heat_map(journey, tokens))


def _as_dict(journeys: list[LayerJourney], tokens: list[str], heads: bool) -> dict[str, Any]:
    found = [journey.as_dict() for journey in journeys]
    if heads:
        for entry, journey in zip(found, journeys, strict=True):
            weights = journey.weights
            entry["weights"] = None if weights is None else weights.float().tolist()
    return {"tokens": tokens, "journeys": found}


def _print(text: str) -> None:
    """Coloured on a terminal, plain elsewhere."""
    from rich.console import Console
    from rich.text import Text

    styled = Text(text)
    styled.highlight_regex(r"(?m)^\S.*: \d+ tokens?.*$", "bold")
    styled.highlight_regex(r"\(\d+(, \d+)+,?\)", "cyan")
    styled.highlight_regex(r"(?m)^\(\d\)", "bold green")
    styled.highlight_regex(r"\d+( × \d+)? → \d+( × \d+)?( → \d+)?", "bold magenta")
    styled.highlight_regex(r"(?m)^cached: .*\n.*$", "yellow")
    Console(highlight=False).print(styled, soft_wrap=True)
