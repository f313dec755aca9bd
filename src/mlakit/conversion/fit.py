"""The method ``mlakit``: one pass over the source, layer by layer, each fitted in closed form.

What calibration text cannot say in advance (how far to trust mean phases, which frequencies to
keep) is tried out: an eighth of the windows enters no statistic, and the choice is the one whose
output errs least on them. No other text is looked at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mlakit.checkpoint import write_json_atomic
from mlakit.conversion import closed_form
from mlakit.conversion.adapt import stored_tensors
from mlakit.conversion.calibrate import batch_size, layer_weights, split_held_out
from mlakit.conversion.card import converted_config
from mlakit.conversion.closed_form import Rope
from mlakit.conversion.factor import AttentionWeights, LowRank, Tensors
from mlakit.conversion.observe import HeldOut, Observer, Statistics
from mlakit.conversion.plan import ConversionPlan, Progress
from mlakit.conversion.stream import LayerReader, Stream
from mlakit.conversion.student import Student, layer_schedule
from mlakit.conversion.transmla import LayerResult

SHRINKAGES = (1.0, 0.75, 0.5, 0.25, 0.0)
"""How much of the measured mean phase is taken; tried in this order."""

THETA_POWERS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
"""Bases that are tried for a fixed layout: the source's to these powers. A smaller base spends
the kept dimensions on frequencies that do turn within a text."""


@dataclass(frozen=True)
class Layer:
    """A source layer and what was seen of it."""

    index: int
    source: Tensors
    weights: AttentionWeights
    statistics: Statistics
    held_out: list[HeldOut]
    frequencies: torch.Tensor
    factor: float


class Fit:
    """One compress conversion in progress.

    Args:
        reader: the source.
        plan: sizes, parts of the method.
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
        self.reader = reader
        self.plan = plan
        self.goal = plan.goal
        self.work = work
        self.progress = progress
        self.count = len(plan.layers)
        self.fitted = len(split_held_out(windows)[0])
        self.stream = Stream(work, "source", windows, reader, batch_size(windows.shape[1]))
        self.config = converted_config(reader.checkpoint.config, plan, reader.spec, 0)
        self.measured: dict[str, Any] = {}

    def layers(self, done: Callable[[int], bool]) -> Iterator[LayerResult]:
        """Converts every layer that is not done yet, in order.

        The caller must have stored a layer for good before it asks for the next one.
        """
        theta = self._choose_theta()
        start = next((index for index in range(self.count) if not done(index)), self.count)
        for index in range(self.stream.start(start), self.count):
            self.progress("convert", index, self.count)
            layer = self._observe(index)
            schedules: list[torch.Tensor | None] = [layer_schedule(self.config, index, theta)]
            if self.goal.has("frequencies"):
                schedules = [None, *schedules]
            rope, facts = self.choose_rope(layer, schedules)
            yield index, *self.fit(layer, rope, facts)
            self.stream.inputs(index).remove()
        self.progress("convert", self.count, self.count)

    def choose_rope(
        self, layer: Layer, schedules: Sequence[torch.Tensor | None]
    ) -> tuple[Rope, dict[str, Any]]:
        """The rotations to keep, judged by the held-out error before any rank is cut."""
        has, best = self.goal.has, {"rope_error": float("inf")}
        chosen: Rope | None = None
        for schedule in schedules:
            for shrinkage in SHRINKAGES if has("phase") else (0.0,):
                rope = self._rope(layer, schedule, shrinkage)
                error = self._error(layer, rope, self._whole(layer, rope))
                if error < best["rope_error"]:
                    chosen, best = rope, {"rope_error": error, "shrinkage": shrinkage}
        assert chosen is not None
        return chosen, best

    def fit(
        self, layer: Layer, rope: Rope, facts: dict[str, Any]
    ) -> tuple[Tensors, dict[str, Any]]:
        """The layer's tensors at its rank, and what was measured on it."""
        weights, has = layer.weights, self.goal.has
        spec = self.reader.spec.layers[layer.index]
        keys, seen = closed_form.unrotated_keys(weights, rope.kept), layer.statistics
        moment = seen.attended if has("tokens") else seen.inputs
        if has("metric"):
            metric = (
                closed_form.key_metric(seen, spec, rope.dropped),
                closed_form.value_metric(seen, spec, weights),
            )
        else:
            rope_dim, groups = len(rope.kept.frequencies) * 2, len(weights.k)
            metric = closed_form.balance_metric(keys, weights.values, moment, rope_dim, groups)
        low_rank = closed_form.output_low_rank(
            keys,
            weights.values,
            moment,
            metric,
            self.plan.target.kv_lora_rank or 0,
            centred=has("means"),
            bias=spec.kv_bias and not spec.qk_norm,
        )
        if has("metric"):
            facts["predicted_error"] = facts["rope_error"] + low_rank.lost / max(seen.output, 1e-30)
        facts = {
            **facts,
            "kept": low_rank.kept,
            "error": self._error(layer, rope, low_rank),
            "frequencies": rope.kept.frequencies.tolist(),
        }
        return closed_form.latent_tensors(weights, spec, rope, low_rank), facts

    def _observe(self, index: int) -> Layer:
        """Runs a layer on its stored inputs, and stores the next layer's."""
        weights = layer_weights(self.reader, index)
        frequencies, factor = self.reader.frequencies(index)
        spec = self.reader.spec.layers[index]
        observer = Observer(weights, spec, frequencies, factor, self.fitted)
        model = self.reader.layer(index)
        observer.watch(model.layers[0].self_attn)
        self.stream.run(index, model)
        return Layer(
            index,
            self.reader.attention(index),
            weights,
            observer.statistics(),
            observer.held_out,
            frequencies,
            factor,
        )

    def _choose_theta(self) -> float | None:
        """The base of the schedule that errs least over all layers, for layouts that have one."""
        if self.goal.has("frequencies") or not self.goal.has("theta"):
            return None
        if self.reader.family.rope_by_type:
            return None  # it has several bases
        record = self.work / "theta.json"
        if not record.exists():
            source = self.config["rope_parameters"]["rope_theta"]
            thetas = [float(f"{source**power:.4g}") for power in THETA_POWERS]
            errors = dict.fromkeys(thetas, 0.0)
            for index in range(self.stream.start(0), self.count):
                self.progress("theta", index, self.count)
                layer = self._observe(index)
                for theta in thetas:
                    _, facts = self.choose_rope(layer, [layer_schedule(self.config, index, theta)])
                    errors[theta] += facts["rope_error"] / self.count
                self.stream.inputs(index).remove()
            write_json_atomic(record, {str(theta): error for theta, error in errors.items()})
            self.progress("theta", self.count, self.count)
        found = {float(theta): error for theta, error in json.loads(record.read_text()).items()}
        self.measured["rope_theta"] = min(found, key=lambda theta: found[theta])
        return float(self.measured["rope_theta"])

    def _rope(self, layer: Layer, schedule: torch.Tensor | None, shrinkage: float) -> Rope:
        return closed_form.choose_rope(
            layer.weights,
            layer.statistics,
            layer.frequencies,
            layer.factor,
            self.plan.target.qk_rope_head_dim or 0,
            schedule=None if schedule is None else schedule.to(self.reader.device),
            shrinkage=shrinkage,
            unitary=self.goal.has("unitary"),
            sensitive=self.goal.has("metric"),
        )

    def _whole(self, layer: Layer, rope: Rope) -> LowRank:
        keys = closed_form.unrotated_keys(layer.weights, rope.kept)
        return closed_form.whole(keys, layer.weights.values)

    def _error(self, layer: Layer, rope: Rope, low_rank: LowRank) -> float:
        tensors = self._tensors(layer, rope, low_rank)
        frequencies = rope.kept.frequencies.tolist()
        student = Student(self.config, layer.index, tensors, frequencies, self.reader.device)
        return student.error(layer.held_out)

    def _tensors(self, layer: Layer, rope: Rope, low_rank: LowRank) -> Tensors:
        """All attention tensors of the layer, as they are written."""
        spec, target = self.reader.spec.layers[layer.index], self.plan.layers[layer.index]
        new = closed_form.latent_tensors(layer.weights, spec, rope, low_rank)
        return stored_tensors(new, layer.source, spec, target)
