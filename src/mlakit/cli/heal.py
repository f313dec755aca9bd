"""``mlakit heal``: train what a conversion changed, against the original."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlakit.errors import UsageError
from mlakit.healing.recipe import PARTS, RECIPES, Recipe

if TYPE_CHECKING:
    from rich.console import Console

    from mlakit.healing.forecast import Forecast
    from mlakit.healing.report import HealReport

USUAL = Recipe()


def heal(
    student: Annotated[str, typer.Argument(help="Converted checkpoint: folder or hub id.")],
    teacher: Annotated[str, typer.Option(help="Its original: folder or hub id.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for the result.")
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help=f"Settings to begin with: {', '.join(RECIPES)} (the TransMLA article's data and"
            " settings; reasoning traces of DeepSeek-R1)."
        ),
    ] = "default",
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to train on, PLACE or NAME=PLACE, repeatable: a text or JSONL file, a"
            " folder, a dataset NAME[:CONFIGURATION[:SPLIT[:COLUMN]]]."
        ),
    ] = None,
    weights: Annotated[
        list[float] | None, typer.Option(help="Share of each --data, in the same order.")
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to measure on, as --data; default: the end of every training text."
        ),
    ] = None,
    completion_only: Annotated[
        bool | None, typer.Option(help="Only completions count in the loss.")
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(
            help=f"What trains: {', '.join(PARTS)}; default: {USUAL.train}, the key/value path."
        ),
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help=f"For --train lora; default: {USUAL.lora_rank}.")
    ] = None,
    ce_weight: Annotated[
        float | None,
        typer.Option(help=f"Weight of the next-token loss; default: {USUAL.ce_weight:g}."),
    ] = None,
    kl_weight: Annotated[
        float | None,
        typer.Option(
            help=f"Weight of the KL divergence from the original; default: {USUAL.kl_weight:g}."
        ),
    ] = None,
    layer_weight: Annotated[
        float | None,
        typer.Option(
            help=f"Weight of the error of attention outputs; default: {USUAL.layer_weight:g}."
        ),
    ] = None,
    layer_steps: Annotated[
        int | None, typer.Option(help="First steps that only match attention outputs.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help=f"Of the KL; default: {USUAL.temperature:g}.")
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="KL over the original's top tokens alone; default: 0, over all."),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="One for all weights; default: by the size of each weight."),
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help=f"AdamW's; default: {USUAL.weight_decay:g}.")
    ] = None,
    warmup: Annotated[
        float | None,
        typer.Option(
            help=f"Share of the steps in which the rate rises; default: {USUAL.warmup:g}."
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help=f"Windows per step, in all; default: {USUAL.batch}.")
    ] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(help="Windows at a time in one process; default: about 8,192 tokens."),
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens per window; default: the context, at most 2048.")
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help=f"Passes over the data; default: {USUAL.epochs:g}.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps, instead of epochs.")] = None,
    checks: Annotated[
        int | None,
        typer.Option(help=f"How often it is measured and saved; default: {USUAL.checks}."),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(help=f"Checks without a gain before it stops; default: {USUAL.patience}."),
    ] = None,
    held_out_windows: Annotated[
        int | None,
        typer.Option(help=f"Windows to measure on; default: {USUAL.held_out_windows}."),
    ] = None,
    checkpointing: Annotated[
        bool | None, typer.Option(help="Recompute activations: less memory, more time.")
    ] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Also train the original itself likewise.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option(help=f"Order of the windows; default: {USUAL.seed}.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="To compute in: float32, bfloat16; default: bfloat16 on a GPU."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; CUDA_VISIBLE_DEVICES chooses.")] = "cpu",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check all inputs; print memory, time, cost.")
    ] = False,
    price_per_hour: Annotated[
        float | None, typer.Option(help="Of the machine, for the cost.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Heal a conversion by a short training against its original.

    A run that was cut off goes on when it is started again. Several processes share the work
    under accelerate launch -m mlakit heal ...
    """
    given = {name: value for name, value in locals().items() if name not in NOT_SETTINGS}
    if output is None and not dry_run:
        raise UsageError("No output folder was given", remedy="add -o OUT, or --dry-run")
    from rich.console import Console

    from mlakit.healing.forecast import Forecast
    from mlakit.healing.run import heal as run

    shows = os.environ.get("RANK", "0") == "0"
    told = Told(price_per_hour) if shows else None
    try:
        found = run(
            student,
            output,
            teacher=teacher,
            recipe=recipe,
            held_out=held_out or None,
            control=control,
            device=device,
            dry_run=dry_run,
            price_per_hour=price_per_hour,
            told=told,
            **given,
        )
    except KeyboardInterrupt:
        typer.echo(
            "interrupted; checkpoints are kept. To go on:\n  "
            + shlex.join(["mlakit", *sys.argv[1:]]),
            err=True,
        )
        raise typer.Exit(130) from None
    except Exception as error:
        _give_way(error)
        raise
    if not shows:
        return
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
    elif isinstance(found, Forecast):
        print_forecast(found, Console())
    else:
        print_report(found, Console())
        typer.echo(f"{output} is complete: heal.png shows the curves. Next:")
        for words in (
            ("eval", teacher, str(output)),
            ("generate", str(output), "Once upon a time"),
        ):
            typer.echo(f"  {shlex.join(['mlakit', *words])}")


def _give_way(error: Exception) -> None:
    """Of several processes with one fault lets one speak: the launcher ends the others meanwhile.

    The first process says what happened to all, any other one what happened to it alone; what
    follows from another's end is said where no launcher sees that, as on other machines.
    """
    from mlakit.healing.arm import OtherProcessEnded

    rank = os.environ.get("RANK", "0")
    if rank != "0" or isinstance(error, OtherProcessEnded):
        time.sleep(GRACE)


GRACE = 20.0
"""Seconds in which a process that has said its word ends and its launcher takes notice."""

NOT_SETTINGS = (
    *("student", "teacher", "output", "recipe", "held_out", "control", "device", "dry_run"),
    *("price_per_hour", "as_json"),
)


class Told:
    """Progress on stderr: a line per check and event, and on a terminal one that moves."""

    def __init__(self, price_per_hour: float | None) -> None:
        self.price_per_hour = price_per_hour
        self.terminal = sys.stderr.isatty()
        self.first: dict[str, Any] | None = None
        self.steps = 0

    def __call__(self, row: dict[str, Any]) -> None:
        """Shows a row of the log."""
        if row["kind"] == "plan":
            self.first, self.steps = None, row["steps"]
        elif row["kind"] == "step":
            self.first = self.first or row
            if self.terminal:
                sys.stderr.write(f"\r\033[K{row['arm']} {self._step(row)}")
                sys.stderr.flush()
        else:
            start = "\r\033[K" if self.terminal else ""
            sys.stderr.write(f"{start}{self._words(row)}\n")

    def _words(self, row: dict[str, Any]) -> str:
        from mlakit.healing.report import event_in_words

        if row["kind"] == "event":
            return f"note: {event_in_words(row)}"
        if row["kind"] == "stop":
            return f"{row['arm']} step {row['step']}: {row['why']}"
        return (
            f"{row['arm']} {self._step(row)}  held-out perplexity {row['perplexity']:.4f},"
            f" KL {row['kl']:.4f}"
        )

    def _step(self, row: dict[str, Any]) -> str:
        words = f"step {row['step']}/{self.steps}"
        if "loss" in row:
            words += f"  loss {row['loss']:.4f}"
        first = self.first
        if first is None or row["step"] == first["step"]:
            return words
        seconds = max(row["seconds"] - first["seconds"], 1e-6)
        speed = (row["tokens"] - first["tokens"]) / seconds
        left = seconds / (row["step"] - first["step"]) * (self.steps - row["step"])
        words += f"  {speed:,.0f} tokens/s  left {_clock(left)}"
        if self.price_per_hour is not None:
            cost = (row["seconds"] + left) * self.price_per_hour / 3600
            words += f"  cost {cost:,.2f} in all"
        return words


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:,.0f} MiB"


def print_forecast(found: Forecast, console: Console) -> None:
    """What a run will take, in a few lines."""
    processes, micro, accumulation = found.batch
    texts = "; ".join(f"{name}: {n:,} windows, {t:,} tokens count" for name, n, t in found.texts)
    program = f", the program itself {_size(found.program_bytes)}" if found.program_bytes else ""
    lines = [
        ("data", f"{texts}; windows of {found.window_length:,} tokens"),
        ("trains", f"{found.trained:,} of {found.parameters:,} parameters"),
        (
            "steps",
            f"{found.steps:,} of {processes} x {micro} x {accumulation} windows (processes, at a"
            f" time, accumulated): {found.tokens:,} tokens",
        ),
        (
            "memory",
            f"about {_size(found.memory_bytes)} per process: weights {_size(found.weights_bytes)},"
            f" optimiser {_size(found.optimiser_bytes)},"
            f" activations {_size(found.activation_bytes)}{program};"
            f" {_size(found.available_bytes)} are free",
        ),
        ("time", f"about {_clock(found.seconds)} from a few steps on this device"),
    ]
    if found.price is not None:
        lines.append(("cost", f"about {found.price:,.2f}"))
    lines += [("note", warning) for warning in found.warnings]
    for name, value in lines:
        _line(console, name, value)


def print_report(report: HealReport, console: Console) -> None:
    """What was gained, in a table."""
    from rich.table import Table

    from mlakit.healing.report import (
        NOTHING_GAINED,
        cache_in_words,
        losses_in_words,
        rates_in_words,
    )

    healed = report.healed
    _line(console, "trained", f"{healed.trained:,} of {healed.parameters:,} parameters")
    _line(console, "losses", losses_in_words(report.recipe))
    _line(console, "learning rate", rates_in_words(healed.rates))
    _line(console, "ended", f"step {healed.steps}, {healed.seconds:.0f} s: {healed.stopped}")
    if report.raised_norm is not None:
        _line(console, "latent norm", f"its epsilon was raised to 4^{report.raised_norm}")
    if report.cache_share is not None:
        _line(console, "cache", cache_in_words(report.cache_share).removeprefix("It caches "))
    table = Table(box=None, pad_edge=False)
    for column in ("model", "perplexity", "KL, nats", "tokens trained"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, perplexity, kl, tokens in report.rows():
        table.add_row(name, f"{perplexity:.4f}", f"{kl:.4f}", f"{tokens:,}")
    console.print(table)
    held_out = report.held_out
    _line(
        console,
        "measured on",
        f"{held_out['windows']} windows of {held_out['text']}, {held_out['suffix_length']} tokens"
        f" after a cached prefix of {held_out['prefix_length']}",
    )
    if report.nothing_gained:
        _line(console, "result", f"{NOTHING_GAINED}; try more --steps, or another --learning-rate")


def _line(console: Console, name: str, value: str) -> None:
    """One row; where there is no terminal it stays one line."""
    from rich.text import Text

    row = Text.assemble((f"{name:<15}", "bold"), value)
    console.print(row, soft_wrap=not console.is_terminal)
