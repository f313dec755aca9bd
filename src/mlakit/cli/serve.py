"""``mlakit serve``: an OpenAI-compatible server."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from mlakit.cli.options import CacheFormat, DeviceOrBest, Dtype
from mlakit.errors import MlakitError, UsageError


def serve(
    model: Annotated[str, typer.Argument(help="Converted checkpoint: folder or hub id.")],
    engine_options: Annotated[
        list[str] | None, typer.Argument(help="After --: options of vLLM itself.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(help="Key that /v1 asks for; better: the variable MLAKIT_API_KEY."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What requests call the model; default: the folder's name.")
    ] = None,
    max_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences written at once; default: 32.")
    ] = None,
    cache_memory: Annotated[
        str | None,
        typer.Option(help="For the cache: 2GiB, or a share of the free memory: 0.5 or 50%."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a prompt with its text; default: the context."),
    ] = None,
    max_waiting: Annotated[
        int | None, typer.Option(min=1, help="Sequences that may wait; default: 256.")
    ] = None,
    max_body: Annotated[
        str | None, typer.Option(help="Size of a request's body; default: 4MiB.")
    ] = None,
    cache_format: CacheFormat = None,
    dtype: Dtype = None,
    device: DeviceOrBest = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="File with a Jinja template, instead of the tokenizer's.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Site whose pages may use the server; repeatable; '*': all."),
    ] = None,
    drain_timeout: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds that requests have to end after SIGTERM; default: 30."),
    ] = None,
    engine: Annotated[str, typer.Option(help="mlakit, or vllm to hand over to it.")] = "mlakit",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only check; print what the cache holds, or the command."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --dry-run: print one JSON object.")
    ] = False,
) -> None:
    """Serve a converted checkpoint to OpenAI clients, many requests at once.

    /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics, /openapi.json.
    """
    options = {name: value for name, value in locals().items() if name not in NOT_OPTIONS}
    from mlakit.serving.http.serve import serve as run

    if as_json and not dry_run:
        raise UsageError("--json is for --dry-run", remedy="a request's JSON is in the log anyway")
    try:
        with log_to_stderr():
            found = run(
                model,
                engine_options=engine_options or (),
                dry_run=dry_run,
                **options | {"cors_origin": cors_origin or ()},
            )
    except ModuleNotFoundError as error:
        raise MlakitError(
            f"{error.name} is not installed, and serve needs it",
            remedy="pip install 'mlakit[serve]'",
        ) from error
    if found is not None:
        typer.echo(json.dumps(found.as_dict(), indent=2) if as_json else str(found))


NOT_OPTIONS = ("model", "engine_options", "dry_run", "as_json")


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """The server's own lines and one line of JSON per request."""
    handler, logger = logging.StreamHandler(), logging.getLogger("mlakit")
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
