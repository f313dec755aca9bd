"""``mlakit bench``: how fast the decode operator is on this machine."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from mlakit.cli.options import AsJson, DeviceOrBest
from mlakit.errors import UsageError


def bench(
    what: Annotated[str, typer.Argument(help="What to measure: decode.")],
    device: DeviceOrBest = None,
    heads: Annotated[
        str | None, typer.Option(help="Query head counts, e.g. 16,128; default: two sweeps.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Cached tokens, e.g. 1024,4096; default: two sweeps.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Sequences; default: 128 on a GPU, 4 on a CPU.")
    ] = None,
    queries: Annotated[
        str | None, typer.Option(help="New tokens per sequence, e.g. 1,2; default: two sweeps.")
    ] = None,
    varlen: Annotated[
        bool | None, typer.Option("--varlen/--fixed", help="Ragged or equal lengths.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16: queries and outputs.")
    ] = "bfloat16",
    page_size: Annotated[int, typer.Option(help="Tokens per page.")] = 64,
    kv_lora_rank: Annotated[int, typer.Option(help="Columns that are the value.")] = 512,
    qk_rope_head_dim: Annotated[int, typer.Option(help="Columns beside them.")] = 64,
    rope_scores: Annotated[
        bool, typer.Option("--rope-scores", help="Scores over those only, as equal-cache does.")
    ] = False,
    cache_format: Annotated[
        str | None, typer.Option(help="bf16, fp8, int8, int4 ...; default: the dtype's own.")
    ] = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option(help="Our implementation: cpu, triton, gluon, torch; repeatable."),
    ] = None,
    rivals: Annotated[bool, typer.Option(help="Measure other people's kernels too.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="Small shapes, few runs.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of lengths and numbers.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder for bench.json and roofline.png."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time MLA decode beside the machine's ceilings and its rivals.

    Every kernel is compared with float64 first and not timed if it is wrong; one of ours that is
    wrong makes the exit code 1.
    """
    from rich.console import Console

    from mlakit.benching import bench as measure
    from mlakit.benching.view import print_bench
    from mlakit.checkpoint import require_writable
    from mlakit.cli.progress import show_progress
    from mlakit.errors import MlakitError

    if output is not None:
        output = output.expanduser()
        require_writable(output)
    with show_progress() as progress:
        done = measure(
            what,
            device=device,
            heads=_integers("--heads", heads),
            lengths=_integers("--lengths", lengths),
            batch=batch,
            queries=_integers("--queries", queries),
            varlen=varlen,
            dtype=dtype,
            page_size=page_size,
            kv_lora_rank=kv_lora_rank,
            qk_rope_head_dim=qk_rope_head_dim,
            rope_scores=rope_scores,
            cache_format=cache_format,
            kernel=kernel,
            rivals=rivals,
            quick=quick,
            seed=seed,
            output=output,
            command=shlex.join(["mlakit", *sys.argv[1:]]),
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps(done.as_dict(), indent=2))
    else:
        print_bench(done, Console())
        if output is not None:
            typer.echo(f"picture: {output / 'roofline.png'}")
    if done.failures:
        raise MlakitError(
            f"wrong or broken, so without a figure: {'; '.join(done.failures[:3])}",
            remedy="run the tests of mlakit.ops on this machine",
        )


def _integers(option: str, text: str | None) -> list[int] | None:
    """Numbers between commas."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(
            f"{option} is {text!r}; it should be whole numbers between commas",
            remedy=f"{option} 16,128",
        ) from error
