"""``mlakit generate``: text from a checkpoint, streamed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from mlakit.cli.options import AsJson, CacheFormat, Device, Dtype
from mlakit.errors import UsageError


def generate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    prompt: Annotated[
        list[str] | None, typer.Argument(help="One or more prompts; '-' reads standard input.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="One prompt per line, blank lines left out.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write per prompt.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from this share of probability.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from so many tokens; 0: all.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string; repeatable.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Wrap prompts in the chat template.")
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Prompts at a time; default: all together.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    cache_format: CacheFormat = None,
    as_json: AsJson = False,
) -> None:
    """Write text with a converted or an ordinary checkpoint."""
    from mlakit.api import generate as write

    prompts = _prompts(prompt or [], prompt_file)
    streaming = not as_json and len(prompts) == 1
    pieces: list[str] = []

    def stream(row: int, piece: str) -> None:
        if not pieces:  # not before the model is there: an error stands alone
            typer.echo(prompts[0], nl=False)
        pieces.append(piece)
        typer.echo(piece, nl=False)

    result = write(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop=tuple(stop or ()),
        chat=chat,
        batch_size=batch_size,
        seed=seed,
        device=device,
        dtype=dtype,
        cache_format=cache_format,
        on_text=stream if streaming else None,
    )
    if as_json:
        typer.echo(json.dumps(result.as_dict(prompts), indent=2, ensure_ascii=False))
        return
    if streaming:
        typer.echo("" if pieces else prompts[0])
    else:
        for number, (start, text) in enumerate(zip(prompts, result.texts), 1):
            typer.echo(f"[{number}] {start}{text}")
    typer.echo(result.summary(), err=True)


def _prompts(arguments: list[str], file: Path | None) -> list[str]:
    if arguments and file is not None:
        raise UsageError("Prompts were given both as arguments and with --prompt-file")
    if file is not None:
        try:
            lines = file.expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"Cannot read --prompt-file {file}: {error}") from error
        prompts = [line for line in lines if line.strip()]
    else:
        prompts = [
            sys.stdin.read().removesuffix("\n") if item == "-" else item for item in arguments
        ]
    if not prompts:
        raise UsageError("No prompt was given", remedy='mlakit generate MODEL "Once upon a time"')
    return prompts
