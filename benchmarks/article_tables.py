"""What follows from the runs of article_experiments: means over seeds, and the picture."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

COLOURS = {
    "MLA, keys and values": "#0b6e4f",
    "GQA, keys and values": "#c1440e",
    "GQA, keys, values and queries": "#e39b4b",
    "MLA, attention": "#58a88b",
    "GQA, attention": "#7d2a1a",
    "MLA from the identity": "#3c6e9e",
    "MLA from random rotations": "#8c63a9",
    "published": "#c1440e",
    "ours, closed form": "#58a88b",
    "ours": "#0b6e4f",
}
BEYOND = (
    "MLA, keys and values", "GQA, keys and values", "GQA, keys, values and queries",
    "MLA, attention", "GQA, attention",
)  # fmt: skip
STARTS = ("MLA, keys and values", "MLA from the identity", "MLA from random rotations")


def summary(models: dict[str, Any]) -> dict[str, Any]:
    """Of each model and arm: rate, trained weights, held-out loss at the end, over seeds."""
    found: dict[str, Any] = {}
    for model, parts in models.items():
        arms = sorted({run["arm"] for run in parts["runs"].values()})
        found[model] = {arm: of_arm(seeds_of(parts["runs"], arm)) for arm in arms}
        runs = parts["heal"].items()
        found[model]["healing"] = {in_words(name): healed(run) for name, run in runs}
    return found


def in_words(name: str) -> str:
    """A conversion's name with its ratio in thousandths: pages look numbers up by names with dots
    between them."""
    ratio, method = name.split(", ", 1)
    return f"{1000 * float(ratio):.0f} {method}"


def healed(run: dict[str, Any]) -> dict[str, Any]:
    """Loss before and after, and tokens until the perplexity is near the original's."""
    return {
        "original": run["original_nll"],
        "before": run["nll"][0],
        "after": run["nll"][-1],
        "tokens": run["tokens"][-1],
        "to_one_percent": run["tokens_to_percent"]["1"],
        "to_a_tenth": run["tokens_to_percent"]["0.1"],
    }


def seeds_of(runs: dict[str, Any], arm: str) -> list[dict[str, Any]]:
    """The runs of an arm, by seed."""
    return [runs[name] for name in sorted(runs) if runs[name]["arm"] == arm]


def of_arm(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of one arm."""
    ends = [run["nll"][-1] for run in runs]
    return {
        "rate": runs[0]["rate"],
        "trained": runs[0]["trained"],
        "seeds": len(runs),
        "before": runs[0]["nll"][0],
        "after": statistics.mean(ends),
        "lowest": min(ends),
        "highest": max(ends),
    }


def write_picture(record: dict[str, Any], path: Path) -> None:
    """Loss over tokens: beyond the original, from other starts, healing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    models = record["models"]
    figure, grid = plt.subplots(
        len(models), 3, figsize=(13, 3.6 * len(models)), squeeze=False, layout="constrained"
    )
    for row, (name, parts) in zip(grid, models.items(), strict=True):
        draw_arms(row[0], parts["runs"], BEYOND)
        draw_arms(row[1], parts["runs"], STARTS)
        draw_healing(row[2], parts["heal"])
        row[0].set_ylabel(f"{name}\nheld-out loss, nats per token")
    titles = ("new text: latent against grouped", "new text: where latents start", "healing")
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=10, loc="left")
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        if axes.get_legend_handles_labels()[0]:
            columns = 2 if axes.get_yscale() == "log" else 1
            axes.legend(fontsize=7, frameon=False, loc="upper right", ncols=columns)
    for axes in grid[-1]:
        axes.set_xlabel("thousand tokens trained")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_arms(axes: Any, runs: dict[str, Any], names: tuple[str, ...]) -> None:
    """Mean over seeds, and a band from the lowest to the highest; the first drop is cut off."""
    highest = 0.0
    for name in names:
        found = seeds_of(runs, name)
        if not found:
            continue
        tokens = [count / 1000 for count in found[0]["tokens"]]
        losses = list(zip(*(run["nll"] for run in found), strict=True))
        mean = [statistics.mean(part) for part in losses]
        highest = max(highest, *losses[1])
        colour = COLOURS[name]
        label = f"{name} ({found[0]['trained']:,} weights)"
        axes.plot(tokens, mean, color=colour, linewidth=1.5, label=label)
        axes.fill_between(tokens, *map(list, zip(*((min(p), max(p)) for p in losses))),
                          color=colour, alpha=0.18, linewidth=0)  # fmt: skip
    if highest:
        axes.set_ylim(top=1.05 * highest)


def draw_healing(axes: Any, runs: dict[str, Any]) -> None:
    """Excess loss of compressed models over the original, on a log scale."""
    for name, run in runs.items():
        ratio, method = name.split(", ", 1)
        excess = [max(nll - run["original_nll"], 1e-5) for nll in run["nll"]]
        tokens = [count / 1000 for count in run["tokens"]]
        style = "-" if ratio == "0.5" else "--"
        label = f"{100 * float(ratio):g} % {method}"
        axes.plot(tokens, excess, style, color=COLOURS[method], linewidth=1.4, label=label)
    if runs:
        axes.set_yscale("log")
        axes.set_ylim(top=5 * axes.get_ylim()[1])  # for the legend
        axes.set_ylabel("loss above the original's, nats")
