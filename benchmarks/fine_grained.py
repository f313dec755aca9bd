"""A task of fine-grained attention: what grouped heads lose, and latent attention at their bytes.

    python -m benchmarks.fine_grained

Writes results/fine_grained.json and docs/fine_grained.png. One attention layer, trained from
scratch, answers questions about a handful of items. An item is one token: a value of each of four
features, all added up, and a name. A question is one value of one feature ("the red one"), and the
answer is the name of the item that has it. Values differ between the items, so every question has
one answer, and where it stands never matters: heads have to tell four features apart by content.

Every arm takes the learning rate that is best for it with a seed that counts for nothing else.
The control has grouped heads and, in front of them, a hidden layer that brings it to as many
weights as latent attention has at the same cache. Runs that the JSON has are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import torch
from benchmarks.conversion_quality import ROOT
from matplotlib.figure import Figure
from torch import Tensor, nn

from mlakit.benching.environment import environment
from mlakit.checkpoint import write_json_atomic
from mlakit.nn.attention import LatentAttention, MultiHeadAttention
from mlakit.reporting.style import INK, QUIET, RESULT, SOURCE, STYLE, WIDTH, as_png

RESULTS = ROOT / "benchmarks" / "results" / "fine_grained.json"
PICTURE = ROOT / "docs" / "fine_grained.png"
FEATURES, VALUES, ITEMS, QUESTIONS = 4, 16, 8, 16
HIDDEN, HEADS, ROPE = 64, 8, 2
"""The layer; latent attention needs two rotary numbers, which are of no use here."""

STEPS, BATCH, RATES, SEEDS, TUNING_SEED = 1000, 32, (3e-2, 1e-1), (0, 1, 2), 99
ASKED = 512
"""Batches' worth of sequences that are answered at the end, unseen before."""


@dataclass(frozen=True)
class Arm:
    """A layer.

    Attributes:
        kind: ``grouped`` (G key/value heads), ``latent`` (C + R numbers) or ``control``.
        size: G, or C + R.
    """

    kind: str
    size: int

    @property
    def name(self) -> str:
        """In the JSON."""
        return f"{self.kind} {self.size}"

    @property
    def numbers(self) -> int:
        """Cached per token."""
        return self.size if self.kind == "latent" else 2 * self.size * HIDDEN // HEADS

    def layer(self) -> nn.Module:
        """Its attention."""
        if self.kind == "latent":
            head = HIDDEN // HEADS
            return LatentAttention(HIDDEN, HEADS, self.size - ROPE, head, ROPE, head)
        return MultiHeadAttention(HIDDEN, HEADS, self.size)

    def before(self) -> nn.Module:
        """What comes before attention: nothing, but for the control."""
        if self.kind != "control":
            return nn.Identity()
        missing = weights(Arm("latent", self.numbers).layer()) - weights(self.layer())
        return Hidden(missing // (2 * HIDDEN))


ARMS = [Arm("grouped", size) for size in (8, 4, 2, 1)]
ARMS += [Arm("latent", 32), Arm("control", 2)]


class Hidden(nn.Module):
    """One hidden layer beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, width, bias=False)
        self.down = nn.Linear(width, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x + W relu(V x)``."""
        return x + self.down(self.up(x).relu())


class Reader(nn.Module):
    """Items and questions in, one attention layer, names out."""

    def __init__(self, arm: Arm) -> None:
        super().__init__()
        self.features = nn.Embedding(FEATURES * VALUES, HIDDEN)
        self.names = nn.Embedding(VALUES, HIDDEN)
        self.before, self.attention = arm.before(), arm.layer()
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN) for _ in range(2))
        self.output = nn.Linear(HIDDEN, VALUES)

    def forward(self, items: Tensor, names: Tensor, asked: Tensor) -> Tensor:
        """Logits ``[n, questions, names]``."""
        told = self.features(items).sum(1) + self.names(names)
        x = self.before(self.norms[0](torch.cat([told, self.features(asked)], 1)))
        attended, _ = self.attention(x, causal=True)
        return self.output(self.norms[1](attended[:, ITEMS:]))


def examples(count: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values ``[n, features, items]``, names ``[n, items]``, questions, answers ``[n, 16]``."""
    order = torch.rand(count, FEATURES, VALUES, generator=draw).argsort(-1)
    items = order[..., :ITEMS] + torch.arange(FEATURES)[:, None] * VALUES
    names = torch.randint(VALUES, (count, ITEMS), generator=draw)
    feature = torch.randint(FEATURES, (count, QUESTIONS), generator=draw)
    who = torch.randint(ITEMS, (count, QUESTIONS), generator=draw)
    row = torch.arange(count)[:, None]
    return items, names, items[row, feature, who], names[row, who]


def train(arm: Arm, seed: int, rate: float, steps: int) -> float:
    """Share of new questions answered rightly after training."""
    torch.manual_seed(seed)
    model, draw = Reader(arm), torch.Generator().manual_seed(1000 + seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)

    def share(step: int) -> float:
        return min(1.0, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, share)
    for _ in range(steps):
        *asked, answers = examples(BATCH, draw)
        loss = nn.functional.cross_entropy(model(*asked).flatten(0, 1), answers.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        *asked, answers = examples(ASKED, torch.Generator().manual_seed(2000 + seed))
        return float((model(*asked).argmax(-1) == answers).float().mean())


def weights(module: nn.Module) -> int:
    """Trained numbers."""
    return sum(parameter.numel() for parameter in module.parameters())


def measure(record: dict[str, Any], steps: int) -> Iterator[str]:
    """Fills the record; after every run says which it was."""
    for arm in ARMS:
        found = record["arms"].setdefault(arm.name, {"tuned": {}, "right": {}})
        found |= {"numbers": arm.numbers, "weights": weights(arm.layer()) + weights(arm.before())}
        for rate in RATES:
            if str(rate) not in found["tuned"]:
                found["tuned"][str(rate)] = train(arm, TUNING_SEED, rate, steps)
                yield f"{arm.name}, rate {rate}: {found['tuned'][str(rate)]:.1%}"
        best = max(RATES, key=lambda rate: found["tuned"][str(rate)])
        if found.setdefault("rate", best) != best:
            found |= {"rate": best, "right": {}}
        for seed in SEEDS:
            if str(seed) not in found["right"]:
                found["right"][str(seed)] = train(arm, seed, best, steps)
                yield f"{arm.name}, seed {seed}: {found['right'][str(seed)]:.1%}"
        right = list(found["right"].values())
        found |= {"mean": fmean(right), "lowest": min(right), "highest": max(right)}


def draw(record: dict[str, Any]) -> Figure:
    """Questions answered against numbers cached: one line a kind, one dot a seed."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH * 0.72, 3.5), layout="constrained")
        axes = figure.subplots()
        kinds = {
            "grouped": ("heads of keys and values (MHA, GQA, MQA)", SOURCE, "o-"),
            "latent": ("latent (MLA)", RESULT, "s-"),
            "control": ("GQA and a hidden layer of as many weights as MLA", QUIET, "D"),
        }
        for kind, (label, colour, line) in kinds.items():
            arms = [arm for arm in ARMS if arm.kind == kind]
            rows = [record["arms"][arm.name] for arm in arms]
            x = [arm.numbers for arm in arms]
            means = [100 * row["mean"] for row in rows]
            axes.plot(x, means, line, color=colour, label=label, zorder=3)
            for place, row in zip(x, rows, strict=True):
                right = [100 * share for share in row["right"].values()]
                axes.plot([place] * len(right), right, ".", color=colour, alpha=0.45, zorder=2)
        for arm in ARMS[:4]:
            groups = {HEADS: "MHA", 1: "MQA"}.get(arm.size, f"GQA, {arm.size} heads")
            height = 100 * record["arms"][arm.name]["mean"]
            axes.annotate(
                groups, (arm.numbers, height), (8, -13), textcoords="offset points",
                fontsize=8, color=SOURCE,
            )  # fmt: skip
        axes.axhline(100 / VALUES, color=QUIET, linewidth=0.9, linestyle=":")
        axes.text(128, 100 / VALUES + 1.5, "guessing", fontsize=8, color=QUIET, ha="right")
        axes.set_xscale("log", base=2)
        places = [16, 32, 64, 128]
        axes.set_xticks(places, [str(place) for place in places], color=INK)
        axes.set_xlim(13, 158)
        axes.set_ylim(0, 104)
        axes.set_xlabel("numbers cached per token")
        axes.set_ylabel("questions answered, %")
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.12), fontsize=8.5)
    return figure


def main() -> None:
    """Trains what is missing, then draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    record: dict[str, Any] = {"arms": {}}
    if arguments.output.exists():
        record = json.loads(arguments.output.read_text(encoding="utf-8"))
    if record.setdefault("steps", arguments.steps) != arguments.steps:
        parser.error(f"{arguments.output} has runs of {record['steps']} steps")
    record["environment"] = environment()
    for told in measure(record, arguments.steps):
        print(f"{time.strftime('%H:%M:%S')} {told}", flush=True)
        write_json_atomic(arguments.output, record)
    write_json_atomic(arguments.output, record)
    arguments.picture.write_bytes(as_png(draw(record)))


if __name__ == "__main__":
    main()
