"""What a run did and gained: ``heal.json``, and the same in words."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlakit.checkpoint import write_json_atomic
from mlakit.healing.journal import Journal, Row
from mlakit.reporting.style import percent

REPORT_NAME = "heal.json"
NOTHING_GAINED = (
    "Nothing was gained: no check was better than the start, so the weights are as they were"
)


@dataclass(frozen=True)
class ArmReport:
    """One arm.

    Attributes:
        trained: parameters that trained.
        parameters: of the whole model.
        rates: the smallest and the largest learning rate of a weight.
        steps: optimiser steps done.
        tokens: read in them.
        seconds: that it took, checks included.
        stopped: why it ended.
        best: the check whose weights were kept.
        checks: all of them, the untrained model's first.
        losses: of every step.
        events: faults, and what was done about them.
    """

    trained: int
    parameters: int
    rates: tuple[float, float]
    steps: int
    tokens: int
    seconds: float
    stopped: str
    best: Row
    checks: list[Row]
    losses: list[Row]
    events: list[Row]

    @property
    def before(self) -> Row:
        """The check before any training."""
        return self.checks[0]


@dataclass(frozen=True)
class HealReport:
    """A run.

    Attributes:
        key: tells this run from others.
        student: what was healed.
        teacher: its original.
        fingerprints: of both.
        recipe: every setting as it was used.
        texts: the training texts.
        windows: in one epoch.
        window_length: tokens per window.
        held_out: what was measured on, and how.
        healed: the student's arm.
        control: the original's, if there was one.
        after: the written result, measured again from its files.
        raised_norm: exponent of the latent norm where training made it necessary to raise it.
        environment: versions and machine.
        processes: how many shared the work.
        cache_share: the student's cached bytes per token over the original's.
    """

    key: str
    student: str
    teacher: str
    fingerprints: dict[str, str]
    recipe: dict[str, Any]
    texts: list[dict[str, Any]]
    windows: int
    window_length: int
    held_out: dict[str, Any]
    healed: ArmReport
    control: ArmReport | None
    after: dict[str, Any]
    raised_norm: int | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    cache_share: float | None = None

    @property
    def original_perplexity(self) -> float:
        """Of the teacher, on the held-out windows."""
        return math.exp(float(self.after["original_nll"]))

    @property
    def nothing_gained(self) -> bool:
        """Whether no check was better than the start, so that the student was written as it was."""
        return not self.healed.best["step"]

    def rows(self) -> list[tuple[str, float, float, int]]:
        """Name, perplexity, KL from the original and trained tokens of every model."""
        found = [
            ("original", self.original_perplexity, 0.0, 0),
            ("converted", self.healed.before["perplexity"], self.healed.before["kl"], 0),
            ("healed", self.after["perplexity"], self.after["kl"], self.healed.best["tokens"]),
        ]
        if self.control is not None:
            best = self.control.best
            found.append(("control", best["perplexity"], best["kl"], best["tokens"]))
        return found

    def write(self, folder: Path) -> None:
        """Writes ``heal.json``."""
        write_json_atomic(folder / REPORT_NAME, asdict(self))

    def card_lines(self) -> list[str]:
        """The section of the model card."""
        texts = ", ".join(text["place"] for text in self.texts)
        lines = [f"{NOTHING_GAINED}.", ""] if self.nothing_gained else []
        lines += [
            f"Trained: {self.healed.trained:,} of {self.healed.parameters:,} parameters"
            f" (`--train {self.recipe['train']}`), {self.healed.best['tokens']:,} tokens of"
            f" {texts}, learning rate {rates_in_words(self.healed.rates)};"
            f" losses: {losses_in_words(self.recipe)}.",
            f"It ended because: {self.healed.stopped}.",
            "",
            *([f"{cache_in_words(self.cache_share)}.", ""] if self.cache_share else []),
            f"Measured on {self.held_out['windows']} windows of {self.held_out['text']}, after a"
            f" cached prefix of {self.held_out['prefix_length']} tokens:",
            "",
            "| model | perplexity | KL from the original, nats | tokens trained |",
            "|---|---|---|---|",
            *(f"| {name} | {ppl:.4f} | {kl:.4g} | {n:,} |" for name, ppl, kl, n in self.rows()),
        ]
        if self.control is not None:
            lines += ["", "control: the original itself, trained likewise on the same texts."]
        for event in (self.control.events if self.control else []) + self.healed.events:
            lines += ["", f"Note: {event_in_words(event)}."]
        return lines


def read_heal_report(folder: Path) -> HealReport:
    """Reads ``heal.json`` back."""
    facts = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
    for name in ("healed", "control"):
        facts[name] = ArmReport(**facts[name]) if facts[name] else None
    return HealReport(**facts)


def arm_report(
    journal: Journal, arm: str, trained: int, parameters: int, rates: tuple[float, float]
) -> ArmReport:
    """What the journal says of an arm."""
    losses = journal.of(arm, "step")
    return ArmReport(
        trained=trained,
        parameters=parameters,
        rates=rates,
        steps=losses[-1]["step"] if losses else 0,
        tokens=losses[-1]["tokens"] if losses else 0,
        seconds=journal.seconds(arm),
        stopped=journal.stopped(arm) or "",
        best=journal.best(arm),
        checks=journal.of(arm, "check"),
        losses=losses,
        events=journal.of(arm, "event"),
    )


def cache_in_words(share: float) -> str:
    """Bytes to every statement of quality; training changes none."""
    return f"It caches {percent(round(100 * share, 1))} of the original's bytes per token"


def rates_in_words(rates: tuple[float, float]) -> str:
    """One rate, or from the smallest to the largest."""
    low, high = rates
    return f"{high:.3g}" if low == high else f"{low:.2g} to {high:.2g} by the size of each weight"


def losses_in_words(recipe: dict[str, Any]) -> str:
    """The mix of losses."""
    parts = []
    if recipe["layer_steps"]:
        parts.append(f"{recipe['layer_steps']} steps on attention outputs, then")
    top = f" over the top {recipe['top_k']} tokens" if recipe["top_k"] else ""
    named = {
        "kl_weight": f"KL to the original{top}",
        "ce_weight": "next token",
        "layer_weight": "attention outputs",
    }
    weighed = [f"{recipe[key]:g} x {name}" for key, name in named.items() if recipe[key]]
    return " ".join([*parts, " + ".join(weighed)])


def event_in_words(event: Row) -> str:
    """What was done about a fault."""
    where = f"{event['arm']}, step {event['step']}"
    if event["what"] == "out of memory":
        return (
            f"{where}: out of memory; micro batches of {event['micro_batch']} windows from here on,"
            f" {event['accumulation']} per step"
        )
    if event["what"] == "diverged":
        return (
            f"{where}: {event['why']}; back to step {event['back_to']} at {event['scale']:g} of the"
            " learning rate"
        )
    return f"{where}: {event['what']}"
