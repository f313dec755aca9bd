"""The picture of a proof: where the directions of two heads end."""

from __future__ import annotations

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mlakit.reporting.style import QUIET, RESULT, SOURCE, STYLE, WIDTH
from mlakit.theorem.measure import LayerProof, Pairs, Proof, Side

FLOOR = 1e-17
"""Singular values below this are drawn here: zero, to rounding and beyond."""


def draw_proof(found: Proof) -> Figure:
    """Singular values of the first pair of heads in the first layer, for keys and for values."""
    layer = found.layers[0]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _panel(left, layer, layer.keys, "keys: W_Qᵀ W_K of two heads")
        _panel(right, layer, layer.values, "values: W_V of two heads")
        left.set_ylabel("singular value, of the largest")
        left.legend(loc="center right", fontsize=8, handlelength=0.8, borderaxespad=0)
    return figure


def _panel(axes: Axes, layer: LayerProof, side: Side, title: str) -> None:
    latent = "latent, as it is" if side.grouped is None else "latent, orthogonal"
    if side.grouped is not None:
        _line(axes, side.grouped, "grouped heads", SOURCE, "o")
    _line(axes, side.latent, latent, RESULT, "s")
    axes.axvline(layer.head_dim + 0.5, color=QUIET, linewidth=0.9, linestyle=":")
    axes.text(layer.head_dim + 0.5, 3, f" d = {layer.head_dim}", color=QUIET, fontsize=8.5)
    axes.set_yscale("log")
    axes.set_ylim(FLOOR / 2, 20)
    axes.set_xlabel("direction")
    axes.set_title(f"{title}, layer {layer.layer}", pad=12)


def _line(axes: Axes, pairs: Pairs, label: str, colour: str, marker: str) -> None:
    sizes = [max(size, FLOOR) for size in pairs.sizes]
    axes.plot(range(1, len(sizes) + 1), sizes, marker, color=colour, label=label, markersize=3)
