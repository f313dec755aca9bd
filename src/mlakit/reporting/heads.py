"""The picture of what every head looks at: a map per head, who asks (lines) against who is seen."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from mlakit.nn.journey import LayerJourney
from mlakit.reporting.style import GRID, INK, QUIET, RESULT, SOURCE, STYLE

HEAT = matplotlib.colormaps["Blues"]
TEAMS = (SOURCE, RESULT, "#228833", "#aa3377", "#ccbb44", "#66ccee", "#ee6677", "#44bb99")
"""Frames of heads that share a key: a colour per group, in turns."""

ACROSS = 4
"""Maps side by side of a single layer, large enough for the tokens' names."""

NAMED = 28
"""Tokens up to which their names are written."""


def draw_heads(journeys: Sequence[LayerJourney], tokens: Sequence[str], row: int = 0) -> Figure:
    """Maps of attention: heads of one layer with the tokens' names, or a line of heads per layer.

    Above each map stands where most of the head's attention goes, a mean over the tokens that ask.

    Args:
        journeys: one per layer, with ``weights``.
        tokens: the visible tokens.
        row: which sequence of the batch.
    """
    maps = [journey.weights[row].float() for journey in journeys if journey.weights is not None]
    alone, heads = len(maps) == 1, maps[0].shape[0]
    across = min(ACROSS, heads) if alone else heads
    down = -(-heads // across) if alone else len(maps)
    size = 2.35 if alone else 1.12
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(
                size * across + 0.9,
                (size + (0.3 if alone else 0.22)) * down + (1.1 if alone else 0.7),
            ),
            layout="constrained",
        )
        grid = figure.subplots(down, across, squeeze=False)
        for place in range(down * across):
            axes = grid[place // across][place % across]
            layer, head = (0, place) if alone else (place // across, place % across)
            if head < heads:
                _map(axes, journeys[layer], maps[layer][head], head, 9.0 if alone else 6.5)
            else:
                axes.axis("off")
        for line, first in enumerate(grid[:, 0]):
            if alone:
                _name(first, tokens, "y")
            else:
                first.set_ylabel(f"layer {line}", fontsize=8)
        shared = any(1 < journey.sizes.get("G", 1) < journey.sizes["H"] for journey in journeys)
        legend = "above a map: where most of the head's attention goes, in the mean over tokens"
        if shared and journeys[0].kind != "mla":
            legend += (
                "\n" if across < 6 else "; "
            ) + "frames of one colour: heads that share a key"
        figure.supxlabel(legend, fontsize=8, color=QUIET)
        if alone:
            for column in range(across):
                shown = (heads - 1 - column) // across
                _name(grid[shown][column], tokens, "x")
    return figure


def _map(axes: Axes, journey: LayerJourney, weights: Tensor, head: int, size: float) -> None:
    axes.imshow(weights.numpy(), cmap=HEAT, vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    groups = journey.sizes.get("G", 1) if journey.kind != "mla" else 1
    team = head * groups // journey.sizes["H"]
    colour = TEAMS[team % len(TEAMS)] if 1 < groups < journey.sizes["H"] else GRID
    for spine in axes.spines.values():
        spine.set(visible=True, color=colour, linewidth=1.4)
    liked = favourite(weights)
    axes.set_title(
        f"head {head}" + (f": {liked}" if size > 8 and liked else f"\n{liked}" if liked else ""),
        fontsize=size, color=INK, loc="center", pad=3,
    )  # fmt: skip


def favourite(weights: Tensor) -> str:
    """Where most of a head's attention goes, in a few words; empty for less than three tokens.

    Args:
        weights: ``[S, S]`` of a text read from its beginning; each row sums to 1.
    """
    if weights.shape[0] < 3 or weights.shape[0] != weights.shape[1]:
        return ""
    asking = weights[2:]  # for the second token, the first is the one before
    shares = {
        "itself": float(weights.diagonal()[2:].mean()),
        "the one before": float(weights.diagonal(-1)[1:].mean()),
        "the first": float(asking[:, 0].mean()),
    }
    shares["others"] = 1 - sum(shares.values())
    name = max(shares, key=shares.__getitem__)
    return f"{name} {shares[name]:.0%}".replace("%", " %")


def _name(axes: Axes, tokens: Sequence[str], side: str) -> None:
    """Tokens along an axis, where there are few enough."""
    if len(tokens) > NAMED:
        return
    labels = [repr(token)[1:-1].strip() or "·" for token in tokens]
    places = range(len(labels))
    size = 8.5 if len(labels) < 16 else 6.5
    if side == "y":
        axes.set_yticks(places, labels, fontsize=size)
    else:
        axes.set_xticks(places, labels, fontsize=size, rotation=90)
    axes.tick_params(length=0, colors=QUIET)
