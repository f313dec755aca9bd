"""Fitting each converted layer to what the source's attention puts out, by gradient steps.

The closed form treats errors of different tokens as independent and attention as linear in them;
a short fit on the layer's own output picks up the rest. Layers follow each other: a layer is
fitted on the inputs that the converted layers before it give, to the source's output at the same
tokens, so it also learns to undo their error. One layer and its optimiser are in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mlakit.conversion.adapt import stored_tensors
from mlakit.conversion.calibrate import batch_size, split_held_out
from mlakit.conversion.card import converted_config
from mlakit.conversion.factor import Tensors
from mlakit.conversion.forecast import CHECKS, STEP_TOKENS
from mlakit.conversion.plan import ConversionPlan, Progress
from mlakit.conversion.stream import Activations, LayerReader, Stream
from mlakit.conversion.student import Student, layer_schedule

LEARNING_RATE = 0.01
"""Adam's first step, relative to the root mean square of each tensor; falls along a cosine."""


class Refiner:
    """Refines layers in order, whatever method made them.

    Args:
        reader: the source.
        plan: sizes, steps.
        windows: token ids ``[windows, T]``.
        work: folder for what a later start can use.
        progress: told about every layer.
    """

    def __init__(
        self,
        reader: LayerReader,
        plan: ConversionPlan,
        windows: torch.Tensor,
        work: Path,
        progress: Progress,
    ) -> None:
        self.reader, self.plan, self.progress = reader, plan, progress
        self.size = batch_size(windows.shape[1])
        self.fitted = len(split_held_out(windows)[0])
        self.source = Stream(work, "teacher", windows, reader, self.size)
        self.student = Stream(work, "student", windows, reader, self.size)
        self.target = Activations(work / "target.f32", (*windows.shape, reader.spec.hidden_size))
        self.config = converted_config(reader.checkpoint.config, plan, reader.spec, 0)

    def refine(
        self, index: int, tensors: Tensors, facts: dict[str, Any]
    ) -> tuple[Tensors, dict[str, Any]]:
        """The layer's tensors after refinement, float64, and what was measured on it.

        The layers before must have been refined, in this run or in one that this one resumes.
        """
        self.progress("refine", index, len(self.plan.layers))
        for stream in (self.source, self.student):
            if index == 0:
                stream.start(0)
            else:
                stream.inputs(index - 1).remove()
        model = self.reader.layer(index)
        mask = self._collect_targets(index, model)
        student = self._student(index, tensors, facts)
        before, after = self._fit(index, model, student, mask)
        model.layers[0].self_attn = student
        self.student.run(index, model)
        state = student.attention.state_dict()
        state.pop("kv_a_layernorm.weight")
        refined = {name: tensor.double() for name, tensor in state.items()}
        return refined, {**facts, "error_before": before, "error": after}

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

    def _fit(
        self, index: int, model: Any, student: Student, mask: torch.Tensor | None
    ) -> tuple[float, float]:
        """Adam on the student's tensors; held-out error before and of the best state."""
        windows, length = self.target.shape[:2]
        steps, held_out = self.plan.goal.steps, range(self.fitted, windows)
        frozen = {"kv_a_layernorm"}
        if self.reader.spec.layers[index].qk_norm:  # what the latent's bound was computed from
            frozen |= {"q_proj", "k_proj", "v_proj", "q_norm", "k_norm"}
        parts = student.attention.named_parameters()
        trained = [part for name, part in parts if name.split(".")[0] not in frozen]
        sizes = [max(float(part.square().mean().sqrt()), 1e-8) for part in trained]
        rates = [{"params": [p], "lr": LEARNING_RATE * size} for p, size in zip(trained, sizes)]
        optimiser = torch.optim.Adam(rates, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        seed = self.plan.calibration.seed if self.plan.calibration else 0
        order = torch.Generator().manual_seed(1000 * seed + index)
        count = max(1, STEP_TOKENS // length)
        first = best = self._held_out_error(index, model, student, mask, held_out)
        kept = copy.deepcopy(student.attention.state_dict())
        for step in range(1, steps + 1):
            rows = torch.randperm(self.fitted, generator=order)[:count].tolist()
            for part in trained:
                part.requires_grad_(True)
            optimiser.zero_grad()
            self._error(index, model, student, mask, rows).mean().backward()
            optimiser.step()
            schedule.step()
            if step % max(1, steps // CHECKS) == 0 or step == steps:
                found = self._held_out_error(index, model, student, mask, held_out)
                if found < best:
                    best, kept = found, copy.deepcopy(student.attention.state_dict())
        student.attention.load_state_dict(kept)
        student.requires_grad_(False)
        return first, best

    def _error(
        self,
        index: int,
        model: Any,
        student: Student,
        mask: torch.Tensor | None,
        rows: Sequence[int],
    ) -> torch.Tensor:
        """Squared error of these windows' outputs, ``[b, T, D]``."""
        norm = self.reader.family.input_norm
        hidden = self.student.inputs(index).windows(rows).to(self.reader.device)
        target = self.target.windows(rows).to(self.reader.device)
        inputs = hidden if norm is None else getattr(model.layers[0], norm)(hidden)
        output, _ = student(inputs, mask)
        return (output - target).square()

    @torch.no_grad()
    def _held_out_error(
        self,
        index: int,
        model: Any,
        student: Student,
        mask: torch.Tensor | None,
        rows: Sequence[int],
    ) -> float:
        """The error over the variance of the source's outputs."""
        target = self.target.windows(rows)
        variance = float((target - target.mean((0, 1))).square().mean())
        parts = [self._error(index, model, student, mask, [row]).mean() for row in rows]
        return float(torch.stack(parts).mean()) / max(variance, 1e-30)
