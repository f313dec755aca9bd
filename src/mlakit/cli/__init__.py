"""The command line: one thin file per verb; here the app, its errors and exit codes.

Exit codes: 0 done, 1 failed, 2 usage, 3 unsupported model, 4 verification below threshold,
130 interrupted.
"""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path
from typing import Annotated

import typer

from mlakit import __version__
from mlakit.cli import convert, demo, doctor, eval, generate, inspect, trace, verify
from mlakit.errors import MlakitError, UsageError

app = typer.Typer(
    name="mlakit",
    help="Multi-head Latent Attention for any checkpoint: look, convert, verify, generate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (inspect, convert, verify, eval, generate, trace, demo, doctor):
    name = verb.__name__.rpartition(".")[2]
    app.command(name)(getattr(verb, name))


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file: one table per verb, keys as the long options."),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Show tracebacks; allowed anywhere.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Options that come before the verb and mean the same for all."""
    if version:
        typer.echo(f"mlakit {__version__}")
        raise typer.Exit()
    if config is not None:
        context.default_map = _read_config(config)


def _read_config(path: Path) -> dict[str, dict[str, object]]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"Cannot read --config {path}: {error}") from error
    verbs = {command.name for command in app.registered_commands}
    for name, table in tables.items():
        if name not in verbs or not isinstance(table, dict):
            raise UsageError(
                f"--config {path}: '{name}' is not a table named after a verb",
                remedy=f"use [{'] ['.join(sorted(v for v in verbs if v))}]",
            )
    return {
        name: {key.replace("-", "_"): value for key, value in table.items()}
        for name, table in tables.items()
    }


def main() -> None:
    """Entry point of the ``mlakit`` command."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars; ours is mlakit.cli.progress
    arguments = [item for item in sys.argv[1:] if item not in ("-v", "--verbose")]
    verbose = len(arguments) < len(sys.argv) - 1
    try:
        app(arguments)
    except MlakitError as error:
        if verbose:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except SystemExit as ending:
        # typer turns Ctrl-C into Abort and leaves with 1, which here means a failure
        if isinstance(ending.__context__, typer.Abort):
            sys.exit(130)
        raise
    except BrokenPipeError:  # the reader of our output (head, less) went away
        sys.exit(0)
