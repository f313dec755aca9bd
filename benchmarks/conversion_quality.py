"""What compressing the cache costs: the published method, ours, and ours without each of its parts.

    python -m benchmarks.conversion_quality [MODEL ...]

Writes results/conversion_quality.json and docs/conversion_quality.png.
Conversions of real checkpoints at equal cache bytes; published and ours see the same
calibration text. Test text is only ever scored: nothing is chosen on it. Models that know no text
we have are calibrated and tested on separate samples of their own. Every window is scored in one
pass, in which converted models expand keys and values from the latents they would cache.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from transformers import AutoTokenizer

from mlakit.benching.environment import environment
from mlakit.checkpoint import open_checkpoint
from mlakit.conversion.apply import convert
from mlakit.conversion.budget import AUTO_STEPS, PARTS
from mlakit.data import builtin_text, token_windows
from mlakit.evaluation.quality import bootstrap, kl_divergence
from mlakit.families import read_model
from mlakit.nn.hf import load

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("MLAKIT_SHARED", ROOT.parent / "shared"))
DEMO = ROOT / "src" / "mlakit" / "assets" / "demo_model"
RESULT = ROOT / "benchmarks" / "results" / "conversion_quality.json"
PICTURE = ROOT / "docs" / "conversion_quality.png"
STORIES = ("stories260k", "llama2xs280k")
RATIOS = (1.0, 0.5, 0.375, 0.28, 0.25, 0.125)
ABLATED = ((0.5, 1), (0.375, 1), (0.5, 2))
"""Cache ratios, and the share of the head size that stays rotated, of the ablation."""
TOKENS, LONGEST = 12288, 512
METHODS: dict[str, dict[str, Any]] = {
    "published": {"method": "transmla"},
    "published, refined": {"method": "transmla", "refine_steps": AUTO_STEPS},
    "ours": {},
    "ours, closed form": {"refine_steps": 0},
    "ours, closed form, stock layout": {"refine_steps": 0, "without": ["frequencies", "means"]},
}
COLOURS = dict(zip(METHODS, ("#9aa1ac", "#ddaa33", "#cc3311", "#ee7733", "#4477aa")))


@dataclass
class Case:
    """A model and its two texts: one to calibrate with, one to score."""

    folder: Path
    texts: str
    calibration: Path
    windows: torch.Tensor
    log_probabilities: torch.Tensor


@torch.inference_mode()
def samples(folder: Path, seed: int) -> torch.Tensor:
    """Windows that the model draws itself, ``[windows, T]`` from its first token on."""
    model = load(folder, dtype=torch.float32)
    length = min(LONGEST, model.config.max_position_embeddings)
    start = torch.full((TOKENS // length, 1), model.config.bos_token_id)
    torch.manual_seed(seed)
    options = {"do_sample": True, "min_new_tokens": length - 1, "max_new_tokens": length - 1}
    return model.generate(start, attention_mask=torch.ones_like(start), top_k=0, **options)


def open_case(folder: Path, work: Path) -> Case:
    """Chooses the texts of a model: what it is known to know, else what it writes itself."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    context = read_model(open_checkpoint(folder).config).max_position_embeddings
    length = min(LONGEST, context)
    path = work / f"{folder.name}.txt"
    if folder.name in STORIES:
        texts, stories = "TinyStories train and valid", SHARED / "data" / "tinystories"
        both = [(stories / f"{name}.txt").read_text("utf-8") for name in ("train", "valid")]
        calibration, test = (text[: 5 * TOKENS].replace("<|endoftext|>", "") for text in both)
    elif folder == DEMO:
        texts = "the package's calibration and evaluation texts"
        calibration, test = builtin_text("calibration"), builtin_text("evaluation")
    else:
        texts, test = "its own samples, two seeds", ""
        drawn = samples(folder, 0)
        calibration = "\n".join(tokenizer.batch_decode(drawn, skip_special_tokens=True))
    path.write_text(calibration, encoding="utf-8")
    if test:
        windows = torch.tensor(token_windows(test, tokenizer, length, TOKENS // length))
    else:
        windows = samples(folder, 1)
    return Case(folder, texts, path, windows, log_probabilities(folder, windows))


@torch.inference_mode()
def log_probabilities(folder: Path, windows: torch.Tensor) -> torch.Tensor:
    """Of every token at every position, ``[windows, T - 1, vocabulary]``."""
    model = load(folder, dtype=torch.float32)
    parts = [model(input_ids=ids[None], use_cache=False).logits[0, :-1] for ids in windows]
    return torch.stack(parts).log_softmax(-1)


def losses(scores: torch.Tensor, windows: torch.Tensor) -> np.ndarray:
    """Mean negative log-likelihood of each window, nats per token."""
    return -scores.gather(2, windows[:, 1:, None]).double().mean((1, 2)).numpy()


def measure(case: Case, work: Path, **goal: Any) -> dict[str, Any]:
    """Converts and scores; intervals are 95 % bootstraps over windows."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        started = time.perf_counter()
        plan = convert(
            case.folder, folder, calibration=case.calibration, calibration_tokens=TOKENS,
            dtype="float32", **goal,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        scores = log_probabilities(Path(folder), case.windows)
    source = losses(case.log_probabilities, case.windows)
    excess = bootstrap(losses(scores, case.windows) - source, seed=0)
    kl = torch.stack([kl_divergence(a, b).mean() for a, b in zip(case.log_probabilities, scores)])
    same = (scores.argmax(-1) == case.log_probabilities.argmax(-1)).double().mean(1)
    return {
        "rank": plan.target.kv_lora_rank,
        "rope": plan.target.qk_rope_head_dim,
        "perplexity": math.exp(source.mean() + excess.value),
        "excess": excess.model_dump(),
        "kl": bootstrap(kl.numpy(), seed=0).model_dump(),
        "top1": bootstrap(same.numpy(), seed=0).model_dump(),
        "seconds": round(seconds, 2),
    }


def goal_of(case: Case, ratio: float, halving: int) -> dict[str, int] | None:
    """Rank and rotary width at a share of the cache; None where no rank is left."""
    layer = read_model(open_checkpoint(case.folder).config).layers[0]
    rope = layer.head_dim // halving
    rank = math.floor(ratio * layer.cache_width + 1e-9) - rope
    return {"kv_lora_rank": rank, "qk_rope_head_dim": rope} if rank > 0 else None


def run(
    case: Case, work: Path, methods: list[str], ratios: list[float], ablation: bool
) -> dict[str, Any]:
    """Every size and method of one model."""
    cells, ablated = [], []
    for ratio in ratios:
        for halving in (1, 2):
            goal = goal_of(case, ratio, halving)
            for method in methods if goal else ():
                found = measure(case, work, **goal, **METHODS[method])
                cells.append({"ratio": ratio, "halving": halving, "method": method, **found})
                say(case, cells[-1])
    for ratio, halving in ABLATED if ablation else ():
        goal = goal_of(case, ratio, halving)
        for part in PARTS if goal else ():
            without = ["frequencies", "theta"] if part == "theta" else [part]
            found = measure(case, work, **goal, without=without, refine_steps=0)
            name = "without " + " and ".join(without)
            ablated.append({"ratio": ratio, "halving": halving, "method": name, **found})
            say(case, ablated[-1])
    source = float(np.exp(losses(case.log_probabilities, case.windows).mean()))
    return {"texts": case.texts, "source_perplexity": source, "cells": cells, "ablation": ablated}


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A model's record with cells measured anew in place of the old ones."""

    def key(cell: dict[str, Any]) -> tuple[Any, ...]:
        return -cell["ratio"], cell["halving"], cell["method"]

    result = {**old, **new}
    for name in ("cells", "ablation"):
        cells = {key(cell): cell for cell in [*old.get(name, []), *new[name]]}
        result[name] = [cells[place] for place in sorted(cells)]
    return result


def say(case: Case, cell: dict[str, Any]) -> None:
    """One line per conversion."""
    print(
        f"{case.folder.name}: {cell['ratio']:.1%} rope {cell['rope']} + rank {cell['rank']}"
        f" {cell['method']}: {cell['perplexity']:.4g}, KL {cell['kl']['value']:.3g},"
        f" top-1 {cell['top1']['value']:.1%}, {cell['seconds']:.0f} s",
        flush=True,
    )


def size_name(cell: dict[str, Any]) -> str:
    """``d1_500``: all of the head size stays rotated, 500 thousandths of the cache are kept."""
    return f"d{cell['halving']}_{round(1000 * cell['ratio'])}"


def perplexities(models: dict[str, Any]) -> dict[str, Any]:
    """Perplexity by model, size and method, the ablation among them."""
    table: dict[str, Any] = {}
    for name, model in models.items():
        table[name] = {"source": model["source_perplexity"]}
        for cell in [*model["cells"], *model["ablation"]]:
            table[name].setdefault(size_name(cell), {})[cell["method"]] = cell["perplexity"]
    return table


def summary(models: dict[str, Any]) -> dict[str, Any]:
    """By size and method: excess log loss as a share of the published one, over models."""
    shares: dict[str, dict[str, list[float]]] = {}
    for model in models.values():
        cells = {
            (size_name(cell), cell["method"]): cell["excess"]["value"] for cell in model["cells"]
        }
        for (size, method), excess in cells.items():
            published = cells.get((size, "published"))
            if published:
                found = shares.setdefault(size, {}).setdefault(method, [])
                found.append(excess / published)
    return {
        size: {
            method: {"median": statistics.median(found), "worst": max(found), "models": len(found)}
            for method, found in methods.items()
        }
        for size, methods in shares.items()
    }


def draw(record: dict[str, Any]) -> None:
    """Excess log loss against the share of the cache, one panel per model."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    models = record["models"]
    figure, panels = plt.subplots(
        1, len(models), figsize=(2.9 * len(models), 3.2), squeeze=False, sharey=True
    )
    for panel, (name, model) in zip(panels[0], models.items()):
        for method in METHODS:
            for halving, style in ((1, "o-"), (2, "s--")):
                cells = [
                    cell
                    for cell in model["cells"]
                    if (cell["method"], cell["halving"]) == (method, halving)
                ]
                panel.plot(
                    [100 * cell["ratio"] for cell in cells],
                    [max(cell["excess"]["value"], 1e-3) for cell in cells],
                    style,
                    color=COLOURS[method],
                    label=method if halving == 1 else None,
                    markersize=4,
                )
        panel.set_yscale("log")
        panel.set_title(f"{name}, perplexity {model['source_perplexity']:.2f}", fontsize=9)
        panel.set_xlabel("cache kept, %")
        panel.grid(axis="y", color="#e6e8ec")
    panels[0][0].set_ylabel("excess loss, nats per token")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="lower center", ncol=len(METHODS))
    figure.suptitle("solid: head size stays rotated; dashed: half of it", fontsize=8, x=0.5)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(PICTURE, dpi=160)


def main() -> None:
    """Measures the models given, or all at hand; writes the JSON after each, and the picture.

    What an earlier run measured stays, unless it is measured again.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path, help="folders; default: all at hand")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    parser.add_argument("--no-ablation", action="store_true")
    arguments = parser.parse_args()
    at_hand = sorted(path.parent for path in (SHARED / "models").glob("*/config.json"))
    folders = arguments.models or [*at_hand, DEMO]
    with tempfile.TemporaryDirectory() as work:
        for folder in folders:
            case = open_case(folder.resolve(), Path(work))
            ablation = not arguments.no_ablation and case.folder != DEMO
            found = run(case, Path(work), arguments.methods, arguments.ratios, ablation)
            record: dict[str, Any] = {"models": {}}
            if arguments.output.exists():
                record = json.loads(arguments.output.read_text(encoding="utf-8"))
            name, models = case.folder.name, record["models"]
            models[name] = merged(models.get(name, {}), found)
            record["environment"] = environment()
            record["share_of_published_excess"] = summary(models)
            record["perplexity"] = perplexities(models)
            arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if arguments.output == RESULT:
        draw(record)


if __name__ == "__main__":
    main()
