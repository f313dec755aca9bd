"""``mlakit prove``: Theorem 1 in numbers, on the weights of any model with grouped heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mlakit.cli.options import AsJson, png


def prove(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id, GQA or equal-cache.")],
    picture: Annotated[
        Path | None,
        typer.Option(callback=png, help="Draw where two heads' directions end, a PNG file."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check that latent attention expresses more than GQA at the same cache, on your weights.

    Theorem 1 of TransMLA, layer by layer: the factorisation that changes nothing, and what two
    heads of a group read together. Exit code 4 when the weights do not show it.
    """
    from mlakit.errors import VerificationError
    from mlakit.reporting.files import write_file
    from mlakit.reporting.style import as_png
    from mlakit.theorem import draw_proof, tell_proof
    from mlakit.theorem import prove as measure

    found = measure(model)
    if picture is not None:
        write_file(picture, as_png(draw_proof(found)))
    typer.echo(json.dumps(found.as_dict(), indent=2) if as_json else tell_proof(found))
    if not found.holds:
        raise VerificationError(
            f"The weights of {found.source} do not show Theorem 1",
            remedy="see the layers above: a key or value projection may be of lower rank than its"
            " size, or rounding too coarse",
        )
