"""The command line: one thin file per verb; here the app, its errors and exit codes.

Exit codes: 0 done, 1 failed, 2 usage, 3 unsupported model, 4 verification below threshold,
130 interrupted.
"""

from __future__ import annotations

import os
import sys
import tomllib
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from mlakit import __version__
from mlakit.cli import (
    bench,
    compare,
    convert,
    demo,
    doctor,
    eval,
    export,
    generate,
    heal,
    inspect,
    prove,
    serve,
    trace,
    verify,
)
from mlakit.errors import MlakitError, UsageError

app = typer.Typer(
    name="mlakit",
    help="Multi-head Latent Attention for any checkpoint: look, convert, verify, heal, serve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (
    *(inspect, convert, verify, heal, eval, compare, export, generate, serve),
    *(bench, trace, prove, demo, doctor),
):
    name = verb.__name__.rpartition(".")[2]
    app.command(name)(getattr(verb, name))


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML file: one table per verb, keys as the long options; allowed anywhere."
        ),
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
        context.default_map = _read_config(config, context.command)


def _read_config(path: Path, group: Any) -> dict[str, dict[str, object]]:
    """Options of verbs by parameter name, from a file that spells them as the command line."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"Cannot read --config {path}: {error}") from error
    options: dict[str, dict[str, object]] = {}
    for verb, table in tables.items():
        if verb not in group.commands or not isinstance(table, dict):
            raise UsageError(
                f"--config {path}: '{verb}' is not a table named after a verb",
                remedy=f"use [{'] ['.join(sorted(group.commands))}]",
            )
        names = {
            option.lstrip("-"): parameter.name
            for parameter in group.commands[verb].params
            for option in parameter.opts
            if option.startswith("--")
        }
        given = {key.replace("_", "-"): value for key, value in table.items()}
        for key in given.keys() - names.keys():
            raise UsageError(
                f"--config {path}: [{verb}] has no option '{key}'",
                remedy=f"use one of {', '.join(names)}",
            )
        options[verb] = {names[key]: value for key, value in given.items()}
    return options


def main() -> None:
    """Entry point of the ``mlakit`` command."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars; ours is mlakit.cli.progress
    given = [item for item in sys.argv[1:] if item not in ("-v", "--verbose")]
    verbose = len(given) < len(sys.argv) - 1
    try:
        app(_config_first(given))
    except MlakitError as error:
        _fail(str(error), error.exit_code, verbose)
    except SystemExit as ending:
        # typer turns Ctrl-C into Abort and leaves with 1, which here means a failure
        if isinstance(ending.__context__, typer.Abort):
            sys.exit(130)
        raise
    except BrokenPipeError:  # the reader of our output (head, less) went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        sys.exit(0)
    except Exception as error:
        message = f"unexpected {type(error).__name__}: {error}"
        _fail(f"{message}\nRemedy: run it again with -v to see where it happened", 1, verbose)


def _config_first(arguments: list[str]) -> list[str]:
    """The same arguments with --config FILE before the verb, wherever it was written."""
    for place, item in enumerate(arguments):
        if item == "--":
            break
        if item == "--config" or item.startswith("--config="):
            end = place + (2 if item == "--config" else 1)
            return arguments[place:end] + arguments[:place] + arguments[end:]
    return arguments


def _fail(message: str, exit_code: int, verbose: bool) -> None:
    """One clear error on stderr, after the traceback if it was asked for."""
    if verbose:
        traceback.print_exc()
    typer.echo(f"error: {message}", err=True)
    sys.exit(exit_code)
