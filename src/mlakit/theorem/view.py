"""A proof in a terminal; tab-separated lines where there is none."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlakit.theorem.measure import LayerProof, Pairs, Proof, Side


def print_proof(found: Proof, console: Console) -> None:
    """Prints both halves of the theorem for every layer, and below what they mean."""
    heads = _heads(found)
    rows = [_cells(layer) for layer in found.layers]
    if not console.is_terminal:
        for line in (headline(found), "\t".join(heads), *("\t".join(row) for row in rows)):
            console.file.write(line + "\n")
        for line in explanation(found):
            console.file.write(line + "\n")
        return
    table = Table(
        title=Text(headline(found), style="bold"),
        caption=Text("\n".join(explanation(found))),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for head in heads:
        table.add_column(Text(head), justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table, highlight=False)


def headline(found: Proof) -> str:
    """The model and its heads in one line."""
    layer = found.layers[0]
    kind = "equal-cache latents from" if found.converted else "GQA,"
    return (
        f"Theorem 1 on {found.source}: {kind} {layer.heads} heads on {layer.groups} of"
        f" {layer.head_dim}"
    )


def explanation(found: Proof) -> list[str]:
    """What the columns are, and the verdict."""
    layer = found.layers[0]
    width, bound = layer.groups * layer.head_dim, layer.head_dim
    pairs = (
        f"two heads: directions that two heads of a group read together; grouped heads never"
        f" more than d = {bound}"
    )
    if found.converted:
        verdict = (
            f"reached: in every layer two heads read more than {bound} directions, out of reach"
            " for grouped heads with this cache"
            if found.more
            else "not yet: as converted it is the source's own function; mlakit heal trains the"
            " up-projections"
        )
        return [
            f"{pairs}; beyond: share of the energy past the first {bound}",
            verdict,
        ]
    verdict = (
        "holds: the same cache, the same function, and more within reach"
        if found.holds
        else "does not show in these weights: see the layers above"
    )
    return [
        f"rank: of W' = W_K (W_V) repeated for {layer.heads} heads; at most G d = {width}, which is"
        " what both cache",
        "error: largest of W' - W^b W^a in float64, of the largest entry of W'",
        f"{pairs}, with orthogonal up-projections more",
        verdict,
    ]


def _heads(found: Proof) -> list[str]:
    each = ["rank", "error", "two heads, GQA", "MLA"]
    if found.converted:
        each = ["two heads", "beyond"]
    return [
        "layer",
        "cached GQA",
        "MLA",
        *(f"{side} {name}" for side in ("K", "V") for name in each),
    ]


def _cells(layer: LayerProof) -> list[str]:
    cached = [str(layer.layer), f"{layer.cached:,}", f"{layer.cached_latent:,}"]
    return [*cached, *_side(layer.keys), *_side(layer.values)]


def _side(side: Side) -> list[str]:
    if side.rank is None or side.grouped is None:
        return [ranks(side.latent), f"{100 * side.latent.beyond:.2g} %"]
    return [str(side.rank), f"{side.error:.0e}", ranks(side.grouped), ranks(side.latent)]


def ranks(pairs: Pairs) -> str:
    """One number, or the smallest and the largest."""
    if pairs.smallest == pairs.largest:
        return str(pairs.smallest)
    return f"{pairs.smallest} to {pairs.largest}"
