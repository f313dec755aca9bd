"""The training loop: transformers' Trainer with our losses, checkpoints and schedule.

Trainer and accelerate bring accumulation, mixed precision, clipping, DDP and FSDP. What differs
here: only trained weights are in a checkpoint, all as safetensors; the order of windows is ours,
so that it depends on neither processes nor micro batches.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from mlakit.healing.material import Material
from mlakit.healing.pair import Pair
from mlakit.healing.recipe import Recipe
from mlakit.healing.states import (
    gathered_moments,
    gathered_weights,
    put_moments,
    put_random_states,
    put_weights,
    random_states,
    read_tensors,
    write_tensors,
)

CLIP = 1.0
BETAS = (0.9, 0.95)
WEIGHTS, MOMENTS, DONE = "weights.safetensors", "moments.safetensors", "complete.json"


class Diverged(Exception):
    """The loss is not a finite number any more."""


class Order(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The windows of a run, one after the other, all epochs."""

    def __init__(self, material: Material, recipe: Recipe, steps: int) -> None:
        self.lessons = material.lessons
        self.order = material.order(steps, recipe.batch, recipe.seed)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        row = self.order[place]
        ids = torch.from_numpy(self.lessons.ids[row].astype("int64"))
        counted = torch.from_numpy(self.lessons.counted[row])
        return {"ids": ids[:-1], "targets": ids[1:].masked_fill(~counted[1:], -100)}


class HealTrainer(Trainer):
    """Trains the student of a pair.

    Args:
        pair: the models.
        order: the windows.
        recipe: with its micro batch chosen.
        rates: the largest learning rate of each trained weight.
        steps: optimiser steps.
        layer_steps: the first of them that only match layers.
        folder: for checkpoints.
        device: ``cpu``, ``cuda`` ...; with several processes each has its own.
        scale: factor on the learning rate.
        callback: told about steps; decides on checks.
    """

    def __init__(
        self,
        pair: Pair,
        order: Order,
        recipe: Recipe,
        rates: dict[str, float],
        *,
        steps: int,
        layer_steps: int,
        folder: Path,
        device: str,
        scale: float,
        callback: TrainerCallback,
    ) -> None:
        self.pair, self.recipe, self.rates = pair, recipe, rates
        self.planned_steps, self.layer_steps, self.scale = steps, layer_steps, scale
        self.facts = torch.zeros(3)
        super().__init__(
            model=pair,
            args=_arguments(recipe, steps, folder, device),
            train_dataset=order,
            callbacks=[callback],
        )
        for shown in (PrinterCallback, ProgressCallback):
            self.remove_callback(shown)
        self.model_accepts_loss_kwargs = True  # losses are divided by the counted tokens of a step

    def create_accelerator_and_postprocess(self) -> None:
        """Tells FSDP which modules are units: this run's, not those of an arm before."""
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if fsdp_is_asked_for() and state.distributed_type == DistributedType.MULTI_CPU:
            # accelerate shards on accelerators only; processes on CPUs can as well.
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
        plugin = getattr(state, "fsdp_plugin", None)
        if plugin is not None:
            self.is_fsdp_enabled = True
            # It warns of in-place operations on what attention returns; decoder layers use none.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
            plugin.mixed_precision_policy = None
            if self.recipe.dtype == "bfloat16":  # losses and gradients are added up in float32
                plugin.mixed_precision_policy = MixedPrecisionPolicy(
                    param_dtype=torch.bfloat16, reduce_dtype=torch.float32
                )
            plugin.auto_wrap_policy = transformer_auto_wrap_policy
            plugin.transformer_cls_names_to_wrap = list(self.pair._no_split_modules)
            plugin.cpu_ram_efficient_loading = False

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW on the trained weights alone."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(
                [{"params": [p], "lr": self.rates[name]} for name, p in self.trained.items()],
                betas=BETAS,
                weight_decay=self.recipe.weight_decay,
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Warm-up, then a cosine to zero."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.plain_optimizer,
                lambda step: self.scale * share(step, self.planned_steps, self.recipe.warmup),
            )
        return self.lr_scheduler

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro batches of a step, and its counted tokens in all processes together."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counted = sum(int((batch["targets"] >= 0).sum()) for batch in batches)
        if self.args.world_size > 1:
            own = torch.tensor(counted, device=self.args.device)
            counted = int(self.accelerator.gather(own).sum())
        self.facts = torch.zeros(3, device=self.args.device)
        return batches, max(1, counted)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The pair's losses per counted token of the step."""
        matching = self.state.global_step < self.layer_steps
        loss, facts = model(
            lambda: self.pair.losses(inputs["ids"], inputs["targets"], matching=matching)
        )
        self.facts += facts / (num_items_in_batch or 1)
        # Gradients of processes are averaged; each has its part of the step's tokens.
        return loss / (num_items_in_batch or 1) * self.args.world_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens that the student reads in one step, over all processes."""
        return self.recipe.batch * len(self.train_dataset[0]["ids"])  # type: ignore[index]

    @property
    def rate_share(self) -> float:
        """The learning rates of this step, as a share of the largest ones."""
        done = self.state.global_step
        return self.scale * share(done, self.planned_steps, self.recipe.warmup)

    def agreed(self, facts: dict[str, Any]) -> dict[str, Any]:
        """The first process's figures in all of them, so that all decide alike."""
        if self.args.world_size == 1:
            return facts
        from accelerate.utils import broadcast_object_list

        shared: list[dict[str, Any]] = broadcast_object_list([facts])
        return shared[0]

    def step_figures(self) -> list[float]:
        """``FIGURES`` of the last step, over all processes."""
        if self.args.world_size > 1:
            gathered: Tensor = self.accelerator.gather(self.facts[None])
            return gathered.sum(0).tolist()
        return self.facts.tolist()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The trained weights alone: all others are in the student's folder."""
        weights = gathered_weights(self.trained)
        if self.args.should_save and output_dir is not None:
            write_tensors(Path(output_dir) / WEIGHTS, weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        moments = gathered_moments(self.trained, self.plain_optimizer)
        if self.args.should_save:
            write_tensors(Path(output_dir) / MOMENTS, moments)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        put_weights(self.trained, read_tensors(Path(resume_from_checkpoint) / WEIGHTS))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        stored = read_tensors(Path(checkpoint) / MOMENTS)
        put_moments(self.trained, self.plain_optimizer, stored)
        done = json.loads((Path(checkpoint) / DONE).read_text())["step"]
        schedule: Any = self.lr_scheduler
        schedule.last_epoch = done
        part = self.scale * share(done, self.planned_steps, self.recipe.warmup)
        for group, base in zip(self.plain_optimizer.param_groups, schedule.base_lrs, strict=True):
            group["lr"] = base * part

    def _save_rng_state(self, output_dir: str) -> None:
        write_tensors(self._chance(output_dir), random_states())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._chance(checkpoint).exists():
            put_random_states(read_tensors(self._chance(checkpoint)))

    def _chance(self, folder: str) -> Path:
        return Path(folder) / f"random-{self.args.process_index}.safetensors"

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The student's parameters that train, by name; sharded ones once FSDP has made them."""
        return {name: p for name, p in self.pair.student.named_parameters() if p.requires_grad}

    @property
    def plain_optimizer(self) -> torch.optim.Optimizer:
        """Without accelerate's wrapper."""
        wrapped: Any = self.optimizer
        plain: torch.optim.Optimizer = getattr(wrapped, "optimizer", wrapped)
        return plain


def _arguments(recipe: Recipe, steps: int, folder: Path, device: str) -> TrainingArguments:
    """What Trainer does, step by step; what it logs and shows is ours."""
    from importlib.util import find_spec

    micro = recipe.micro_batch or 1
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    every = max(1, steps // recipe.checks)
    # What accelerate launch was told gives way to the run's own dtype.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if recipe.dtype == "bfloat16" else "no"
    board = find_spec("tensorboard") is not None
    if board:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder.parents[1] / "tensorboard" / folder.name)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=recipe.batch // micro // processes,
        max_steps=steps,
        max_grad_norm=CLIP,
        bf16=recipe.dtype == "bfloat16",
        use_cpu=device == "cpu",
        seed=recipe.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=["tensorboard"] if board else [],
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        remove_unused_columns=False,
        dataloader_pin_memory=device != "cpu",
        disable_tqdm=True,
        log_level="error",
        ddp_find_unused_parameters=recipe.train == "all",  # as experts that no token visits
    )
    if processes == 1:
        arguments._n_gpu = min(arguments.n_gpu, 1)  # one process, one device: never DataParallel
    return arguments


def fsdp_is_asked_for() -> bool:
    """Whether ``accelerate launch`` was told to shard."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")


def share(step: int, steps: int, warmup: float) -> float:
    """Of the largest learning rate, at a step counted from 0."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return (step + 1) / rising
    return (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising))) / 2


def last_checkpoint(folder: Path, *, clean: bool) -> tuple[Path, int] | None:
    """The newest whole checkpoint and its step; what a kill left unfinished is removed.

    Args:
        folder: of an arm.
        clean: whether this process removes.
    """
    found = []
    for path in folder.glob("checkpoint-*"):
        if (path / DONE).exists():
            found.append((json.loads((path / DONE).read_text())["step"], path))
        elif clean:
            shutil.rmtree(path)
    if not found:
        return None
    step, path = max(found)
    return path, step
