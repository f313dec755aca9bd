"""What compressing the cache costs: the published method, ours, and ours without each of its parts.

    python -m benchmarks.conversion_quality [MODEL ...]

Writes results/conversion_quality.json, docs/conversion_quality.md and docs/conversion_quality.png.
Conversions of real checkpoints at equal cache bytes; all methods see the same calibration windows,
as long as those that are scored; the seed chooses them (and the order of the refinement's steps).
Test text is only ever scored: nothing is chosen on it. Models that know no text we have are
calibrated and tested on separate samples of their own. Every window is scored in one pass, in which
converted models expand keys and values from the latents they would cache.

What the JSON has for the same code is not measured again, so a run that was cut off goes on where
it was, and ``--merge FILE`` takes in what another machine or checkout measured. After a change of
the code that should leave its results alone, ``--recheck N`` measures N of the older cells again:
where none moves by more than 10 % they all count as this code's, and the JSON says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks import conversion_tables
from transformers import AutoTokenizer

from mlakit.benching.environment import environment
from mlakit.checkpoint import open_checkpoint, write_json_atomic
from mlakit.conversion.apply import convert
from mlakit.conversion.goal import AUTO_STEPS, PARTS
from mlakit.data import builtin_text, token_windows
from mlakit.evaluation.quality import bootstrap, kl_divergence
from mlakit.families import read_model
from mlakit.nn.hf import load

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("MLAKIT_SHARED", ROOT.parent / "shared"))
DEMO = ROOT / "src" / "mlakit" / "assets" / "demo_model"
RESULT = ROOT / "benchmarks" / "results" / "conversion_quality.json"
STORIES = ("stories260k", "llama2xs280k")
HEADLINE = (0.5, 0.375, 1.0)
OTHERS = (0.25, 0.28, 0.125)
"""Cache ratios in the order they are measured in."""
ABLATED = ((0.5, 1), (0.375, 1), (0.5, 2))
"""Cache ratios, and the share of the head size that stays rotated, of the ablation."""
EVEN = "without ranks by layer"
SEEDS = (0, 1, 2)
MOVED = 0.1
"""By how much of itself a KL divergence may move for older cells to count as this code's. Algebra
alone moves by rounding; two hundred steps from a rounding apart end up a few per cent apart."""
CALIBRATION_TOKENS, TEST_TOKENS, LONGEST = 16384, 12288, 512
METHODS: dict[str, dict[str, Any]] = {
    "published": {"method": "transmla"},
    "ours, closed form": {"refine_steps": 0},
    "published, refined": {"method": "transmla", "refine_steps": AUTO_STEPS},
    "ours, closed form, stock layout": {
        "refine_steps": 0,
        "without": ["frequencies", "means"],
        "ranks": "even",
    },
    "ours": {},
}
WIDTH_CHOSEN = ("ours, closed form", "ours")
"""Methods that also choose the rotary width, on calibration text (``halving`` 0)."""


@dataclass(frozen=True)
class Case:
    """A model and its two texts: one to calibrate with, one to score."""

    folder: Path
    texts: str
    calibration: Path
    windows: torch.Tensor
    log_probabilities: torch.Tensor


@dataclass(frozen=True)
class Cell:
    """One conversion: ``1 / halving`` of the head size stays rotated; 0 for what it chooses."""

    kind: str
    ratio: float
    halving: int
    method: str
    seed: int

    @property
    def options(self) -> dict[str, Any]:
        """What ``convert`` is told beside the sizes."""
        if self.kind == "cells":
            return METHODS[self.method]
        if self.method == EVEN:
            return {"ranks": "even", "refine_steps": 0}
        return {"without": self.method.removeprefix("without ").split(" and "), "refine_steps": 0}


@torch.inference_mode()
def samples(folder: Path, tokens: int, seed: int) -> torch.Tensor:
    """Windows that the model draws itself, ``[windows, T]`` from its first token on."""
    model = load(folder, dtype=torch.float32)
    length = min(LONGEST, model.config.max_position_embeddings)
    start = torch.full((tokens // length, 1), model.config.bos_token_id)
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
        calibration, test = (text[: 5 * size].replace("<|endoftext|>", "") for text, size in zip(
            both, (4 * CALIBRATION_TOKENS, TEST_TOKENS), strict=True
        ))  # fmt: skip
    elif folder == DEMO:
        texts = "the package's calibration and evaluation texts"
        calibration, test = builtin_text("calibration"), builtin_text("evaluation")
    else:
        texts, test = "its own samples, drawn apart", ""
        drawn = samples(folder, 2 * CALIBRATION_TOKENS, seed=0)
        calibration = "\n".join(tokenizer.batch_decode(drawn, skip_special_tokens=True))
    path.write_text(calibration.replace("\0", ""), encoding="utf-8")
    if test:
        windows = torch.tensor(token_windows(test, tokenizer, length, TEST_TOKENS // length))
    else:
        windows = samples(folder, TEST_TOKENS, seed=1)
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


def measure(
    case: Case,
    cell: Cell,
    goal: dict[str, float],
    work: Path,
    text: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Converts and scores; intervals are 95 % bootstraps over windows.

    Args:
        case: the model and its texts.
        cell: the conversion.
        goal: its sizes.
        work: a folder for what is not kept.
        text: other amounts of calibration text than usual.
    """
    usual = {"calibration_tokens": CALIBRATION_TOKENS, "calibration_window": case.windows.shape[1]}
    with tempfile.TemporaryDirectory(dir=work) as folder:
        started = time.perf_counter()
        plan = convert(
            case.folder, folder, calibration=case.calibration, seed=cell.seed, dtype="float32",
            **(text or usual), **goal, **cell.options,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        scores = log_probabilities(Path(folder), case.windows)
    source = losses(case.log_probabilities, case.windows)
    excess = bootstrap(losses(scores, case.windows) - source, seed=0)
    kl = torch.stack([kl_divergence(a, b).mean() for a, b in zip(case.log_probabilities, scores)])
    same = (scores.argmax(-1) == case.log_probabilities.argmax(-1)).double().mean(1)
    return {
        "rank": statistics.mean(plan.ranks),
        "rope": plan.target.qk_rope_head_dim,
        "perplexity": math.exp(source.mean() + excess.value),
        "excess": excess.model_dump(),
        "kl": bootstrap(kl.numpy(), seed=0).model_dump(),
        "top1": bootstrap(same.numpy(), seed=0).model_dump(),
        "steps": plan.goal.steps,
        "seconds": round(seconds, 2),
        "code": code(),
    }


@cache
def code() -> str:
    """Names the state of everything that a conversion's figures depend on."""
    rooms = [ROOT / "src" / "mlakit" / room for room in ("conversion", "nn")]
    files = sorted(path for room in rooms for path in room.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def goal_of(folder: Path, ratio: float, halving: int) -> dict[str, float] | None:
    """Rotary width at a share of the cache; None where no rank is left."""
    if not halving:
        return {"cache_ratio": ratio}
    layer = read_model(open_checkpoint(folder).config).layers[0]
    rope = layer.head_dim // halving
    rank = math.floor(ratio * layer.cache_width + 1e-9) - rope
    return {"cache_ratio": ratio, "qk_rope_head_dim": rope} if rank > 0 else None


def cells(seeds: list[int], methods: list[str]) -> Iterator[Cell]:
    """What is measured of every model, the headline first."""
    first = [method for method in methods if "closed form" not in method]
    rest = [method for method in methods if method not in first]
    for seed in seeds:
        yield from _grid(HEADLINE, first, seed)
        yield from _grid(HEADLINE, rest, seed)
        for ratio, halving in ABLATED if seed == seeds[0] else ():
            for part in PARTS:
                without = "frequencies and theta" if part == "theta" else part
                yield Cell("ablation", ratio, halving, f"without {without}", seed)
            yield Cell("ablation", ratio, halving, EVEN, seed)
        yield from _grid(OTHERS, methods, seed)


def _grid(ratios: Sequence[float], methods: list[str], seed: int) -> Iterator[Cell]:
    for ratio in ratios:
        for halving in (1, 2, 0):
            for method in methods if halving else [m for m in methods if m in WIDTH_CHOSEN]:
                yield Cell("cells", ratio, halving, method, seed)


def place(cell: dict[str, Any]) -> tuple[Any, ...]:
    """Which conversion a measured cell is of; also their order."""
    return -cell["ratio"], cell["halving"], cell["method"], cell["seed"]


def store(record: dict[str, Any], name: str, kind: str, found: dict[str, Any]) -> None:
    """Puts a measured cell in place of an older one of the same conversion."""
    known = {place(cell): cell for cell in record["models"][name][kind]}
    known[place(found)] = found
    record["models"][name][kind] = [known[key] for key in sorted(known)]


def has(record: dict[str, Any], name: str, cell: Cell) -> bool:
    """Whether this code has measured this conversion."""
    wanted = {key: value for key, value in vars(cell).items() if key != "kind"} | {"code": code()}
    known = record["models"].get(name, {cell.kind: []})[cell.kind]
    return any(wanted.items() <= old.items() for old in known)


def write(record: dict[str, Any], output: Path) -> None:
    """The JSON with what follows from its cells; beside the repository's, page and picture."""
    sizes = [(ratio, halving) for ratio in (*HEADLINE, *OTHERS) for halving in (1, 2, 0)]
    parts = [cell.method for cell in cells([0], []) if (cell.ratio, cell.halving) == ABLATED[0]]
    record["share_of_published_excess"] = conversion_tables.shares(record["models"], sizes)
    record["ablation"] = conversion_tables.ablation(record["models"], list(ABLATED), parts)
    write_json_atomic(output, record)
    if output == RESULT:
        conversion_tables.write_page(record)


def read(path: Path) -> dict[str, Any]:
    """A record, empty where there is no file."""
    empty: dict[str, Any] = {"models": {}}
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else empty


def merge(record: dict[str, Any], other: dict[str, Any]) -> None:
    """Takes another record's cells in."""
    for name, model in other["models"].items():
        facts = {key: value for key, value in model.items() if key not in ("cells", "ablation")}
        record["models"].setdefault(name, {"cells": [], "ablation": []}).update(facts)
        for kind in ("cells", "ablation"):
            for cell in model[kind]:
                store(record, name, kind, cell)
    record["environment"] = other["environment"]


def run(folders: list[Path], work: Path, arguments: argparse.Namespace) -> None:
    """Measures what is missing, and writes the record after every conversion."""
    cases: dict[Path, Case] = {}
    for cell in cells(arguments.seeds, arguments.methods):
        for folder in folders:
            record, name = read(arguments.output), folder.name
            goal = goal_of(folder, cell.ratio, cell.halving)
            if goal is None or has(record, name, cell):
                continue
            if folder not in cases:
                cases[folder] = open_case(folder, work)
            case = cases[folder]
            source = losses(case.log_probabilities, case.windows)
            model = record["models"].setdefault(name, {"cells": [], "ablation": []})
            model |= {"texts": case.texts, "source_perplexity": float(np.exp(source.mean()))}
            sizes = {"ratio": cell.ratio, "halving": cell.halving}
            found = {**sizes, "method": cell.method, "seed": cell.seed}
            found |= measure(case, cell, goal, work)
            store(record, name, cell.kind, found)
            record["environment"] = environment()
            write(record, arguments.output)
            print(
                f"{name}: {cell.ratio:.1%} rope {found['rope']} + rank {found['rank']:.4g}"
                f" {cell.method}, seed {cell.seed}: {found['perplexity']:.4g},"
                f" KL {found['kl']['value']:.3g}, top-1 {found['top1']['value']:.1%},"
                f" {found['seconds']:.0f} s",
                flush=True,
            )


def recheck(folders: list[Path], work: Path, output: Path, count: int) -> None:
    """Measures some of the cells that older code measured, and takes over all if none moves."""
    record, cases = read(output), {}
    known = {folder.name: folder for folder in folders}
    old = [
        (known[name], kind, cell)
        for name, model in record["models"].items()
        for kind in ("cells", "ablation")
        for cell in model[kind]
        if name in known and cell["code"] != code()
    ]
    picked = random.Random(code()).sample(old, min(count, len(old)))
    moved = []
    for folder, kind, cell in picked:
        case = cases.get(folder) or cases.setdefault(folder, open_case(folder, work))
        goal = goal_of(folder, cell["ratio"], cell["halving"])
        assert goal is not None
        again = Cell(kind, *(cell[key] for key in ("ratio", "halving", "method", "seed")))
        found = measure(case, again, goal, work)["kl"]["value"]
        moved.append(abs(found / cell["kl"]["value"] - 1))
        print(f"{folder.name} {again}: KL {cell['kl']['value']:.6g}, now {found:.6g}", flush=True)
    if not moved or max(moved) > MOVED:
        return
    earlier = sorted({cell["code"] for _, _, cell in old})
    fact = {"from": earlier, "to": code(), "cells": len(old), "measured_again": len(moved)}
    record.setdefault("rechecks", []).append(fact | {"most_moved": max(moved)})
    for _, _, cell in old:
        cell["code"] = code()
    write(record, output)


def main() -> None:
    """Measures the models given, or all at hand; or takes in what was measured elsewhere."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path, help="folders; default: all at hand")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--merge", type=Path, help="a JSON of another run; nothing is measured")
    parser.add_argument("--recheck", type=int, metavar="N", help="measure N older cells again")
    arguments = parser.parse_args()
    if arguments.merge:
        record = read(arguments.output)
        merge(record, read(arguments.merge))
        write(record, arguments.output)
        return
    at_hand = sorted(path.parent for path in (SHARED / "models").glob("*/config.json"))
    folders = [folder.resolve() for folder in arguments.models or [*at_hand, DEMO]]
    with tempfile.TemporaryDirectory() as work:
        if arguments.recheck:
            recheck(folders, Path(work), arguments.output, arguments.recheck)
        else:
            run(folders, Path(work), arguments)


if __name__ == "__main__":
    main()
