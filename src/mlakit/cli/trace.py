"""``mlakit trace``: the shapes a token goes through in the attention layers of any model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16; default: the checkpoint's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Follow a token through attention, tensor by tensor.

    Shows every tensor's shape, meaning and bytes: of a text, then of one more token.
    """
    from mlakit.nn.journey import heat_map, tell

    journeys, tokens = _journeys(model, text, heads, device, dtype)
    if layer is not None:
        names = list(dict.fromkeys(journey.layer for journey in journeys))
        if layer >= len(names):
            raise UsageError(
                f"There is no layer {layer}: {model or 'the lesson'} has {len(names)} of them",
                remedy=f"use --layer 0 to {len(names) - 1}",
            )
        journeys = [journey for journey in journeys if journey.layer == names[layer]]
    if as_json:
        typer.echo(json.dumps(_as_dict(journeys, tokens, heads), indent=2, ensure_ascii=False))
        return
    _print(tell(journeys))
    if heads:
        for journey in journeys[: len({journey.layer for journey in journeys})]:
            typer.echo(f"\n{journey.layer}: who looks (lines) at whom (columns)")
            typer.echo(heat_map(journey, tokens))


def _journeys(
    model: str | None, text: str, heads: bool, device: str, dtype: str | None
) -> tuple[list[LayerJourney], list[str]]:
    """The journeys, and the tokens of the text."""
    from mlakit.nn.trace import trace_example, trace_model

    if model is None:
        return trace_example(keep_weights=heads).journeys, [f"token {k}" for k in range(6)]
    from mlakit.evaluation import open_subject

    subject = open_subject(model, dtype=dtype, device=device)
    tokenizer = subject.tokenizer
    token_ids = tokenizer(text)["input_ids"]
    if not token_ids:
        raise UsageError("--text holds no token", remedy='--text "Once upon a time"')
    tracker = trace_model(subject.model, token_ids, keep_weights=heads)
    return tracker.journeys, [str(tokenizer.decode([token])) for token in token_ids]


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
