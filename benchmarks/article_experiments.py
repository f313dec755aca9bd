"""The TransMLA article's claims on small real models: what more expressive keys and values give.

    python -m benchmarks.article_experiments [MODEL ...]

Writes results/article_experiments.json and docs/article.png. Four experiments
(arXiv 2502.07864):

* ``witness``, theorem 1: how many directions of the hidden space two heads of one group look at
  together, before conversion, after it and after training.
* ``beyond``: equal-cache latent attention against its source, fine-tuned on a text that is new to
  both, on the same tokens: keys and values alone, the source also with as many trained weights
  or more. Every arm has its own learning rate, chosen on the end of the training text.
* ``start``: the same with the decomposition replaced by the identity or by random rotations, at
  equal parameters and the same function to begin with.
* ``heal``: tokens that a compressed model needs to come within 1 % and 0.1 % of its source's
  perplexity: the published conversion, ours by algebra alone, and ours.

Texts named test or valid are only measured on. Runs that the JSON has are not repeated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from benchmarks import article_tables
from benchmarks.conversion_quality import ROOT, SHARED

from mlakit.benching.environment import environment
from mlakit.checkpoint import Checkpoint, open_checkpoint, write_json_atomic
from mlakit.conversion import factor
from mlakit.conversion.apply import convert
from mlakit.families import FAMILIES, read_model
from mlakit.healing import trainable
from mlakit.healing.recipe import Recipe
from mlakit.healing.report import HealReport
from mlakit.healing.run import heal

RESULT = ROOT / "benchmarks" / "results" / "article_experiments.json"
MODELS = ("stories260k", "llama2xs280k")
NEW_TEXT = ("wikitext-103/train_first2.9MB.txt", "wikitext-103/valid.txt")
OWN_TEXT = ("tinystories/train.txt", "tinystories/valid.txt")
"""Below shared/data: to train on, to measure on."""
RATES = (3e-3, 1e-2, 3e-2)
SEEDS = (0, 1, 2)
TUNED_WITH = 100
NEXT_TOKEN = {"ce_weight": 1.0, "kl_weight": 0.0}
WITHIN = (0.01, 0.001)
RATIOS = (0.5, 0.375)
CONVERSIONS: dict[str, dict[str, Any]] = {
    "published": {"method": "transmla", "qk_rope_head_dim": None},
    "ours, closed form": {"refine_steps": 0},
    "ours": {},
}


@dataclass(frozen=True)
class Arm:
    """A student and what of it trains."""

    start: str | None
    train: str
    queries: bool = False

    @property
    def experiment(self) -> str:
        """Which one it belongs to."""
        return "start" if self.start in ("identity", "random") else "beyond"


ARMS = {
    "MLA, keys and values": Arm("svd", "kv"),
    "GQA, keys and values": Arm(None, "kv"),
    "GQA, keys, values and queries": Arm(None, "kv", queries=True),
    "MLA, attention": Arm("svd", "attention"),
    "GQA, attention": Arm(None, "attention"),
    "MLA from the identity": Arm("identity", "kv"),
    "MLA from random rotations": Arm("random", "kv"),
}


def start_from(name: str) -> Any:
    """What stands in place of left singular vectors in an equal-cache conversion."""
    draw = torch.Generator().manual_seed(0)

    def rotation(matrix: torch.Tensor) -> torch.Tensor:
        shape = (*matrix.shape[:-2], matrix.shape[-2], matrix.shape[-2])
        if name == "identity":
            return torch.eye(shape[-1], dtype=matrix.dtype).expand(shape)
        drawn = torch.randn(shape, dtype=matrix.dtype, generator=draw)
        return torch.linalg.qr(drawn).Q

    return rotation


@contextmanager
def training_queries(wanted: bool) -> Iterator[None]:
    """The part ``kv`` of an ordinary model takes in its queries as well."""
    parts = (*trainable.ORDINARY_KV, "q_proj") if wanted else trainable.ORDINARY_KV
    with patch.object(trainable, "ORDINARY_KV", parts):
        yield


class Bench:
    """The experiments on one model.

    Args:
        folder: the source.
        work: for conversions.
        output: the JSON.
        steps: optimiser steps of every run, of 2,048 tokens each.
    """

    def __init__(self, folder: Path, work: Path, output: Path, steps: int) -> None:
        self.folder, self.work, self.output, self.steps = folder, work, output, steps

    def run(self, experiments: list[str]) -> None:
        """All experiments named, in the order of the article."""
        if "beyond" in experiments or "start" in experiments:
            for seed in (None, *SEEDS):
                for name, arm in ARMS.items():
                    if (
                        "start" if arm.start in ("identity", "random") else "beyond"
                    ) in experiments:
                        self.fine_tune(name, arm, seed)
        if "witness" in experiments:
            self.witness()
        if "heal" in experiments:
            for ratio in RATIOS:
                for name, options in CONVERSIONS.items():
                    self.heal(ratio, name, options)

    def record(self) -> dict[str, Any]:
        """What is known of this model."""
        whole = json.loads(self.output.read_text()) if self.output.exists() else {"models": {}}
        found = whole["models"].setdefault(self.folder.name, {})
        return {**{name: {} for name in ("tuning", "runs", "heal", "witness")}, **found}

    def keep(self, kind: str, name: str, facts: Any) -> None:
        """Puts a result into the JSON, and what follows from all."""
        whole = json.loads(self.output.read_text()) if self.output.exists() else {"models": {}}
        whole["models"][self.folder.name] = self.record()
        whole["models"][self.folder.name][kind][name] = facts
        whole |= {"environment": environment(), "steps": self.steps}
        whole["summary"] = article_tables.summary(whole["models"])
        write_json_atomic(self.output, whole)
        if self.output == RESULT:
            article_tables.write_picture(whole, ROOT / "docs" / "article.png")

    def equal_cache(self, start: str) -> Path:
        """The source in equal-cache form; the same function from any start."""
        folder = self.work / f"{self.folder.name}-{start}"
        if not folder.exists():
            if start == "svd":
                convert(self.folder, folder, equal_cache=True, dtype="float32")
            else:
                with patch.object(factor, "_left_singular_vectors", start_from(start)):
                    convert(self.folder, folder, equal_cache=True, dtype="float32")
        return folder

    def fine_tune(self, name: str, arm: Arm, seed: int | None) -> None:
        """Chooses an arm's rate (no seed), or trains it at that rate."""
        if seed is None:
            for rate in RATES:
                if f"{name}, {rate:g}" not in self.record()["tuning"]:
                    found = self.train(arm, rate, TUNED_WITH, held_out=None)
                    self.keep("tuning", f"{name}, {rate:g}", found)
            return
        if f"{name}, seed {seed}" in self.record()["runs"]:
            return
        tuned = self.record()["tuning"]
        best = min(RATES, key=lambda rate: min(tuned[f"{name}, {rate:g}"]["nll"]))
        found = self.train(arm, best, seed, held_out=NEW_TEXT[1])
        self.keep("runs", f"{name}, seed {seed}", {**found, "arm": name, "rate": best})

    def train(self, arm: Arm, rate: float, seed: int, held_out: str | None) -> dict[str, Any]:
        """One run; the held-out loss over tokens."""
        student = self.folder if arm.start is None else self.equal_cache(arm.start)
        recipe = self.recipe(
            NEW_TEXT[0],
            train=arm.train,
            ce_weight=1.0,
            kl_weight=0.0,
            learning_rate=rate,
            seed=seed,
        )
        measured = None if held_out is None else SHARED / "data" / held_out
        with training_queries(arm.queries):
            report = heal(student, teacher=self.folder, recipe=recipe, held_out=measured)
        return curve(report)

    def recipe(self, text: str, **changes: Any) -> Recipe:
        """2,048 tokens a step, measured eleven times, never stopped early."""
        common = {"batch": 8, "sequence_length": 256, "checks": 10, "patience": 1000}
        place = str(SHARED / "data" / text)
        return Recipe(data=(place,), steps=self.steps, **{**common, **changes})

    def heal(self, ratio: float, name: str, options: dict[str, Any]) -> None:
        """Heals a compressed model on text of the source's own kind."""
        key = f"{ratio:g}, {name}"
        if key in self.record()["heal"]:
            return
        text, measured = (SHARED / "data" / part for part in OWN_TEXT)
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            goal = {"cache_ratio": ratio, "qk_rope_head_dim": self.head_dim, **options}
            goal |= {"calibration": text, "calibration_tokens": 16384, "dtype": "float32"}
            convert(self.folder, folder, **{k: v for k, v in goal.items() if v is not None})
            recipe = self.recipe(OWN_TEXT[0], checks=20)
            report = heal(folder, teacher=self.folder, recipe=recipe, held_out=measured)
        found = curve(report)
        original = report.healed.before["original_nll"]
        reached = {f"{100 * share:g}": tokens_to(found, original, share) for share in WITHIN}
        self.keep("heal", key, {**found, "original_nll": original, "tokens_to_percent": reached})

    @property
    def head_dim(self) -> int:
        """d, which stays rotated in every compressed model."""
        return read_model(open_checkpoint(self.folder).config).layers[0].head_dim

    def witness(self) -> None:
        """Joint ranks before conversion, after it, and after training."""
        if self.record()["witness"]:
            return
        converted = self.equal_cache("svd")
        self.keep("witness", "source", witness(open_checkpoint(self.folder)))
        self.keep("witness", "converted", witness(open_checkpoint(converted)))
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            trained = Path(folder) / "trained"
            recipe = self.recipe(NEW_TEXT[0], **NEXT_TOKEN, learning_rate=RATES[1])
            heal(converted, trained, teacher=self.folder, recipe=recipe)
            self.keep("witness", "trained", witness(open_checkpoint(trained)))


def curve(report: HealReport) -> dict[str, Any]:
    """Held-out loss over tokens, and what trained."""
    checks = report.healed.checks
    return {
        "tokens": [check["tokens"] for check in checks],
        "nll": [check["nll"] for check in checks],
        "kl": [check["kl"] for check in checks],
        "trained": report.healed.trained,
        "seconds": round(report.healed.seconds, 1),
    }


def tokens_to(found: dict[str, Any], original: float, share: float) -> float | None:
    """Tokens until the perplexity is within a share of the original's; None where it never is."""
    wanted = original + torch.log1p(torch.tensor(share, dtype=torch.float64)).item()
    before: tuple[float, float] | None = None
    for tokens, nll in zip(found["tokens"], found["nll"], strict=True):
        if nll <= wanted:
            if before is None:
                return float(tokens)
            part = (before[1] - wanted) / (before[1] - nll)
            return before[0] + part * (tokens - before[0])
        before = tokens, nll
    return None


@dataclass(frozen=True)
class Joint:
    """Two heads of one group, looked at together; means over pairs and layers.

    Attributes:
        head_dim: d, what one head looks at, and all heads of a group in grouped attention.
        key_rank: of the pair's bilinear forms of queries and keys, stacked.
        key_energy: share of their squared singular values beyond the first d.
        value_rank: of both heads' maps to what they put out, stacked.
        value_energy: share beyond the first d.
    """

    head_dim: int
    key_rank: float
    key_energy: float
    value_rank: float
    value_energy: float


def witness(checkpoint: Checkpoint) -> dict[str, Any]:
    """Measures all pairs of neighbouring heads that share a group in the source."""
    model = read_model(checkpoint.config)
    family = FAMILIES[model.family]
    found: list[tuple[float, float, float, float]] = []
    for index, layer in enumerate(model.layers):
        prefix = family.attention_prefix(index)

        def read(name: str, prefix: str = prefix) -> torch.Tensor:
            return checkpoint.read(f"{prefix}{name}.weight").double()

        heads, dim = layer.num_attention_heads, layer.head_dim
        groups = layer.source_kv_heads or layer.num_key_value_heads
        query = read("q_proj").unflatten(0, (heads, -1))
        if layer.kv_lora_rank is None:
            repeats = heads // groups
            key, value = (
                read(name).unflatten(0, (groups, -1)).repeat_interleave(repeats, 0)
                for name in ("k_proj", "v_proj")
            )
        else:
            dim = query.shape[1]
            down = read("kv_a_proj_with_mqa")
            key = read("q_up_proj").mT @ down[layer.kv_lora_rank :]
            value = read("kv_b_proj").unflatten(0, (heads, -1)) @ down[: layer.kv_lora_rank]
        forms = query.mT @ key  # [H, D, D]
        for head in range(0, heads - 1, 2):
            pair = [torch.cat([part[head], part[head + 1]]) for part in (forms, value)]
            found.append(tuple(part for whole in pair for part in joint(whole, dim)))  # type: ignore[arg-type]
    means = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
    return asdict(Joint(dim, *means))


def joint(matrix: torch.Tensor, dim: int) -> tuple[float, float]:
    """Its numerical rank in float32, and the share of its energy beyond ``dim`` directions."""
    sizes = torch.linalg.svdvals(matrix)
    rank = int((sizes > 1e-5 * sizes[0]).sum())
    energy = sizes.square()
    return float(rank), float(energy[dim:].sum() / energy.sum())


def main() -> None:
    """Measures the models given, or two of those at hand."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path, help="folders")
    known = ["witness", "beyond", "start", "heal"]
    parser.add_argument("--only", nargs="+", choices=known, default=known)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    folders = arguments.models or [SHARED / "models" / name for name in MODELS]
    with tempfile.TemporaryDirectory() as work:
        for folder in folders:
            Bench(folder.resolve(), Path(work), arguments.output, arguments.steps).run(
                arguments.only
            )


if __name__ == "__main__":
    main()
