"""Fitting each converted layer to what the source's attention puts out, by gradient steps.

The closed form treats errors of different tokens as independent and attention as linear in them;
a short fit on the layer's own output picks up the rest. Layers follow each other: a layer is
fitted on the inputs that the converted layers before it give, to the source's output at the same
tokens, so it also learns to undo their error. Errors count by what they do to the model's
predictions (see ``sensitivity``). One layer and its optimiser are in memory.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mlakit.conversion.adapt import stored_tensors
from mlakit.conversion.amounts import CHECK_STEPS, CHECKS, STEP_TOKENS
from mlakit.conversion.calibrate import batch_size, split_held_out
from mlakit.conversion.card import converted_config
from mlakit.conversion.factor import Tensors
from mlakit.conversion.plan import ConversionPlan, Progress
from mlakit.conversion.sensitivity import Sensitivity, importance
from mlakit.conversion.stream import Activations, LayerReader, Stream
from mlakit.conversion.student import Student, layer_schedule

LEARNING_RATE = 0.01
"""Adam's largest step, relative to the root mean square of each tensor."""


def learning_rate(step: int, steps: int) -> float:
    """Of a step, from 1 on: up over the first tenth, then down along a cosine."""
    rising = min(1.0, step / max(1, steps // 10))
    return LEARNING_RATE * rising * (1 + math.cos(math.pi * (step - 1) / steps)) / 2


class Refiner:
    """Refines layers in order, whatever method made them.

    Args:
        reader: the source.
        plan: sizes, steps.
        windows: token ids ``[windows, T]``.
        sensed: the folder of ``Sensitivity``.
        work: folder for what a later start can use.
        progress: told about every layer.
    """

    def __init__(
        self,
        reader: LayerReader,
        plan: ConversionPlan,
        windows: torch.Tensor,
        sensed: Path,
        work: Path,
        progress: Progress,
    ) -> None:
        self.reader, self.plan, self.sensed, self.progress = reader, plan, sensed, progress
        self.seed = plan.calibration.seed if plan.calibration else 0
        self.fitted = len(split_held_out(windows)[0])
        size = batch_size(windows.shape[1])
        self.source = Stream(work, "teacher", windows, reader, size)
        self.student = Stream(work, "student", windows, reader, size)
        self.target = Activations(work / "target.f32", (*windows.shape, reader.spec.hidden_size))
        self.config = converted_config(reader.checkpoint.config, plan, reader.spec, 0)
        self.sensitivity: Sensitivity | None = None
        if plan.goal.weighs_predictions:
            fitted = windows[: self.fitted]
            self.sensitivity = Sensitivity(reader, fitted, sensed, self.seed, progress)

    def refine(
        self, index: int, tensors: Tensors, facts: dict[str, Any]
    ) -> tuple[Tensors, dict[str, Any]]:
        """The layer's tensors after refinement, float64, and what was measured on it.

        The layers before must have been refined, in this run or in one that this one resumes.
        """
        metric = self._metric(index)
        self.progress("refine", index, len(self.plan.layers))
        for stream in (self.source, self.student):
            if index == 0:
                stream.start(0)
            else:
                stream.inputs(index - 1).remove()
        model = self.reader.layer(index)
        mask = self._collect_targets(index, model)
        student = self._student(index, tensors, facts)
        norm = self.reader.family.input_norm
        errors = Errors(
            self.student.inputs(index),
            self.target,
            student,
            torch.nn.Identity() if norm is None else getattr(model.layers[0], norm),
            mask,
            metric,
            self.reader.device,
        )
        before, after = self._fit(index, errors)
        model.layers[0].self_attn = student
        self.student.run(index, model)
        state = student.attention.state_dict()
        state.pop("kv_a_layernorm.weight")
        refined = {name: tensor.double() for name, tensor in state.items()}
        return refined, {**facts, "error_before": before, "error": after}

    def _metric(self, index: int) -> torch.Tensor | None:
        """``[D, D]`` float32: what an error costs, to second order, is half its square by it."""
        if self.sensitivity is None:
            return None
        self.sensitivity.collect()
        return importance(self.sensed, index).to(self.reader.device).float()

    def _collect_targets(self, index: int, model: Any) -> torch.Tensor | None:
        """Runs the source's layer on its own inputs; stores what its attention puts out."""
        masks: list[torch.Tensor | None] = []
        with self.target.writer() as write:

            def see(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
                write(output[0])
                masks.append(kwargs.get("attention_mask"))

            hook = model.layers[0].self_attn.register_forward_hook(see, with_kwargs=True)
            self.source.run(index, model)
            hook.remove()
        return None if masks[0] is None else masks[0][:1]

    def _student(self, index: int, tensors: Tensors, facts: dict[str, Any]) -> Student:
        spec, target = self.reader.spec.layers[index], self.plan.layers[index]
        whole = stored_tensors(tensors, self.reader.attention(index), spec, target)
        frequencies = facts.get("frequencies")
        if frequencies is None:
            frequencies = layer_schedule(self.config, index).tolist()
        return Student(self.config, index, whole, frequencies, self.reader.device)

    def _trained(self, index: int, student: Student) -> list[torch.nn.Parameter]:
        frozen = {"kv_a_layernorm"}
        if self.plan.layers[index].indirect:  # what the latent's bound was computed from
            frozen |= {"q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "kv_proj", "kv_norm"}
        elif self.plan.layers[index].query_up:  # training it too was measured to gain nothing
            frozen |= {"q_proj"}
        parts = student.attention.named_parameters()
        return [part for name, part in parts if name.split(".")[0] not in frozen]

    def _fit(self, index: int, errors: Errors) -> tuple[float, float]:
        """Adam on the student's tensors; the held-out error before, and of the best state.

        Where a check finds nothing better, the best state is taken up again at half the rate:
        how far a step moves the output differs much from layer to layer.
        """
        trained, steps = self._trained(index, errors.student), self.plan.goal.steps
        attention = errors.student.attention
        held_out = range(self.fitted, self.target.shape[0])
        sizes = [max(float(part.square().mean().sqrt()), 1e-8) for part in trained]
        optimiser = torch.optim.Adam([{"params": [part]} for part in trained], betas=(0.9, 0.99))
        order = torch.Generator().manual_seed(1000 * self.seed + index)
        count = max(1, STEP_TOKENS // self.target.shape[1])
        first = best = errors.share(held_out)
        kept, scale = copy.deepcopy(attention.state_dict()), 1.0
        for step in range(1, steps + 1):
            rows = torch.randperm(self.fitted, generator=order)[:count].tolist()
            for part, size, group in zip(trained, sizes, optimiser.param_groups, strict=True):
                part.requires_grad_(True)
                group["lr"] = scale * size * learning_rate(step, steps)
            optimiser.zero_grad()
            errors.squares(rows).mean().backward()
            optimiser.step()
            if step % max(CHECK_STEPS, steps // CHECKS) == 0 or step == steps:
                found = errors.share(held_out)
                if found < best:
                    best, kept = found, copy.deepcopy(attention.state_dict())
                else:
                    scale /= 2
                    attention.load_state_dict(kept)
        errors.student.requires_grad_(False)
        return first, best


@dataclass(frozen=True)
class Errors:
    """What one converted layer's output lacks.

    Attributes:
        inputs: of the converted layer.
        target: what the source's attention puts out at the same tokens.
        student: the converted attention.
        norm: in front of attention.
        mask: that the family's layer gives its attention; None for causal attention.
        metric: ``[D, D]``, of errors; None where all directions count the same.
        device: where the student is.
    """

    inputs: Activations
    target: Activations
    student: Student
    norm: torch.nn.Module
    mask: torch.Tensor | None
    metric: torch.Tensor | None
    device: torch.device

    def squares(self, rows: Sequence[int]) -> torch.Tensor:
        """Of these windows' errors, ``[b, T, D]``, in the metric."""
        inputs = self.norm(self.inputs.windows(rows).to(self.device))
        return self._square(self.student(inputs, self.mask)[0] - self._targets(rows))

    @torch.no_grad()
    def share(self, rows: Sequence[int]) -> float:
        """Their mean over the variance of the source's output, one window at a time."""
        mean = sum(self._targets([row]).mean((0, 1)) for row in rows) / len(rows)
        whole = [self._square(self._targets([row]) - mean).mean() for row in rows]
        parts = [self.squares([row]).mean() for row in rows]
        return float(torch.stack(parts).mean()) / max(float(torch.stack(whole).mean()), 1e-30)

    def _targets(self, rows: Sequence[int]) -> torch.Tensor:
        return self.target.windows(rows).to(self.device)

    def _square(self, error: torch.Tensor) -> torch.Tensor:
        return error * (error if self.metric is None else error @ self.metric)
