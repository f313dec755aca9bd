"""The method ``mlakit``, first half: one pass over the source, layer by layer, before any size.

What calibration text cannot say in advance (how far to trust mean phases, which frequencies to
keep) is tried out: an eighth of the windows enters no statistic, and the choice is the one whose
output errs least on them. No other text is looked at. What is kept of a layer makes it at any
rank, and says what each rank will cost.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from mlakit.checkpoint import write_json_atomic
from mlakit.checkpoint.writing import atomic_file
from mlakit.conversion import closed_form
from mlakit.conversion.allocate import Losses
from mlakit.conversion.calibrate import batch_size, layer_weights, split_held_out
from mlakit.conversion.card import converted_config
from mlakit.conversion.closed_form import Axes, Rope
from mlakit.conversion.factor import AttentionWeights
from mlakit.conversion.observe import HeldOut, Observer, Statistics, felt_output
from mlakit.conversion.plan import ConversionPlan, Progress
from mlakit.conversion.rotate import KeptRope
from mlakit.conversion.sensitivity import Sensitivity
from mlakit.conversion.stream import LayerReader, Stream
from mlakit.conversion.student import layer_schedule
from mlakit.conversion.trial import Trial

SHRINKAGES = (1.0, 0.75, 0.5, 0.25, 0.0)
"""How much of the measured mean phase is taken; tried in this order."""

THETA_POWERS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
"""Bases that are tried for a fixed layout: the source's to these powers. A smaller base spends
the kept dimensions on frequencies that do turn within a text."""


@dataclass(frozen=True)
class Layer:
    """A source layer and what was seen of it.

    Attributes:
        importance: the metric of its output.
        felt: ``felt_output`` in this metric.
    """

    index: int
    weights: AttentionWeights
    statistics: Statistics
    held_out: list[HeldOut]
    importance: torch.Tensor | None
    felt: torch.Tensor
    frequencies: torch.Tensor
    factor: float

    @cached_property
    def key_moment(self) -> torch.Tensor:
        """``closed_form.key_moment``."""
        return closed_form.key_moment(self.weights, self.statistics)


@dataclass(frozen=True)
class Surveyed:
    """What is kept of a layer: its rotations, its axes, and what was measured on the way."""

    rope: Rope
    axes: Axes
    facts: dict[str, Any]


class Survey:
    """Looks at every layer of the source once.

    Args:
        reader: the source.
        plan: rotary size, parts of the method.
        windows: token ids ``[windows, T]``.
        work: folder for what is found, and what a later start can use.
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
        self.sensitivity: Sensitivity | None = None
        if self.goal.has("downstream"):
            seed = plan.calibration.seed if plan.calibration else 0
            fitted = windows[: self.fitted]
            self.sensitivity = Sensitivity(reader, fitted, work, seed, progress)
        self.measured: dict[str, Any] = {}

    def run(self) -> None:
        """Looks at the layers that are not surveyed yet, in order."""
        if self.sensitivity is not None:
            self.sensitivity.collect()
        theta = self._choose_theta()
        done = [self._path(index).exists() for index in range(self.count)]
        start = done.index(False) if False in done else self.count
        for index in range(self.stream.start(start) if start < self.count else start, self.count):
            self.progress("survey", index, self.count)
            self._store(index, self._survey(self._observe(index), theta))
            self.stream.inputs(index).remove()
        self.stream.inputs(self.count).remove()
        self.progress("survey", self.count, self.count)

    def layer(self, index: int) -> Surveyed:
        """What was kept of a layer."""
        found = load_file(self._path(index))
        facts = json.loads(self._path(index).with_suffix(".json").read_text())
        part = {  # copied: complex numbers call for a stricter alignment than the file's
            name: tensor.clone().to(self.reader.device) for name, tensor in found.items()
        }
        mix, spread, gain, dropped = (
            torch.view_as_complex(part[name]) for name in ("mix", "spread", "gain", "dropped")
        )
        kept = KeptRope(part["source"], mix, spread, part["frequencies"])
        mean = (part["mean"], part["latent_mean"]) if "mean" in part else None
        axes = Axes(part["energy"], part["down"], part["key_up"], part["value_up"], mean)
        return Surveyed(Rope(kept, gain, dropped), axes, facts)

    def losses(self) -> Losses:
        """What each layer loses at any rank, in nats."""
        rotations, axes = [], []
        for index in range(self.count):
            layer = self.layer(index)
            rotations.append(layer.facts["rope_kl"])
            axes.append(tuple((layer.axes.energy / 2).tolist()))
        return Losses(
            tuple(rotations),
            tuple(axes),
            self.plan.target.qk_rope_head_dim or 0,
            self.plan.source_layer.cache_width,
        )

    def _store(self, index: int, found: Surveyed) -> None:
        kept, axes, rope = found.rope.kept, found.axes, found.rope
        tensors = {"source": kept.source, "frequencies": kept.frequencies}
        tensors |= {"energy": axes.energy, "down": axes.down}
        tensors |= {"key_up": axes.key_up, "value_up": axes.value_up}
        complex_ones = {"mix": kept.mix, "spread": kept.spread}
        complex_ones |= {"gain": rope.gain, "dropped": rope.dropped}
        for name, value in complex_ones.items():
            tensors[name] = torch.view_as_real(value.resolve_conj())
        if axes.mean is not None:
            tensors["mean"], tensors["latent_mean"] = axes.mean
        write_json_atomic(self._path(index).with_suffix(".json"), found.facts)
        data = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        with atomic_file(self._path(index), len(data)) as file:
            file.write(data)

    def _path(self, index: int) -> Path:
        return self.work / f"survey-{index:05d}.safetensors"

    def _survey(self, layer: Layer, theta: float | None) -> Surveyed:
        """Chooses a layer's rotations, then the axes of what is left."""
        schedules: list[torch.Tensor | None] = [layer_schedule(self.config, layer.index, theta)]
        if self.goal.has("frequencies"):
            schedules = [None, *schedules]
        rope, facts = self.choose_rope(layer, schedules)
        facts |= {
            "frequencies": rope.kept.frequencies.tolist(),
            "variance": layer.statistics.output,
        }
        return Surveyed(rope, self._axes(layer, rope), facts)

    def _axes(self, layer: Layer, rope: Rope) -> Axes:
        weights, has = layer.weights, self.goal.has
        spec = self.reader.spec.layers[layer.index].absorbed
        keys, seen = closed_form.unrotated_keys(weights, rope.kept), layer.statistics
        moment = seen.attended if has("tokens") else seen.inputs
        if has("metric"):
            metric = (
                closed_form.key_metric(seen, spec, rope.dropped),
                closed_form.value_metric(seen, spec, weights, layer.felt),
            )
        else:
            rope_dim, groups = len(rope.kept.frequencies) * 2, len(weights.k)
            metric = closed_form.balance_metric(keys, weights.values, moment, rope_dim, groups)
        bias = spec.kv_bias and weights.normed is None
        return closed_form.output_axes(
            keys, weights.values, moment, metric, centred=has("means"), bias=bias
        )

    def choose_rope(
        self, layer: Layer, schedules: Sequence[torch.Tensor | None]
    ) -> tuple[Rope, dict[str, Any]]:
        """The rotations to keep, judged by the held-out error before any rank is cut."""
        best, chosen = float("inf"), None
        spec = self.reader.spec.layers[layer.index].absorbed
        trial = Trial(layer.weights, spec, layer.factor, layer.held_out)
        for schedule in schedules:
            for shrinkage in SHRINKAGES if self.goal.has("phase") else (0.0,):
                rope = self._rope(layer, schedule, shrinkage)
                error = trial.error(rope, layer.importance)
                if error < best:
                    best, chosen = error, (rope, shrinkage)
        assert chosen is not None
        rope, shrinkage = chosen
        facts: dict[str, Any] = {"shrinkage": shrinkage}
        if layer.importance is None:
            return rope, {**facts, "rope_error": best}
        return rope, {**facts, "rope_error": trial.error(rope), "rope_kl": best / 2}

    def _observe(self, index: int) -> Layer:
        """Runs a layer on its stored inputs, and stores the next layer's."""
        weights = layer_weights(self.reader, index)
        frequencies, factor = self.reader.frequencies(index)
        spec = self.reader.spec.layers[index].absorbed
        metric = None if self.sensitivity is None else self.sensitivity.matrix(index)
        felt = felt_output(weights, metric)
        observer = Observer(weights, spec, frequencies, factor, self.fitted, felt)
        model = self.reader.layer(index)
        observer.watch(model.layers[0].self_attn)
        self.stream.run(index, model)
        return Layer(
            index,
            weights,
            observer.statistics(),
            observer.held_out,
            metric,
            felt,
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
            name = "rope_error" if self.sensitivity is None else "rope_kl"
            for index in range(self.stream.start(0), self.count):
                self.progress("theta", index, self.count)
                layer = self._observe(index)
                for theta in thetas:
                    _, facts = self.choose_rope(layer, [layer_schedule(self.config, index, theta)])
                    errors[theta] += facts[name] / self.count
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
            layer.key_moment,
            layer.frequencies,
            layer.factor,
            self.plan.target.qk_rope_head_dim or 0,
            schedule=None if schedule is None else schedule.to(self.reader.device),
            shrinkage=shrinkage,
            unitary=self.goal.has("unitary"),
            sensitive=self.goal.has("metric"),
        )
