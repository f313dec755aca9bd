"""``mlakit convert``: ordinary attention to latent attention, with a plan first."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlakit.cli.options import Device, Dtype
from mlakit.cli.progress import show_progress
from mlakit.conversion.amounts import CALIBRATION_TOKENS, WINDOW
from mlakit.conversion.goal import PARTS
from mlakit.engines.targets import TARGETS
from mlakit.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from mlakit.conversion.plan import ConversionPlan


def convert(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for the result.")
    ] = None,
    equal_cache: Annotated[
        bool, typer.Option("--equal-cache", help="Exact: same function, same cache bytes.")
    ] = False,
    form: Annotated[
        str, typer.Option(help="For --equal-cache: absorbed, or article (rotates later).")
    ] = "absorbed",
    cache_ratio: Annotated[
        float | None, typer.Option(help="Compress: share of its own cache to keep, e.g. 0.5.")
    ] = None,
    kv_lora_rank: Annotated[
        int | None, typer.Option(help="Compress: latent rank, instead of a ratio.")
    ] = None,
    qk_rope_head_dim: Annotated[
        int | None,
        typer.Option(
            help="Rotary dimensions kept; default: chosen with the ranks, on calibration text, and"
            " the head size with --kv-lora-rank, other methods and engines of fixed sizes."
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="Compress: the smallest cache that loses at most so many nats per token."
        ),
    ] = None,
    ranks: Annotated[
        str, typer.Option(help="One rank for all layers: even; each layer its own: measured; auto.")
    ] = "auto",
    cache_bits: Annotated[
        str,
        typer.Option(
            help="Of cached latents: 16 for the model's own dtype, 8, 4, or auto: with the sizes,"
            " on calibration text."
        ),
    ] = "16",
    engine: Annotated[
        str,
        typer.Option("--for", help=f"What it shall run in: {', '.join(TARGETS)}."),
    ] = "mlakit",
    method: Annotated[
        str, typer.Option(help="How to compress: mlakit, or transmla as published.")
    ] = "mlakit",
    without: Annotated[
        list[str] | None,
        typer.Option(help=f"A part of mlakit to leave out, repeatable: {', '.join(PARTS)}."),
    ] = None,
    refine_steps: Annotated[
        str,
        typer.Option(help="Gradient steps per layer after the algebra: a number, 0 or auto."),
    ] = "auto",
    freqfold: Annotated[
        str, typer.Option(help="For transmla: frequencies folded together, a number or auto.")
    ] = "auto",
    calib: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to calibrate with, PLACE or NAME=PLACE, repeatable: a text or JSONL file, a"
            " folder, a dataset, self (what the model writes); default: the package's own."
        ),
    ] = None,
    calib_tokens: Annotated[
        int, typer.Option(min=2, help="How many tokens of it all, at most.")
    ] = CALIBRATION_TOKENS,
    calib_window: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens of it read together, at most: the distance that losses are kept small at;"
            f" time grows with it. Default: the context up to {WINDOW}, less for little text.",
        ),
    ] = None,
    check: Annotated[
        list[str] | None,
        typer.Option(help="Text to measure the result on as well, as --calib; repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Chooses windows of a longer text.")] = 0,
    dtype: Dtype = None,
    device: Device = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the plan.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Turn a checkpoint's attention into latent attention (MLA).

    A run that was cut off goes on when it is started again.
    """
    from rich.console import Console

    from mlakit.conversion.apply import convert as run

    if output is None and not dry_run:
        raise UsageError("No output folder was given", remedy="add -o OUT, or --dry-run")
    goal: dict[str, Any] = {
        "equal_cache": equal_cache,
        "form": form,
        "cache_ratio": cache_ratio,
        "kv_lora_rank": kv_lora_rank,
        "qk_rope_head_dim": qk_rope_head_dim,
        "max_kl": max_kl,
        "ranks": ranks,
        "cache_bits": _number_or_auto("--cache-bits", cache_bits),
        "engine": engine,
        "method": method,
        "without": without or (),
        "refine_steps": _number_or_auto("--refine-steps", refine_steps),
        "freqfold": _number_or_auto("--freqfold", freqfold),
        "calibration": calib or None,
        "calibration_tokens": calib_tokens,
        "calibration_window": calib_window,
        "check": check or None,
        "seed": seed,
        "dtype": dtype,
        "device": device,
    }
    plan = run(model, output or "", **goal, dry_run=True)
    if not as_json:
        print_plan(plan, Console())
    if not dry_run:
        started, spent = time.monotonic(), dict[str, float]()
        plan = _carry_out(model, output or Path(), goal, spent)
        if not as_json:
            print_measured(plan, Console())
            parts = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in spent.items())
            whole = f"{time.monotonic() - started:.1f} s: {parts}{_peak(device)}"
            how = f"is complete ({whole})" if parts else "was complete already"
            typer.echo(f"{output} {how}. Next:")
            for words in (
                ("verify", model, str(output)),
                ("eval", model, str(output)),
                ("generate", str(output), "Once upon a time"),
            ):
                typer.echo(f"  {shlex.join(['mlakit', *words])}")
    if as_json:
        typer.echo(json.dumps(plan.as_dict("planned" if dry_run else "complete"), indent=2))


def _peak(device: str) -> str:
    """The most memory that was held, in words; pages of mapped files count. Unknown on Windows."""
    try:
        import resource
    except ImportError:
        return ""
    unit = 1 if sys.platform == "darwin" else 2**10
    most = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    words = f"; peak {most / 2**20:,.0f} MiB, mapped files included"
    if device.startswith("cuda"):
        import torch

        words += f", and {torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB of the GPU's"
    return words


def _number_or_auto(option: str, value: str) -> int | str:
    if value != "auto" and not value.isdecimal():
        raise UsageError(f"{option} {value!r} is neither a number nor auto")
    return value if value == "auto" else int(value)


def _carry_out(
    model: str, output: Path, goal: dict[str, Any], spent: dict[str, float]
) -> ConversionPlan:
    """The conversion with progress on stderr; Ctrl-C says how to go on.

    Seconds by stage go to ``spent``.
    """
    from mlakit.conversion.apply import convert as run

    try:
        with show_progress(spent) as progress:
            return run(model, output, **goal, progress=progress)
    except KeyboardInterrupt:
        typer.echo(
            "interrupted; finished layers are kept. To go on:\n  "
            + shlex.join(["mlakit", *sys.argv[1:]]),
            err=True,
        )
        raise typer.Exit(130) from None


def print_plan(plan: ConversionPlan, console: Console) -> None:
    """A plan in a few lines, with what it needs."""
    from mlakit.conversion.card import cached_by, domain_list, size_words

    source, most = plan.source_layer, "at most " if plan.open else ""
    cached = plan.most_cached
    _line(
        console,
        "attention",
        f"{source.kind.upper()}, {source.num_attention_heads} heads on {cached_by(source)},"
        f" {len(plan.layers)} layers",
    )
    _line(console, "becomes", f"MLA ({plan.target.mla_form}), {size_words(plan)}")
    _line(
        console,
        "cache per token",
        f"{plan.source_cache_bytes:,} -> {most}{cached:,} bytes:"
        f" {cached / plan.source_cache_bytes:.1%} of its own,"
        f" {cached / plan.mha_cache_bytes:.1%} of MHA",
    )
    growth = plan.nbytes / plan.source_nbytes - 1
    _line(
        console,
        "written",
        f"{most}{plan.nbytes:,} bytes ({growth:+.1%} of the source's) in {plan.shards} shards,"
        f" {plan.dtype}",
    )
    if plan.calibration is not None:
        texts = plan.calibration
        _line(
            console,
            "calibration",
            f"{domain_list(texts.domains)}; windows of {texts.window} tokens, up to"
            f" {texts.tokens:,} tokens",
        )
        if texts.checks:
            _line(console, "checked on", domain_list(texts.checks))
    need = plan.estimate
    _line(
        console,
        "needs about",
        f"{need.memory_bytes / 2**20:,.0f} MiB of working memory,"
        f" {need.disk_bytes / 2**20:,.0f} MiB of disk, {need.seconds:,.0f} s",
    )
    for warning in plan.warnings:
        console.print(f"note: {warning}", highlight=False, soft_wrap=not console.is_terminal)


def print_measured(plan: ConversionPlan, console: Console) -> None:
    """What a conversion chose and kept."""
    from mlakit.conversion.card import findings

    for name, value in findings(plan):
        _line(console, name, value)


def _line(console: Console, name: str, value: str) -> None:
    """One row; where there is no terminal it stays one line."""
    from rich.text import Text

    row = Text.assemble((f"{name:<17}", "bold"), value)
    console.print(row, soft_wrap=not console.is_terminal)
