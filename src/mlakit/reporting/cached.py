"""The picture of what one token leaves in a cache: a block per head, group or latent, to scale.

Above every block stand the query heads that read it, one small square each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mlakit.reporting.style import RESULT, SOURCE, STYLE, WIDTH, percent
from mlakit.spec import AttentionSpec

KEYS, VALUES, LATENT, ROPE, READERS = SOURCE, "#e69f00", RESULT, "#009e73", "#aab2bb"
BAR, GAP = 0.46, 0.006
"""Height of a bar, of a row of 1; space between blocks, of the widest row."""


@dataclass(frozen=True)
class Block:
    """One piece of a row.

    Attributes:
        name: what is written in it, where there is room.
        numbers: its width.
        readers: query heads that read it.
    """

    name: str
    numbers: int
    colour: str
    readers: int


def blocks_of(spec: AttentionSpec) -> list[Block]:
    """What one token leaves in one layer, in the order of the cache."""
    heads, rank = spec.num_attention_heads, spec.kv_lora_rank
    if rank is None:
        groups = spec.num_key_value_heads
        kinds = (("K", spec.head_dim, KEYS), ("V", spec.value_dim, VALUES))
        return [
            Block(name if groups == 1 else f"{name}{group + 1}", width, colour, heads // groups)
            for name, width, colour in kinds
            for group in range(groups)
        ]
    if spec.mla_form == "article":
        parts = (("c_v", rank // 2, LATENT), ("c_k", rank // 2, LATENT))
        return [Block(name, width, colour, heads) for name, width, colour in parts]
    name = "c_v" if spec.mla_form == "equal-cache" else "c_kv"
    return [
        Block(name, rank, LATENT, heads),
        Block("k_rope", spec.qk_rope_head_dim or 0, ROPE, heads),
    ]


def draw_cached(kinds: Mapping[str, AttentionSpec], itemsize: int) -> Figure:
    """One row per kind of attention, all to one scale.

    Args:
        kinds: name and layer of each row, from the top; shares are of the widest.
        itemsize: bytes per cached number.
    """
    widest = max(spec.cache_width for spec in kinds.values())
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.5 + 0.6 * len(kinds)), layout="constrained")
        axes = figure.subplots()
        for row, (name, spec) in enumerate(kinds.items()):
            _row(axes, row, blocks_of(spec), widest)
            nbytes = spec.cache_row_bytes(itemsize)
            share = percent(100 * spec.cache_width / widest)
            axes.text(-0.015, row, name, ha="right", va="center", fontweight="bold")
            label = f"{spec.cache_width:,} numbers, {nbytes:,} bytes, {share}"
            axes.text(_width(blocks_of(spec), widest) + 0.012, row, label, va="center", fontsize=9)
        _legend(axes)
        axes.set_xlim(-0.01, 1.01)
        axes.set_ylim(len(kinds) - 0.7, -0.8)
        axes.axis("off")
    return figure


def _width(blocks: Sequence[Block], widest: int) -> float:
    return sum(block.numbers for block in blocks) / widest


def _row(axes: Axes, row: int, blocks: Sequence[Block], widest: int) -> None:
    start = 0.0
    for block in blocks:
        width = block.numbers / widest
        gap = min(GAP, width / 8)
        place = (start + gap / 2, row - BAR / 2)
        axes.add_patch(Rectangle(place, width - gap, BAR, facecolor=block.colour, linewidth=0))
        if width > 0.0155 * (1 + len(block.name)):
            axes.text(
                start + width / 2, row, block.name, ha="center", va="center", color="white",
                fontsize=8.5,
            )  # fmt: skip
        _readers(axes, start + gap / 2, width - gap, row - BAR / 2 - 0.05, block.readers)
        start += width


def _readers(axes: Axes, left: float, width: float, bottom: float, count: int) -> None:
    """Small squares above a block, or where they would not be told apart a line."""
    pitch = min(0.0105, width / count)
    if pitch < 0.004:
        axes.plot([left, left + width], [bottom - 0.05] * 2, color=READERS, linewidth=2.2,
                  solid_capstyle="butt")  # fmt: skip
        return
    start = left + (width - pitch * count) / 2
    for index in range(count):
        place = (start + pitch * (index + 0.12), bottom - 0.11)
        axes.add_patch(Rectangle(place, 0.76 * pitch, 0.11, facecolor=READERS, linewidth=0))


def _legend(axes: Axes) -> None:
    texts = [
        ("keys", KEYS), ("values", VALUES), ("latent", LATENT), ("rotary key", ROPE),
        ("query heads that read it", READERS),
    ]  # fmt: skip
    handles = [Rectangle((0, 0), 1, 1, facecolor=colour, linewidth=0) for _, colour in texts]
    axes.legend(
        handles, [text for text, _ in texts], loc="lower left", ncols=5, fontsize=8.5,
        bbox_to_anchor=(0.0, 1.0), handlelength=0.9, handleheight=0.9, columnspacing=1.4,
        borderpad=0.2,
    )  # fmt: skip
