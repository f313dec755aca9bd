"""The terminal view of an inspection: the model, its layers, and what it would cost otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlakit.inspection.measure import Inspection, Variant, format_bytes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

ANY_WIDTH = 1000
"""Tables take the columns they need; a narrower terminal wraps lines rather than losing numbers."""

CACHE, COST = (0, 1, 2, 3, 4), (0, 5, 6, 7, 8)
"""Columns of the table of variants when the terminal is too narrow for all of them at once."""

BAR = 10
"""Columns of the widest bar."""


def print_inspection(found: Inspection, console: Console) -> None:
    """Prints everything in one screen."""
    from rich.text import Text

    tables = [_layer_table(found), _variant_table(found, CACHE + COST[1:])]
    if console.is_terminal and _widest(tables, console) > console.width:
        tables[1:] = [_variant_table(found, CACHE), _variant_table(found, COST)]
    wrapped = console.is_terminal and _widest(tables, console) <= console.width
    console.width = max(console.width, _widest(tables, console))
    counts = found.parameters
    active = f", {_short(counts['active'])} active" if counts["active"] < counts["total"] else ""
    name = Text.assemble((found.source, "bold"), " ", (_headline(found), "dim"))
    total = Text(f"{_short(counts['total'])} parameters{active}: ", style="bold")
    total.append(", ".join(_components(counts)), style="not bold")
    for line in (name, total):
        console.print(line, soft_wrap=not wrapped)
    for table in tables:
        console.print(table)
    for note in _notes(found):
        style = "bold yellow" if note.startswith("WARNING") else "dim"
        console.print(Text(note, style=style), soft_wrap=not wrapped)


def _widest(tables: Sequence[Table], console: Console) -> int:
    free = console.options.update_width(ANY_WIDTH)
    return max(console.measure(table, options=free).maximum for table in tables)


def _headline(found: Inspection) -> str:
    weights = format_bytes(found.weight_bytes)
    return (
        f"{found.model_type} · {found.dtype} · {weights} of weights"
        f" · up to {found.max_position_embeddings:,} tokens"
    )


def _components(counts: dict[str, int]) -> list[str]:
    names = ("attention", "feed_forward", "embedding", "output", "norms")
    return [f"{name.replace('_', '-')} {_short(counts[name])}" for name in names if counts[name]]


def _layer_table(found: Inspection) -> Table:
    table = _table("layers", "attention", "parameters each", "cache/token each", "feed-forward")
    for group in found.layers:
        table.add_row(
            ranges(group.layers),
            group.attention,
            f"{group.attention_parameters:,}",
            format_bytes(group.cache_bytes_per_token),
            group.feed_forward,
        )
    return table


def _variant_table(found: Inspection, columns: Sequence[int]) -> Table:
    """What every variant costs; ``columns`` are positions in `_cells`."""
    heads = (
        "attention",
        "bytes/token",
        "of own",
        "of MHA",
        "",
        f"{found.context:,} x {found.batch}",
        f"in {format_bytes(found.memory)}",
        "GFLOP",
        "moved",
    )
    table = _table(*(heads[column] for column in columns))
    widest = max(variant.cache_bytes_per_token for variant in found.variants)
    for variant in found.variants:
        bar = _bar(variant.cache_bytes_per_token / widest)
        cells = _cells(variant, bar)
        style = "bold" if variant.name == "now" else ""
        table.add_row(*(cells[column] for column in columns), style=style)
    return table


def _cells(variant: Variant, bar: str) -> list[str]:
    longest = variant.longest_context
    named = variant.name in ("now", "source")
    return [
        f"{variant.name}: {variant.attention}" if named else variant.attention,
        f"{variant.cache_bytes_per_token:,}",
        _percent(variant.share_of_own),
        _percent(variant.share_of_mha),
        bar,
        format_bytes(variant.cache_bytes),
        "any" if longest is None else f"{longest:,}" if longest else "none",
        _three(variant.flops_per_token / 1e9),
        format_bytes(variant.bytes_moved_per_token),
    ]


def _notes(found: Inspection) -> list[str]:
    lines = [
        f"{found.context:,} x {found.batch}: bytes of the cache at this context and batch;"
        f" in {format_bytes(found.memory)}: longest context that fits beside the weights;",
        "GFLOP and moved: what one decoded token computes and reads at this context and batch",
        f"convert: {'yes' if found.conversion == 'yes' else f'no, {found.conversion}'}",
    ]
    return lines + list(found.notes)


def _table(*heads: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for head in heads:
        left = head in ("layers", "attention", "feed-forward", "")
        table.add_column(head, justify="left" if left else "right", no_wrap=True)
    return table


def ranges(indices: Sequence[int]) -> str:
    """Layer numbers in short: ``0-31``, ``0,2..24``, ``0-2,5``."""
    step = indices[1] - indices[0] if len(indices) > 2 else 1
    if step > 1 and list(indices) == list(range(indices[0], indices[-1] + 1, step)):
        return f"{indices[0]},{indices[1]}..{indices[-1]}"
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], index]
        else:
            parts.append([index])
    return ",".join("-".join(map(str, part)) for part in parts)


def _bar(share: float) -> str:
    """A bar of up to ``BAR`` columns, in eighths of a column."""
    eighths = max(1, round(8 * BAR * share))
    return "█" * (eighths // 8) + ("" if eighths % 8 == 0 else chr(0x2590 - eighths % 8))


def _percent(share: float) -> str:
    return f"{100 * share:,.0f} %" if share >= 0.995 else f"{100 * share:.1f} %"


def _three(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _short(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
