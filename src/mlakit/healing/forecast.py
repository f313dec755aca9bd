"""What a run will take, before any weight is read: tokens, memory, time, cost, shares.

Memory is added up from shapes. Time is measured: a few steps of models of one and of two layers
with random weights, on the run's own device, give what a layer costs and what all else costs.
"""

from __future__ import annotations

import copy
import os
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from mlakit.checkpoint import Checkpoint
from mlakit.healing.export import require_stored
from mlakit.healing.loss import CHUNK_LOGITS
from mlakit.healing.material import Material
from mlakit.healing.pair import Pair
from mlakit.healing.recipe import Recipe
from mlakit.healing.trainable import choose_trainable
from mlakit.healing.trainer import fsdp_is_asked_for

PROBE_TOKENS = 512
"""Longest window that is timed on a CPU."""

ACTIVATIONS = 34
"""Numbers kept per token, layer and hidden dimension for the backward pass (Korthikanti et al.,
arXiv 2205.05198, section 4, without the scores, which attention functions do not keep)."""

PROGRAM_BYTES = 310 * 2**20
"""What Python and its libraries hold on a CPU: a run of models of a few kilobytes, measured."""

ITEMSIZES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Attributes:
        windows: in one epoch.
        window_length: tokens per window.
        steps: optimiser steps.
        tokens: that are read in all of them.
        batch: windows per step, as ``processes x micro batch x accumulation``.
        trained: parameters that train.
        parameters: of the student.
        weights_bytes: of both models, per process.
        optimiser_bytes: gradients and moments, per process.
        activation_bytes: of a micro batch, logits included, per process.
        program_bytes: of the program itself, where it shares the device's memory.
        available_bytes: free on the device now.
        processes: how many share the work; with FSDP each holds its share of all weights.
        seconds: for all arms.
        price: of that time; None without a price per hour.
        texts: name, windows and counted tokens of each text.
        warnings: what to think about first.
    """

    windows: int
    window_length: int
    steps: int
    tokens: int
    batch: tuple[int, int, int]
    trained: int
    parameters: int
    weights_bytes: int
    optimiser_bytes: int
    activation_bytes: int
    program_bytes: int
    available_bytes: int
    processes: int
    seconds: float
    price: float | None
    texts: tuple[tuple[str, int, int], ...]
    warnings: tuple[str, ...]

    @property
    def memory_bytes(self) -> int:
        """All of it, per process."""
        parts = self.weights_bytes, self.optimiser_bytes, self.activation_bytes
        return sum(parts) + self.program_bytes


def forecast(
    student: Checkpoint,
    teacher: Checkpoint,
    recipe: Recipe,
    material: Material,
    steps: int,
    *,
    control: bool,
    device: str,
    processes: int,
    price_per_hour: float | None,
) -> Forecast:
    """Foresees a run.

    Args:
        student: the checkpoint to heal.
        teacher: its original.
        recipe: with its micro batch and dtype chosen.
        material: windows.
        steps: optimiser steps.
        control: whether the original trains too.
        device: where the run will be.
        processes: how many share the work.
        price_per_hour: of the machine.
    """
    itemsize = ITEMSIZES[recipe.dtype or "float32"]
    sharded = processes if fsdp_is_asked_for() else 1
    counts = _Counts.of(student, recipe)
    micro = recipe.micro_batch or 1
    teacher_bytes = sum(_count(teacher, name) for name in teacher.names) * itemsize
    weights = (counts.all - counts.trained) * itemsize + counts.trained * 4 + teacher_bytes
    arms = 2 if control else 1
    per_window = _seconds(student, teacher, recipe, material.length, device) / micro
    # A check reads its windows forward only, in every process; that is about half of a step.
    checked = (recipe.checks + 1) * recipe.held_out_windows / 2
    seconds = per_window * (steps * recipe.batch / processes + checked) * arms
    found = Forecast(
        windows=len(material.lessons),
        window_length=material.length,
        steps=steps,
        tokens=steps * recipe.batch * material.length,
        batch=(processes, micro, recipe.batch // micro // processes),
        trained=counts.trained,
        parameters=counts.all,
        weights_bytes=weights // sharded,
        optimiser_bytes=3 * 4 * counts.trained // sharded,
        activation_bytes=_activation_bytes(student.config, recipe, micro * material.length),
        program_bytes=PROGRAM_BYTES if device == "cpu" else 0,
        available_bytes=_available(device),
        processes=processes,
        seconds=seconds,
        price=None if price_per_hour is None else price_per_hour * seconds / 3600,
        texts=tuple((part.name, part.windows, part.tokens) for part in material.parts),
        warnings=(),
    )
    return replace(found, warnings=tuple(_warnings(found, recipe, material, sharded)))


def _activation_bytes(config: dict[str, Any], recipe: Recipe, tokens: int) -> int:
    """What a micro batch keeps for the backward pass, and a chunk of both models' logits."""
    layers = int(config["num_hidden_layers"])
    kept = 2 * layers + ACTIVATIONS if recipe.checkpointing else ACTIVATIONS * layers
    states = tokens * int(config["hidden_size"]) * kept * ITEMSIZES[recipe.dtype or "float32"]
    return states + min(tokens * int(config["vocab_size"]), CHUNK_LOGITS) * 4 * 6


def _warnings(found: Forecast, recipe: Recipe, material: Material, sharded: int) -> list[str]:
    notes = []
    if found.memory_bytes > found.available_bytes:
        notes.append(
            f"{found.memory_bytes / 2**30:.1f} GiB per process are more than the"
            f" {found.available_bytes / 2**30:.1f} GiB there are: a smaller --micro-batch,"
            " --checkpointing, or more processes with FSDP"
        )
    if found.processes > 1 and sharded == 1:
        notes.append("every process holds all weights: accelerate launch --use_fsdp shares them")
    notes += [f"{part.name}: {note}" for part in material.parts for note in part.notes]
    if found.steps * recipe.batch > 4 * found.windows:
        notes.append(
            f"the {found.windows:,} windows are read"
            f" {found.steps * recipe.batch / found.windows:.1f} times: more text would help more"
        )
    return notes


@dataclass(frozen=True)
class _Counts:
    trained: int
    all: int

    @classmethod
    def of(cls, student: Checkpoint, recipe: Recipe) -> _Counts:
        """From the model's own shapes, without memory."""
        with torch.device("meta"):
            model = _build(student.config)
        whole = sum(parameter.numel() for parameter in model.parameters())
        trained = choose_trainable(model, recipe)
        require_stored(student, trained)
        return cls(sum(parameter.numel() for parameter in trained.values()), whole)


def _build(config: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in config.items() if key != "dtype"}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))


def _shortened(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """A config of the first layers alone."""
    count = int(config["num_hidden_layers"])
    short = {
        key: value[:layers] if isinstance(value, list) and len(value) == count else value
        for key, value in copy.deepcopy(config).items()
    }
    if short.get("kv_lora_ranks"):
        short["kv_lora_rank"] = max(short["kv_lora_ranks"])
    return {**short, "num_hidden_layers": layers}


def _seconds(
    student: Checkpoint, teacher: Checkpoint, recipe: Recipe, length: int, device: str
) -> float:
    """Of one micro batch."""
    layers = int(student.config["num_hidden_layers"])
    counts = (1, 2) if layers > 1 else (1,)
    timed = [
        _timed_step(
            _shortened(student.config, count), _shortened(teacher.config, count), recipe, length,
            device,
        )
        for count in counts
    ]  # fmt: skip
    per_layer = max(0.0, timed[-1] - timed[0])
    return timed[0] + (layers - 1) * per_layer


def _timed_step(
    student: dict[str, Any], teacher: dict[str, Any], recipe: Recipe, length: int, device: str
) -> float:
    """Forward and backward of one micro batch of random tokens."""
    micro = recipe.micro_batch or 1
    if device == "cpu":  # a part of it, and as much longer
        window, rows = min(length, PROBE_TOKENS), min(micro, 4)
    else:
        window, rows = length, micro
    models = [_build(config).to(device) for config in (student, teacher)]
    choose_trainable(models[0], recipe)
    models[1].to(getattr(torch, recipe.dtype or "float32")).eval()
    pair = Pair(models[0], models[1], recipe)
    ids = torch.randint(int(student["vocab_size"]), (rows, window), device=device)
    taken = []
    for _ in range(3):
        begun = time.perf_counter()
        with torch.autocast(
            torch.device(device).type, torch.bfloat16, enabled=recipe.dtype == "bfloat16"
        ):
            loss, _ = pair.losses(ids, ids, matching=False)
        loss.backward()
        if device != "cpu":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begun)
    return min(taken[1:]) * micro * length / (rows * window)


def _count(checkpoint: Checkpoint, name: str) -> int:
    count = 1
    for size in checkpoint.shape(name):
        count *= size
    return count


def _available(device: str) -> int:
    if device != "cpu":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
