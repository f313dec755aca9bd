"""What a run works on: models, texts and settings, read and checked before any weight."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from mlakit import __version__
from mlakit.checkpoint import Checkpoint, open_checkpoint
from mlakit.data import SourceLike
from mlakit.errors import MlakitError, UsageError
from mlakit.evaluation.subject import open_tokenizer
from mlakit.healing.material import (
    Material,
    read_material,
    training_sources,
    with_micro_batch,
)
from mlakit.healing.recipe import Recipe
from mlakit.nn.device import usable_device
from mlakit.nn.hf import register


@dataclass(frozen=True)
class Inputs:
    """Everything that was read and checked before any weight.

    Attributes:
        student: the checkpoint to heal.
        teacher: its original.
        recipe: settings, with micro batch and dtype chosen.
        material: windows.
        steps: optimiser steps.
        control: whether the original trains too.
        device: where it runs.
        processes: how many share the work.
    """

    student: Checkpoint
    teacher: Checkpoint
    recipe: Recipe
    material: Material
    steps: int
    control: bool
    device: str
    processes: int

    @property
    def key(self) -> str:
        """Tells one run from another; a run goes on only under the same key."""
        settings = {**asdict(self.recipe), "micro_batch": None, "checkpointing": None}
        facts = [
            __version__, self.student.fingerprint, self.teacher.fingerprint, settings, self.control,
            [(part.name, part.sha256) for part in self.material.parts],
            self.material.held_out.ids.tolist(),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def read_inputs(
    student: str | Path,
    teacher: str | Path,
    recipe: Recipe,
    held_out: SourceLike | Sequence[SourceLike] | None,
    control: bool,
    device: str,
) -> Inputs:
    """Reads configs, headers, tokenizers and texts.

    Args:
        student: the checkpoint to heal.
        teacher: its original.
        recipe: settings.
        held_out: texts to measure on.
        control: whether the original trains too.
        device: where it shall run.

    Raises:
        UsageError, MlakitError: what cannot be used, and why.
    """
    if find_spec("accelerate") is None:
        raise MlakitError(
            "Healing needs the package accelerate, which is not installed",
            remedy="pip install 'mlakit[heal]'",
        )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    device = _own_device(device, processes)
    register()
    checkpoints = open_checkpoint(student), open_checkpoint(teacher)
    sizes = [int(found.config["vocab_size"]) for found in checkpoints]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"{student} has {sizes[0]} tokens and {teacher} has {sizes[1]}: the student cannot"
            " learn the teacher's predictions",
            remedy="give the checkpoint that the student was converted from as --teacher",
        )
    tokenizers = [open_tokenizer(found.path) for found in checkpoints]
    context = min(int(found.config["max_position_embeddings"]) for found in checkpoints)
    sources = training_sources(recipe)
    sample = sources[0].content.plain[:2000]
    if len({tuple(t(sample, verbose=False)["input_ids"]) for t in tokenizers}) > 1:
        raise UsageError(
            f"the tokenizers of {student} and {teacher} cut the same text differently",
            remedy="copy the original's tokenizer files into the student's folder",
        )
    material = read_material(recipe, sources, held_out, tokenizers[0], context, sizes[0])
    if recipe.dtype is None:
        recipe = replace(recipe, dtype="float32" if device == "cpu" else "bfloat16")
    recipe = with_micro_batch(recipe, material.length, processes)
    steps = recipe.steps or max(1, round(recipe.epochs * len(material.lessons) / recipe.batch))
    return Inputs(*checkpoints, recipe, material, steps, control, device, processes)


def _own_device(device: str, processes: int) -> str:
    """The device of this process.

    Raises:
        UsageError: it cannot be used, or is not the one that transformers' Trainer takes.
    """
    if device == "cuda" and processes > 1:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    elif device not in ("cpu", "cuda", "cuda:0"):
        raise UsageError(
            f"Training runs on cpu or on the first GPU, not on {device!r}",
            remedy="choose the GPU with CUDA_VISIBLE_DEVICES and use --device cuda",
        )
    usable_device(device)
    return device
