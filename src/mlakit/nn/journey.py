"""The journey of a token through an attention layer: what was seen, and how it is told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

from torch import Tensor

from mlakit.nn.letters import Letters


@dataclass(frozen=True)
class Step:
    """One tensor on the way.

    Attributes:
        number: the step of the lesson: 1 project, 2 split, 3 permute, 4 attend, 5 concatenate,
            6 mix; None for what lies between.
        name: what was computed.
        shape: the tensor's shape, as seen.
        letters: the meaning of each dimension (``mlakit.nn.letters.GLOSSARY``).
        dtype: the tensor's dtype.
        nbytes: memory it took; 0 for a view of memory that was there, or for what a fused kernel
            never stores.
        note: what is remarkable about it.
    """

    number: int | None
    name: str
    shape: tuple[int, ...]
    letters: Letters
    dtype: str
    nbytes: int
    note: str = ""


@dataclass(frozen=True)
class Cached:
    """One tensor that a layer keeps for later tokens.

    Attributes:
        name: what it holds.
        shape: as allocated.
        numbers_per_token: entries that one token of one sequence takes.
        bytes_per_token: the same in bytes.
        nbytes: as allocated, all sequences together.
    """

    name: str
    shape: tuple[int, ...]
    numbers_per_token: int
    bytes_per_token: int
    nbytes: int


@dataclass(frozen=True)
class LayerJourney:
    """One forward pass of one attention layer.

    Attributes:
        layer: its name in the model; empty when the model is the layer.
        kind: mha, gqa, mqa or mla.
        past: tokens the layer had seen before.
        sizes: letter -> size, as seen.
        steps: in the order of computation.
        cache: what the layer keeps afterwards, if a cache was given.
        weights: ``[B, H, S, T]`` attention weights, when asked for.
    """

    layer: str
    kind: str
    past: int
    sizes: dict[str, int]
    steps: tuple[Step, ...]
    cache: tuple[Cached, ...] = ()
    weights: Tensor | None = field(default=None, compare=False, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the weights, for JSON."""
        return {
            "layer": self.layer,
            "kind": self.kind,
            "past": self.past,
            "sizes": self.sizes,
            "steps": [asdict(step) for step in self.steps],
            "cache": [asdict(kept) for kept in self.cache],
        }


def tell(journeys: Sequence[LayerJourney]) -> str:
    """The journeys as text, alike neighbours told once."""
    blocks = [_block(list(alike)) for alike in _runs(journeys)]
    return "\n\n".join(blocks)


def _runs(journeys: Sequence[LayerJourney]) -> Iterator[list[LayerJourney]]:
    """Neighbouring layers of one pass that did the same."""
    run: list[LayerJourney] = []
    for journey in journeys:
        if run and (_deeds(journey) != _deeds(run[0]) or journey.layer in {r.layer for r in run}):
            yield run
            run = []
        run.append(journey)
    if run:
        yield run


def _deeds(journey: LayerJourney) -> tuple[object, ...]:
    return journey.kind, journey.past, journey.steps, journey.cache


def _block(alike: list[LayerJourney]) -> str:
    first = alike[0]
    rows = [("", "step", "shape", "letters", "bytes", "")]
    for number, steps in groupby(first.steps, key=lambda step: step.number):
        for k, step in enumerate(steps):
            rows.append(
                (
                    f"({number})" if number and k == 0 else "",
                    step.name,
                    str(step.shape),
                    " ".join(step.letters),
                    f"{step.nbytes:,}" if step.nbytes else "-",
                    _note(step, first),
                )
            )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [_title(alike), _summary(first)]
    for row in rows:
        cells = [
            cell.rjust(width) if column == 4 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([line for line in [*lines, _cache_line(first)] if line])


def _note(step: Step, journey: LayerJourney) -> str:
    odd = step.dtype if step.dtype != journey.steps[0].dtype else ""
    return ", ".join(part for part in (step.note, odd) if part)


def _title(alike: list[LayerJourney]) -> str:
    first, last = alike[0], alike[-1]
    S = first.sizes["S"]
    tokens = f"{S} token{'s' if S > 1 else ''}" + (f" after {first.past}" if first.past else "")
    if len(alike) == 1:
        return f"{first.layer}: {tokens}"
    return f"{first.layer} … {last.layer}: {tokens}; {len(alike)} layers, the same in each"


def _summary(journey: LayerJourney) -> str:
    sizes = ", ".join(f"{letter} {size}" for letter, size in journey.sizes.items())
    heads = ""
    if journey.kind != "mla":
        heads = " {D} → {H} × {d} → {D};".format_map(journey.sizes)
    return f"{journey.kind.upper()}:{heads} {sizes}; {journey.steps[0].dtype}"


def _cache_line(journey: LayerJourney) -> str:
    if not journey.cache:
        return ""
    parts = " + ".join(f"{kept.name} {kept.shape}" for kept in journey.cache)
    numbers = sum(kept.numbers_per_token for kept in journey.cache)
    nbytes = sum(kept.bytes_per_token for kept in journey.cache)
    return (
        f"cached: {parts}\n        {numbers:,} numbers = {nbytes:,} bytes per token in each layer"
    )


def heat_map(journey: LayerJourney, tokens: Sequence[str], row: int = 0) -> str:
    """What each head of a layer looked at, darker for more: one line per asking token.

    Args:
        journey: with ``weights``.
        tokens: the T visible tokens, to label lines (asking) and columns (seen, by number).
        row: which sequence of the batch.
    """
    if journey.weights is None:
        return ""
    weights = journey.weights[row].float()
    heads, queries, keys = weights.shape
    asking = [repr(token)[1:-1][:12] for token in tokens[keys - queries :]]
    margin = max(len(label) for label in asking)
    columns = " " * (margin + 5) + "".join(f"{k % 100:<3}" for k in range(keys)).rstrip()
    lines = ["share of the attention: · below 20 %, ░ 40 %, ▒ 60 %, ▓ 80 %, █ more"]
    for head in range(heads):
        lines += [f"head {head}", columns]
        for query, label in enumerate(asking):
            cells = "".join(_shade(float(weight)) * 2 + " " for weight in weights[head, query])
            lines.append(f"{label:>{margin}} {keys - queries + query:>3} {cells}".rstrip())
    return "\n".join(lines)


def _shade(weight: float) -> str:
    return "·░▒▓█"[min(int(weight * 5), 4)]
