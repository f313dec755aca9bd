"""A proof as text: a line per layer, and below what its columns are."""

from __future__ import annotations

from mlakit.theorem.measure import LayerProof, Pairs, Proof, Side


def tell_proof(found: Proof) -> str:
    """Both halves of the theorem for every layer, and what they mean."""
    rows = [_heads(found), *map(_cells, found.layers)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["   ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    return "\n".join([headline(found), "", *lines, "", *explanation(found)])


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
    pairs = [
        "two heads: directions that two heads of a group read together; grouped heads never more"
        f" than d = {bound}"
    ]
    if found.converted:
        verdict = (
            f"reached: in every layer two heads read more than {bound} directions, out of reach for"
            " grouped heads with this cache"
            if found.more
            else "not yet: as converted it is the source's own function; mlakit heal trains the"
            " up-projections"
        )
        return [*pairs, f"beyond: share of their energy past the first {bound}", verdict]
    verdict = (
        "holds: the same cache, the same function, and more within reach"
        if found.holds
        else "does not show in these weights: see the layers above"
    )
    return [
        f"rank: of W' = W_K (W_V) repeated for {layer.heads} heads; never more than G d = {width},"
        " as many numbers as both cache",
        "error: of its two factors' product in float64, relative to its largest entry",
        *pairs,
        "MLA: the same with orthogonal up-projections from the latent, before any training",
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
