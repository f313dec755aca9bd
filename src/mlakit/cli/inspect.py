"""``mlakit inspect``: what a checkpoint costs, from its config and headers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mlakit.cli.options import AsJson, png


def inspect(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    context: Annotated[
        int | None, typer.Option(help="Tokens per sequence; default: the model's longest.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences decoded together.")] = 1,
    memory: Annotated[str, typer.Option(help="Memory for weights and cache.")] = "24GiB",
    kv_lora_rank: Annotated[
        int | None, typer.Option(help="Show latent attention of this rank too.")
    ] = None,
    qk_rope_head_dim: Annotated[
        int | None, typer.Option(help="Its rotary size; default: the head size.")
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            callback=png, help="Draw what one token leaves in the cache of one layer, a PNG file."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint costs: parameters, cache, decode.

    Counted from config.json and tensor headers alone: now, as MHA, as MQA and as MLA.
    """
    from mlakit.account import ITEMSIZE
    from mlakit.inspection import inspect as examine
    from mlakit.inspection import print_inspection

    found = examine(
        model,
        context=context,
        batch=batch,
        memory=memory,
        kv_lora_rank=kv_lora_rank,
        qk_rope_head_dim=qk_rope_head_dim,
    )
    if picture is not None:
        from mlakit.reporting.cached import draw_cached
        from mlakit.reporting.files import write_file
        from mlakit.reporting.style import as_png

        kinds = {variant.attention: variant.layer for variant in found.variants}
        write_file(picture, as_png(draw_cached(kinds, ITEMSIZE[found.dtype])))
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
        return
    from rich.console import Console

    print_inspection(found, Console())
