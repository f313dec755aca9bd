"""What a healing run does: one frozen record, its presets, and its checks. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from mlakit.errors import UsageError

Part = Literal["kv", "attention", "all", "lora"]
PARTS = ("kv", "attention", "all", "lora")
DTYPES = ("float32", "bfloat16")

SMOLTALK_MATHS = "maths=HuggingFaceTB/smoltalk:metamathqa-50k:train:messages"
SMOLTALK_CODE = "code=HuggingFaceTB/smoltalk:self-oss-instruct:train:messages"
R1_TRACES = "traces=open-r1/OpenR1-Math-220k:default:train:messages"


@dataclass(frozen=True)
class Recipe:
    """Settings of a run; every one is a flag and an argument of the same name.

    Attributes:
        data: texts to train on, each ``place`` or ``name=place`` as ``mlakit.data`` reads them.
        weights: share of each text, in order; None takes all of every text.
        completion_only: only what the assistant says, or completions, count in the loss.
        train: ``kv`` (the latent's down- and up-projections), ``attention``, ``all``, or ``lora``
            (a low-rank change of every attention matrix, merged at the end).
        lora_rank: rank of that change.
        ce_weight: of the next token's negative log-likelihood.
        kl_weight: of KL(teacher || student) per token.
        layer_weight: of the relative squared error of every attention block's output, on the
            teacher's own inputs.
        layer_steps: the first steps take that error alone: no logits are computed.
        temperature: both distributions of the KL are softened by it.
        top_k: the KL tells apart the teacher's most likely k tokens only and counts all others as
            one; 0 for all tokens.
        learning_rate: AdamW's largest; None for one of each weight's own, ``rates.AUTO_RATE`` of
            its root mean square.
        weight_decay: AdamW's.
        warmup: share of the steps in which the rate rises; then it falls along a cosine to 0.
        batch: windows per optimiser step, over all processes.
        micro_batch: windows that one process holds at a time; None for about 8,192 tokens.
        sequence_length: tokens per window; None for the context, at most 2,048.
        epochs: passes over the data.
        steps: optimiser steps, instead of epochs.
        checks: how often, evenly spaced, the held-out windows are measured and a checkpoint is
            written.
        patience: checks without a better held-out objective after which the run stops.
        held_out_windows: windows that are measured.
        checkpointing: recompute activations in the backward pass instead of keeping them.
        seed: order of the windows.
        dtype: what the run computes in; trained weights are float32 in any case. None for
            bfloat16 on a GPU, else float32.
    """

    data: tuple[str, ...] = ()
    weights: tuple[float, ...] | None = None
    completion_only: bool = False
    train: Part = "kv"
    lora_rank: int = 16
    ce_weight: float = 0.0
    kl_weight: float = 1.0
    layer_weight: float = 0.0
    layer_steps: int = 0
    temperature: float = 1.0
    top_k: int = 0
    learning_rate: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.05
    batch: int = 16
    micro_batch: int | None = None
    sequence_length: int | None = None
    epochs: float = 1.0
    steps: int | None = None
    checks: int = 10
    patience: int = 3
    held_out_windows: int = 16
    checkpointing: bool = False
    seed: int = 0
    dtype: str | None = None

    def __post_init__(self) -> None:
        positive = ("lora_rank", "temperature", "batch", "epochs", "checks", "patience")
        for name in (*positive, "held_out_windows"):
            if getattr(self, name) <= 0:
                raise _refusal(name, getattr(self, name), "must be above 0")
        for name in ("micro_batch", "steps", "sequence_length", "learning_rate"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise _refusal(name, getattr(self, name), "must be above 0")
        for name in ("ce_weight", "kl_weight", "layer_weight", "layer_steps", "top_k", "seed"):
            if getattr(self, name) < 0:
                raise _refusal(name, getattr(self, name), "must not be below 0")
        if not 0 <= self.warmup <= 1:
            raise _refusal("warmup", self.warmup, "is a share of the steps, 0 to 1")
        if self.train not in PARTS:
            raise _refusal("train", self.train, f"is none of {', '.join(PARTS)}")
        if self.dtype not in (None, *DTYPES):
            raise _refusal("dtype", self.dtype, f"is none of {', '.join(DTYPES)}")
        if not self.ce_weight + self.kl_weight + self.layer_weight:
            raise UsageError(
                "every loss has the weight 0: there is nothing to learn",
                remedy="give --kl-weight 1 or --ce-weight 1",
            )
        if self.weights is not None and len(self.weights) != len(self.data):
            raise UsageError(
                f"{len(self.weights)} weights were given for {len(self.data)} texts",
                remedy="give one --weights number per --data, in the same order",
            )
        if self.weights is not None and min(self.weights) <= 0:
            raise _refusal("weights", self.weights, "must be above 0")

    def held_out_objective(self, nll: float, kl: float) -> float:
        """What a check judges by: the run's own mix of losses; KL where that has no logits."""
        if not self.ce_weight + self.kl_weight:
            return kl
        return self.ce_weight * nll + self.kl_weight * kl


ARTICLE = Recipe(
    data=(SMOLTALK_MATHS, SMOLTALK_CODE),
    completion_only=True,
    ce_weight=1.0,
    kl_weight=0.0,
    learning_rate=2e-5,
    batch=16,
    epochs=2.0,
)
"""The TransMLA article's fine-tuning (arXiv 2502.07864, section 4): data, batch, rate, epochs."""

R1 = Recipe(
    data=(R1_TRACES,),
    completion_only=True,
    ce_weight=1.0,
    kl_weight=0.0,
    learning_rate=1e-5,
    batch=16,
    sequence_length=8192,
    epochs=1.0,
)
"""Distillation from the reasoning traces that another model, such as DeepSeek-R1, has written."""

RECIPES = {"default": Recipe(), "article": ARTICLE, "r1": R1}


def choose_recipe(recipe: str | Recipe, given: Mapping[str, Any]) -> Recipe:
    """A preset or a whole recipe, with what was given in place of its own settings.

    Args:
        recipe: a name of ``RECIPES``, or settings.
        given: by name; None means not given.

    Raises:
        UsageError: an unknown preset or setting, or one that makes no sense.
    """
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise UsageError(
                f"there is no recipe {recipe!r}", remedy=f"use one of {', '.join(RECIPES)}"
            )
        recipe = RECIPES[recipe]
    known = [field.name for field in fields(Recipe)]
    for name in given.keys() - set(known):
        raise UsageError(
            f"heal has no setting {name!r}", remedy=f"the settings are {', '.join(known)}"
        )
    changed = {name: value for name, value in given.items() if value is not None}
    for name, kind in (("data", str), ("weights", float)):
        if name in changed:
            value = changed[name]
            alone = isinstance(value, str | Path | int | float)
            changed[name] = tuple(map(kind, (value,) if alone else value))
    if "lora_rank" in changed and changed.get("train", recipe.train) != "lora":
        raise UsageError(
            "--lora-rank is for --train lora", remedy="add --train lora, or leave the rank out"
        )
    if "data" in changed and "weights" not in changed:
        changed["weights"] = None
    return replace(recipe, **changed)


def _refusal(name: str, value: object, why: str) -> UsageError:
    return UsageError(f"--{name.replace('_', '-')} {value} {why}")
