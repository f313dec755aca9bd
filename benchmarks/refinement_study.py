"""What refines a converted layer best: one change at a time to loss, steps, rate, batch and data.

    python -m benchmarks.refinement_study [MODEL ...]

Writes results/refinement_study.json. Every variant converts and refines anew, and is scored on a
text that is neither the calibration text nor the test text of conversion_quality, so what is
chosen here is not chosen on a test. What the JSON has for the same code is not measured again.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from benchmarks import conversion_quality as quality
from benchmarks.conversion_tables import size_name
from transformers import AutoTokenizer

from mlakit.benching.environment import environment
from mlakit.checkpoint import write_json_atomic
from mlakit.conversion import refine
from mlakit.conversion.apply import convert
from mlakit.data import builtin_text, token_windows
from mlakit.evaluation.quality import bootstrap, kl_divergence

RESULT = quality.ROOT / "benchmarks" / "results" / "refinement_study.json"
SIZES = ((0.375, 1), (0.375, 2), (0.125, 2))
"""Cache ratios, and the share of the head size that stays rotated."""
STEPS = 100
BASE = f"as it is, {STEPS} steps"


class Plain(refine.Refiner):
    """All directions of the output count the same."""

    def _metric(self, index: int) -> torch.Tensor | None:
        return None


class Corrected(refine.Refiner):
    """The target makes up for what separates the two residual streams."""

    def _collect_targets(self, index: int, model: Any) -> torch.Tensor | None:
        mask = super()._collect_targets(index, model)
        streams = (self.source.inputs(index), self.student.inputs(index))
        rows = range(self.target.shape[0])
        source, student = (stream.windows(rows) for stream in streams)
        self.target.write([self.target.windows(rows) + source - student])
        return mask


class Block(refine.Refiner):
    """The error after the whole layer, feed-forward block and all."""

    ahead = 0

    def _fit(self, index: int, errors: refine.Errors) -> tuple[float, float]:
        model = self.reader.layer(index).requires_grad_(False)
        model.layers[0].self_attn = errors.student
        after = range(index + 1, min(index + 1 + self.ahead, len(self.plan.layers)))
        later = [self.reader.layer(other).requires_grad_(False) for other in after]
        values = {**vars(errors), "target": self.source.inputs(index + 1)}
        return super()._fit(index, LayerErrors(**values, model=model, later=later))


class Ahead(Block):
    """The error after the source's next layer."""

    ahead = 1


@dataclass(frozen=True)
class LayerErrors(refine.Errors):
    """Errors of what a whole layer gives, or of what the source's layers after it make of that."""

    model: Any
    later: list[Any]

    def squares(self, rows: Sequence[int]) -> torch.Tensor:
        """Of these windows' errors, ``[b, T, D]``."""
        inputs = self.inputs.windows(rows).to(self.device)
        found = self.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        return self._felt(self._on(found) - self._targets(rows)).square()

    def _targets(self, rows: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            return self._on(super()._targets(rows))

    def _on(self, hidden: torch.Tensor) -> torch.Tensor:
        for model in self.later:
            hidden = model(inputs_embeds=hidden, use_cache=False).last_hidden_state
        return hidden


class Orthogonal(torch.optim.Optimizer):
    """Steps whose singular values are all about one (Muon), the momentum's in place of Adam's."""

    def __init__(self, groups: Any, **options: Any) -> None:
        super().__init__(groups, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step."""
        for group in self.param_groups:
            for part in group["params"]:
                mean = self.state[part].setdefault("mean", torch.zeros_like(part))
                mean.lerp_(part.grad, 0.1)
                turn = part.grad.lerp(mean, 0.9)
                if part.ndim == 2:
                    left, _, right = torch.linalg.svd(turn, full_matrices=False)
                    turn = left @ right * math.sqrt(max(part.shape))
                else:
                    turn = turn / turn.square().mean().sqrt().clamp_min(1e-12)
                part.sub_(turn * group["lr"])


@dataclass(frozen=True)
class Variant:
    """One change to the method as it is.

    Attributes:
        refiner: the loss.
        constants: of ``conversion.refine``, and what they are changed to.
        optimiser: in place of Adam.
        options: of ``convert``.
    """

    refiner: type[refine.Refiner] = refine.Refiner
    constants: dict[str, Any] = field(default_factory=dict)
    optimiser: type[torch.optim.Optimizer] = torch.optim.Adam
    options: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While it lasts, conversions are refined this way."""
        with ExitStack() as stack:
            stack.enter_context(patch("mlakit.conversion.run.Refiner", self.refiner))
            stack.enter_context(patch("torch.optim.Adam", self.optimiser))
            for name, value in self.constants.items():
                stack.enter_context(patch.object(refine, name, value))
            yield


def suddenly(step: int, steps: int) -> float:
    """The learning rate without its rise."""
    return refine.LEARNING_RATE * (1 + math.cos(math.pi * (step - 1) / steps)) / 2


def steps(count: int) -> Variant:
    """Another number of steps."""
    return Variant(options={"refine_steps": count})


VARIANTS = {
    "none": steps(0),
    BASE: Variant(),
    "200 steps": steps(200),
    "400 steps": steps(400),
    "loss: plain output error": Variant(Plain),
    "loss: stream difference made up for": Variant(Corrected),
    "loss: after the whole layer": Variant(Block),
    "loss: after the next layer": Variant(Ahead),
    "rate: twice": Variant(constants={"LEARNING_RATE": 2 * refine.LEARNING_RATE}),
    "rate: half": Variant(constants={"LEARNING_RATE": refine.LEARNING_RATE / 2}),
    "rate: never taken back": Variant(constants={"CHECKS": 1}),
    "rate: no rise": Variant(constants={"learning_rate": suddenly}),
    "steps of orthogonal matrices": Variant(
        constants={"LEARNING_RATE": 0.003}, optimiser=Orthogonal
    ),
    "1,024 tokens a step, 200 steps": replace(steps(200), constants={"STEP_TOKENS": 1024}),
    "4,096 tokens a step, 50 steps": replace(steps(50), constants={"STEP_TOKENS": 4096}),
    "8,192 calibration tokens": Variant(options={"calibration_tokens": 8192}),
    "32,768 calibration tokens": Variant(options={"calibration_tokens": 32768}),
}


def open_study(folder: Path, work: Path) -> quality.Case:
    """A model with its calibration text and a third text to score."""
    case = quality.open_case(folder, work)
    length, tokens = case.windows.shape[1], quality.TEST_TOKENS
    if folder.name in quality.STORIES:
        stories = (quality.SHARED / "data" / "tinystories" / "train.txt").read_text("utf-8")
        third = stories[-6 * tokens :].replace("<|endoftext|>", "")
    elif folder == quality.DEMO:
        text = builtin_text("calibration")
        cut = len(text) * 4 // 5
        case.calibration.write_text(text[:cut], encoding="utf-8")
        third = text[cut:]
    else:
        third = ""
    if third:
        found = token_windows(third, AutoTokenizer.from_pretrained(folder), length)
        windows = torch.tensor(found[: tokens // length])
    else:
        windows = quality.samples(folder, tokens, seed=2)
    scores = quality.log_probabilities(folder, windows)
    return replace(case, windows=windows, log_probabilities=scores)


def measure(case: quality.Case, goal: dict[str, int], variant: Variant) -> dict[str, Any]:
    """Converts, refines and scores."""
    options = {"refine_steps": STEPS, "calibration_tokens": quality.CALIBRATION_TOKENS}
    options |= {"calibration": case.calibration, "dtype": "float32", **goal, **variant.options}
    with tempfile.TemporaryDirectory() as folder, variant.applied():
        started = time.perf_counter()
        convert(case.folder, folder, **options)
        seconds = time.perf_counter() - started
        scores = quality.log_probabilities(Path(folder), case.windows)
    pairs = zip(case.log_probabilities, scores)
    kl = torch.stack([kl_divergence(a, b).mean() for a, b in pairs])
    losses = [quality.losses(part, case.windows) for part in (scores, case.log_probabilities)]
    return {
        "kl": bootstrap(kl.numpy(), seed=0).model_dump(),
        "excess": bootstrap(losses[0] - losses[1], seed=0).model_dump(),
        "seconds": round(seconds, 1),
        "code": quality.code(),
    }


def against_base(models: dict[str, Any]) -> dict[str, Any]:
    """By variant: KL over that of the method as it is, the geometric mean over all that has it."""
    result = {}
    for name in VARIANTS:
        logs = [
            math.log(found[name]["kl"]["value"] / found[BASE]["kl"]["value"])
            for sizes in models.values()
            for found in sizes.values()
            if BASE in found and name in found
        ]
        mean = math.exp(sum(logs) / len(logs)) if logs else None
        result[name] = {"kl": mean, "cells": len(logs)}
    return result


def main() -> None:
    """Measures what is missing; the JSON is written after every variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path, help="folders; default: all at hand")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    at_hand = sorted(path.parent for path in (quality.SHARED / "models").glob("*/config.json"))
    folders = [folder.resolve() for folder in arguments.models or [*at_hand, quality.DEMO]]
    record = quality.read(arguments.output)
    with tempfile.TemporaryDirectory() as work:
        cases = {folder: open_study(folder, Path(work)) for folder in folders}
        for ratio, halving in SIZES:
            for folder, case in cases.items():
                goal = quality.goal_of(folder, ratio, halving)
                size = size_name({"ratio": ratio, "halving": halving})
                found = record["models"].setdefault(folder.name, {}).setdefault(size, {})
                for name in arguments.variants if goal else ():
                    if found.get(name, {}).get("code") == quality.code():
                        continue
                    found[name] = measure(case, goal, VARIANTS[name])
                    record["against_base"] = against_base(record["models"])
                    record["environment"] = environment()
                    write_json_atomic(arguments.output, record)
                    kl, seconds = found[name]["kl"]["value"], found[name]["seconds"]
                    print(f"{folder.name} {size} {name}: KL {kl:.4f}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
