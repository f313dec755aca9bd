"""What happens beside training: log, checks on held-out windows, early stop, the best state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mlakit.checkpoint import write_json_atomic
from mlakit.errors import MlakitError
from mlakit.evaluation.quality import Windows
from mlakit.evaluation.subject import Subject
from mlakit.healing.journal import Journal, Row
from mlakit.healing.measure import measure
from mlakit.healing.pair import FIGURES
from mlakit.healing.states import copy_tensors
from mlakit.healing.trainer import DONE, WEIGHTS, Diverged, HealTrainer

BEST_NAME = "best.safetensors"
Told = Callable[[Row], None]
"""Told about every step, check and event."""


class Watch(TrainerCallback):
    """Keeps one arm's journal and ends it when healing stops helping.

    Args:
        arm: its name.
        journal: of the run.
        original: what is healed towards.
        student: what trains.
        windows: held-out.
        folder: of the arm.
        told: called with every row.
    """

    def __init__(
        self,
        arm: str,
        journal: Journal,
        original: Subject,
        student: Subject,
        windows: Windows,
        folder: Path,
        told: Told,
    ) -> None:
        self.arm, self.journal, self.told = arm, journal, told
        self.original, self.student, self.windows = original, student, windows
        self.folder = folder
        self.trainer: HealTrainer
        self.started = time.monotonic()

    def add(self, kind: str, step: int, **facts: Any) -> None:
        """A row of this arm."""
        self.told(self.journal.add(self.arm, kind, step, **facts))

    @property
    def seconds(self) -> float:
        """Time spent on this arm, over all starts."""
        return time.monotonic() - self.started

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """The clock goes on where it stood; the untrained student is measured once."""
        self.started = time.monotonic() - self.journal.seconds(self.arm)
        if not self.journal.of(self.arm, "check"):
            self.check(state.global_step)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Nothing that is not a number enters the weights."""
        figures = dict(zip(FIGURES, self.trainer.step_figures(), strict=True))
        if not all(map(math.isfinite, figures.values())):
            raise Diverged(f"the loss of step {state.global_step + 1} is not a finite number")
        recipe, matching = self.trainer.recipe, state.global_step < self.trainer.layer_steps
        loss = figures["layers"] * (1.0 if matching else recipe.layer_weight)
        loss += recipe.ce_weight * figures["ce"] + recipe.kl_weight * figures["kl"]
        self.add(
            "step",
            state.global_step + 1,
            loss=loss,
            **figures,
            rate=self.trainer.rate_share,
            tokens=(state.global_step + 1) * self.trainer.tokens_per_step,
            seconds=self.seconds,
        )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Checks before a checkpoint is written, so that a checkpoint is known to be good."""
        if not control.should_save:
            return
        self.check(state.global_step)
        if self.journal.idle(self.arm) >= self.trainer.recipe.patience:
            control.should_training_stop = True

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Keeps the best weights, then marks the checkpoint as whole."""
        if args.should_save:
            checkpoint = self.folder / f"checkpoint-{state.global_step}"
            if self.journal.best(self.arm)["step"] == state.global_step:
                copy_tensors(checkpoint / WEIGHTS, self.folder / BEST_NAME)
            write_json_atomic(checkpoint / DONE, {"step": state.global_step})

    def check(self, step: int) -> None:
        """Measures the student on the held-out windows.

        Raises:
            Diverged: it computes NaN.
        """
        trainer = self.trainer
        was_training = trainer.pair.training
        trainer.pair.eval()
        try:
            with torch.no_grad(), trainer.accelerator.autocast():
                found = trainer.model_wrapped(
                    lambda: measure(self.original, self.student, self.windows)
                )
        except MlakitError as error:
            raise Diverged(error.message) from error
        finally:
            trainer.pair.train(was_training)
        facts = trainer.agreed(asdict(found))
        objective = trainer.recipe.held_out_objective(facts["nll"], facts["kl"])
        self.add(
            "check",
            step,
            **facts,
            objective=objective,
            tokens=step * trainer.tokens_per_step,
            seconds=self.seconds,
        )
        trainer.log({f"eval_{name}": facts[name] for name in ("nll", "kl", "perplexity")})
