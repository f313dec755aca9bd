"""What the cells of conversion_quality say together: shares, a page of tables, a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parents[1] / "docs"
COLOURS = {
    "published": "#9aa1ac",
    "published, refined": "#ddaa33",
    "ours, closed form, stock layout": "#4477aa",
    "ours, closed form": "#ee7733",
    "ours": "#cc3311",
}
CHOSEN, CHOSEN_COLOUR = "ours, rotary width chosen (the default)", "#228833"
LABELS = {"ours": "ours, refined"}
FLOOR = 1e-3
"""Excess losses below are drawn here; some are below zero."""


def size_name(cell: dict[str, Any]) -> str:
    """``d1_500``: all of the head size stays rotated, 500 thousandths of the cache are kept.

    ``d2`` is half of it, ``d0`` a width that calibration chose.
    """
    return f"d{cell['halving']}_{round(1000 * cell['ratio'])}"


def shares(
    models: dict[str, Any], sizes: list[tuple[float, int]], methods: Iterable[str] = COLOURS
) -> dict[str, Any]:
    """By size and method: excess log loss as a share of the published one's.

    Cells of the same seed are compared; a chosen width with all of the head size. A model counts
    with the mean of its seeds. ``lowest`` and ``highest`` are those of the median over models where
    each seed stands alone, over the seeds that all these models have. What is not measured is None.
    """
    names = [size_name({"ratio": ratio, "halving": halving}) for ratio, halving in sizes]
    return {size: {method: _summary(models, size, method) for method in methods} for size in names}


def ablation(
    models: dict[str, Any], sizes: list[tuple[float, int]], parts: list[str]
) -> dict[str, Any]:
    """``shares`` without each part and with all, over the models that have all that is measured."""
    result = {}
    for ratio, halving in sizes:
        size = size_name({"ratio": ratio, "halving": halving})
        found = {
            name: {cell["method"] for cell in model["ablation"] if size_name(cell) == size}
            for name, model in models.items()
        }
        most = max(map(len, found.values()), default=0)
        whole = {name: models[name] for name, methods in found.items() if len(methods) == most}
        result |= shares(whole, [(ratio, halving)], [*parts, "ours, closed form"])
    return result


def _summary(models: dict[str, Any], size: str, method: str) -> dict[str, Any]:
    by_model: dict[str, dict[int, float]] = {}
    steps: set[int] = set()
    for name, model in models.items():
        known = (*model["cells"], *model["ablation"])
        cells = [cell for cell in known if size_name(cell) == size]
        base = size.replace("d0_", "d1_")
        excess = {
            cell["seed"]: cell["excess"]["value"]
            for cell in known
            if size_name(cell) == base and cell["method"] == "published"
        }
        for cell in cells:
            published = excess.get(cell["seed"], 0.0)
            if cell["method"] == method and published > 0:
                share = cell["excess"]["value"] / published
                by_model.setdefault(name, {})[cell["seed"]] = share
                steps.add(cell["steps"])
    means = {name: statistics.mean(seeds.values()) for name, seeds in by_model.items()}
    common = set.intersection(*map(set, by_model.values())) if by_model else set()
    medians = [statistics.median(seeds[one] for seeds in by_model.values()) for one in common]
    return {
        "median": statistics.median(means.values()) if means else None,
        "worst": max(means.values(), default=None),
        "worst_model": max(means, key=lambda name: means[name], default=None),
        "models": len(means),
        "seeds": len(common),
        "lowest": min(medians, default=None),
        "highest": max(medians, default=None),
        "steps": " or ".join(map(str, sorted(steps))),
    }


def grouped(cells: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Cells that differ in the seed alone, together; as they are ordered."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["ratio"], cell["halving"], cell["method"]), []).append(cell)
    return list(groups.values())


def page(record: dict[str, Any]) -> str:
    """Every figure, in Markdown."""
    lines = [
        "# Conversion quality, every figure",
        "",
        "Written by `python -m benchmarks.conversion_quality`; [conversion](conversion.md) says"
        " what the methods are. Each cell is the mean over seeds (calibration windows, order of"
        " steps); brackets hold the 95 % bootstrap interval over test windows of the first seed,"
        " and `±` is half the spread over seeds. Excess and KL in nats per token against the"
        " source. Sizes that leave no rank are missing.",
    ]
    for name, model in record["models"].items():
        lines += [
            "",
            f"## {name}",
            "",
            f"Perplexity {model['source_perplexity']:.4g} on {model['texts']}.",
            "",
            "| cache | rope + rank | method | perplexity | excess | KL | top-1 | seeds | seconds |",
            "|---|---|---|---|---|---|---|---|---|",
            *(_row(cells) for cells in grouped(model["cells"])),
        ]
        if model["ablation"]:
            lines += [
                "",
                "Closed form, one part left out at a time:",
                "",
                "| cache | rope + rank | method | perplexity | excess | KL | top-1 | seeds |"
                " seconds |",
                "|---|---|---|---|---|---|---|---|---|",
                *(_row(cells) for cells in grouped(model["ablation"])),
            ]
    return "\n".join(lines) + "\n"


def _row(cells: list[dict[str, Any]]) -> str:
    first = cells[0]

    def figure(name: str, form: str) -> str:
        values = [cell[name]["value"] for cell in cells]
        text, known = format(statistics.mean(values), form), first[name]
        if known.get("low") is not None:
            text += f" [{known['low']:{form}}, {known['high']:{form}}]"
        if len(values) > 1:
            text += f" ± {(max(values) - min(values)) / 2:{form}}"
        return text

    perplexity = math.exp(statistics.mean(math.log(cell["perplexity"]) for cell in cells))
    return (
        f"| {first['ratio']:.1%} | {first['rope']} + {first['rank']:.4g} | {first['method']}"
        f" | {perplexity:.4g} | {figure('excess', '.4f')} | {figure('kl', '.4f')}"
        f" | {figure('top1', '.1%')} | {len(cells)}"
        f" | {statistics.mean(cell['seconds'] for cell in cells):.0f} |"
    )


def draw(record: dict[str, Any]) -> None:
    """Excess log loss against the share of the cache: a column per model, a row per width."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    models = record["models"]
    figure, rows = plt.subplots(
        2, len(models), figsize=(2.7 * len(models), 5.6), squeeze=False, sharey=True, sharex=True
    )
    for panels, halving in zip(rows, (1, 2), strict=True):
        for panel, (name, model) in zip(panels, models.items(), strict=True):
            groups = [g for g in grouped(model["cells"]) if g[0]["halving"] == halving]
            for method, colour in COLOURS.items():
                of_method = [g for g in groups if g[0]["method"] == method]
                _line(panel, of_method, LABELS.get(method, method), colour)
            free = [g for g in grouped(model["cells"]) if g[0]["halving"] == 0]
            free = [g for g in free if g[0]["method"] == "ours"]
            _line(panel, free, CHOSEN, CHOSEN_COLOUR)
            panel.set(xscale="log", yscale="log", xlim=(110, 11))
            panel.set_xticks([100, 50, 25, 12.5], ["100", "50", "25", "12.5"])
            panel.minorticks_off()
            panel.grid(axis="y", color="#e6e8ec")
            if halving == 1:
                panel.set_title(f"{name}, perplexity {model['source_perplexity']:.2f}", fontsize=9)
            else:
                panel.set_xlabel("cache kept, %")
        width = "all of the head size rotated" if halving == 1 else "half of it rotated"
        panels[0].set_ylabel(f"{width}\nexcess loss, nats per token")
    handles, labels = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="lower center", ncol=3)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(DOCS / "conversion_quality.png", dpi=150)
    plt.close(figure)


def _line(panel: Any, groups: list[list[dict[str, Any]]], label: str, colour: str) -> None:
    """One method: the mean over seeds, and their spread."""
    values = [[max(cell["excess"]["value"], FLOOR) for cell in group] for group in groups]
    ratios = [100 * group[0]["ratio"] for group in groups]
    means = [statistics.mean(of_size) for of_size in values]
    panel.plot(ratios, means, "o-", color=colour, label=label, markersize=4)
    panel.vlines(ratios, [min(v) for v in values], [max(v) for v in values], color=colour)


def write_page(record: dict[str, Any]) -> None:
    """The tables and the picture, beside the other documentation."""
    (DOCS / "conversion_quality.md").write_text(page(record), encoding="utf-8")
    draw(record)
