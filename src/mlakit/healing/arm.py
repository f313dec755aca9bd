"""One arm of a run: a student that trains until it is done, whatever happens on the way."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mlakit.errors import MlakitError
from mlakit.evaluation.subject import Subject
from mlakit.healing.journal import Journal
from mlakit.healing.material import Material
from mlakit.healing.pair import Pair, require_matching_layers
from mlakit.healing.rates import choose_rates
from mlakit.healing.recipe import Recipe
from mlakit.healing.states import gathered_weights, put_weights, read_tensors, write_tensors
from mlakit.healing.trainable import choose_trainable
from mlakit.healing.trainer import (
    Diverged,
    HealTrainer,
    Order,
    last_checkpoint,
)
from mlakit.healing.watch import BEST_NAME, Told, Watch

MOST_ROLLBACKS = 3
FIRST_NAME = "first.safetensors"
LOST_PEER = ("connection closed by peer", "connection reset by peer", "broken pipe", "timed out")
"""What gloo says where another process has ended; it has no kind of exception of its own."""


class OtherProcessEnded(MlakitError):
    """This process cannot go on because another one has ended, which said why."""


@dataclass(frozen=True)
class Start:
    """What both arms share.

    Attributes:
        recipe: settings, the micro batch chosen.
        material: windows.
        steps: optimiser steps.
        work: folder for checkpoints, one folder per arm.
        device: where it runs.
        processes: how many share the work.
        journal: of the run.
        told: called with every row.
    """

    recipe: Recipe
    material: Material
    steps: int
    work: Path
    device: str
    processes: int
    journal: Journal
    told: Told


class Arm:
    """Trains one student.

    Args:
        name: ``healed`` or ``control``.
        student: the model that trains.
        original: the teacher, and what checks compare with.
        start: all else.
    """

    def __init__(self, name: str, student: Subject, original: Subject, start: Start) -> None:
        self.name, self.student, self.original, self.start = name, student, original, start
        self.recipe = start.recipe
        if self.recipe.layer_steps or self.recipe.layer_weight:
            require_matching_layers(student.model, original.model)
        self.trained = choose_trainable(student.model, self.recipe)
        self.count = sum(parameter.numel() for parameter in self.trained.values())
        self.all = sum(parameter.numel() for parameter in student.model.parameters())
        self.rates = choose_rates(student.model, self.recipe.learning_rate)
        self.folder = start.work / name
        self.scale = 1.0
        if start.journal.writes and not (self.folder / FIRST_NAME).exists():
            write_tensors(self.folder / FIRST_NAME, gathered_weights(self.trained))

    def run(self) -> dict[str, Tensor]:
        """Trains to the end; goes on from the last checkpoint where there is one.

        Returns:
            The best state's trained parameters, whole, float32, on the CPU; in the process that
            writes.

        Raises:
            MlakitError: not even one window fits into memory.
        """
        journal = self.start.journal
        rollbacks = [r for r in journal.of(self.name, "event") if r["what"] == "diverged"]
        self.scale = 0.5 ** len(rollbacks)
        shrunk = [r for r in journal.of(self.name, "event") if r["what"] == "out of memory"]
        if shrunk:
            self.recipe = replace(self.recipe, micro_batch=shrunk[-1]["micro_batch"])
        if journal.stopped(self.name) is None:
            self.start.told({"arm": self.name, "kind": "plan", "steps": self.start.steps})
        pair = Pair(self.student.model, self.original.model, self.recipe)
        while journal.stopped(self.name) is None:
            fault = self._attempt(pair)
            if fault is not None:
                self._react(fault)
                if last_checkpoint(self.folder, clean=False) is None:
                    put_weights(self.trained, read_tensors(self.folder / FIRST_NAME))
        return self.best_state() if journal.writes else {}

    def best_state(self) -> dict[str, Tensor]:
        """The trained parameters of the best check."""
        untrained = self.start.journal.best(self.name)["step"] == 0
        return read_tensors(self.folder / (FIRST_NAME if untrained else BEST_NAME))

    def _attempt(self, pair: Pair) -> Exception | None:
        """Trains from the last checkpoint on; gives back a fault that can be reacted to."""
        journal = self.start.journal
        found = last_checkpoint(self.folder, clean=journal.writes)
        journal.rewind(self.name, found[1] if found else -1)
        watch = Watch(
            self.name, journal, self.original, self.student,
            self.start.material.held_out, self.folder, self.start.told,
        )  # fmt: skip
        trainer = HealTrainer(
            pair,
            Order(self.start.material, self.recipe, self.start.steps),
            self.recipe,
            self.rates,
            steps=self.start.steps,
            layer_steps=min(self.recipe.layer_steps, self.start.steps),
            folder=self.folder,
            device=self.start.device,
            scale=self.scale,
            callback=watch,
        )
        watch.trainer = trainer
        try:
            if found is None or found[1] < self.start.steps:
                trainer.train(resume_from_checkpoint=str(found[0]) if found else None)
        except Diverged as error:
            return error
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if self.start.processes > 1 and _lost_peer(error):
                raise OtherProcessEnded(
                    f"{self.name}: another process of this run has ended",
                    remedy="its own message says why; checkpoints are kept, the same command goes"
                    " on",
                ) from error
            if not _out_of_memory(error):
                raise
            return MemoryError(str(error).splitlines()[0] if str(error) else "out of memory")
        self._stop(watch)
        return None

    def _stop(self, watch: Watch) -> None:
        journal = self.start.journal
        idle, done = journal.idle(self.name), journal.of(self.name, "step")[-1]["step"]
        why = "all steps done"
        if done < self.start.steps or idle >= self.recipe.patience:
            why = f"no better for {idle} checks"
        watch.add("stop", done, why=why)

    def _react(self, fault: Exception) -> None:
        """Smaller micro batches, or a smaller rate from the last good checkpoint."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        journal = self.start.journal
        steps = journal.of(self.name, "step")
        step = steps[-1]["step"] if steps else 0
        if isinstance(fault, Diverged):
            self._roll_back(fault, step)
            return
        micro = self.recipe.micro_batch or 1
        if self.start.processes > 1 or micro == 1:
            alone = self.start.processes == 1
            where = "" if alone else f" in process {os.environ['RANK']} of {self.start.processes}"
            raise MlakitError(
                f"{self.name}: out of memory{where} with {micro} windows of"
                f" {self.start.material.length:,} tokens at a time ({fault})",
                remedy="use a smaller --micro-batch, a shorter --sequence-length, --checkpointing,"
                " or more processes with FSDP; checkpoints are kept, the same command goes on",
            )
        smaller = next(m for m in range(micro // 2, 0, -1) if self.recipe.batch % m == 0)
        self.recipe = replace(self.recipe, micro_batch=smaller)
        self._event(
            "out of memory", step, micro_batch=smaller, accumulation=self.recipe.batch // smaller
        )

    def _roll_back(self, fault: Diverged, step: int) -> None:
        found = last_checkpoint(self.folder, clean=False)
        self.scale /= 2
        rollbacks = [
            r for r in self.start.journal.of(self.name, "event") if r["what"] == "diverged"
        ]
        self._event(
            "diverged", step, why=str(fault), back_to=found[1] if found else 0, scale=self.scale
        )
        if len(rollbacks) + 1 < MOST_ROLLBACKS:
            if self.start.processes > 1:  # each holds a part of the weights, and keeps it
                raise MlakitError(
                    f"{self.name}: {fault}",
                    remedy="run the same command again: it goes on from the last good checkpoint"
                    f" at {self.scale:g} of the learning rate",
                )
            return
        if not self.start.journal.of(self.name, "check"):
            raise MlakitError(
                f"{self.name}: {fault}, before anything was learnt",
                remedy="check that the student itself computes numbers: mlakit eval STUDENT",
            )
        why = f"diverged {len(rollbacks) + 1} times; the best state before that is kept"
        self.start.told(self.start.journal.add(self.name, "stop", step, why=why))

    def _event(self, what: str, step: int, **facts: object) -> None:
        self.start.told(self.start.journal.add(self.name, "event", step, what=what, **facts))


def _lost_peer(error: BaseException) -> bool:
    words = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or any(w in words for w in LOST_PEER)


def _out_of_memory(error: BaseException) -> bool:
    words = str(error).lower()
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or "out of memory" in words
        or "can't allocate memory" in words
    )
