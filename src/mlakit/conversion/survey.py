"""The method ``mlakit``, first half: one pass over the source, layer by layer, before any size.

What calibration text cannot say in advance (how far to trust mean phases, which frequencies to
keep) is tried out: an eighth of the windows enters no statistic, and the choice is the one whose
output errs least on them. No other text is looked at. What is kept of a layer makes it at any
rank and at each of a few rotary widths, and says what each will cost.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from mlakit.checkpoint import write_json_atomic
from mlakit.checkpoint.writing import atomic_file
from mlakit.conversion import closed_form
from mlakit.conversion.allocate import Losses
from mlakit.conversion.calibrate import batch_size, layer_weights, split_held_out
from mlakit.conversion.card import converted_config
from mlakit.conversion.closed_form import Axes, Rope
from mlakit.conversion.factor import AttentionWeights
from mlakit.conversion.observe import HeldOut, Observer, Statistics, Wrong, felt_output
from mlakit.conversion.plan import ConversionPlan, Progress, resized
from mlakit.conversion.rotate import KeptRope
from mlakit.conversion.sensitivity import Sensitivity
from mlakit.conversion.stream import LayerReader, Stream
from mlakit.conversion.student import layer_schedule
from mlakit.conversion.trial import Trial
from mlakit.spec import AttentionSpec

SHRINKAGES = (1.0, 0.75, 0.5, 0.25, 0.0)
"""How much of the measured mean phase is taken; tried in this order."""

THETA_POWERS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
"""Bases that are tried for a fixed layout: the source's to these powers. A smaller base spends
the kept dimensions on frequencies that do turn within a text."""


@dataclass(frozen=True)
class Layer:
    """A source layer and what was seen of it.

    Attributes:
        spec: the layer, in its absorbed form where it is latent.
        importance: the metric of its output.
        felt: ``felt_output`` in this metric.
    """

    index: int
    spec: AttentionSpec
    weights: AttentionWeights
    statistics: Statistics
    held_out: list[HeldOut]
    importance: torch.Tensor | None
    felt: torch.Tensor
    frequencies: torch.Tensor
    factor: float

    @cached_property
    def value_metric(self) -> torch.Tensor:
        """``closed_form.value_metric``."""
        return closed_form.value_metric(self.statistics, self.spec, self.weights, self.felt)

    def trial(self) -> Trial:
        """Its held-out windows, ready for candidates."""
        return Trial(self.weights, self.spec, self.factor, self.held_out, self.importance)


@dataclass(frozen=True)
class Surveyed:
    """What is kept of a layer at one rotary width: its rotations, its axes, what was measured."""

    rope: Rope
    axes: Axes
    facts: dict[str, Any]


class Survey:
    """Looks at every layer of the source once.

    Args:
        reader: the source.
        plan: rotary widths, parts of the method.
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
        self.configs = {
            rope_dim: converted_config(
                reader.checkpoint.config,
                resized(plan, plan.ranks, rope_dim, plan.target.cache_format),
                reader.spec,
                0,
            )
            for rope_dim in plan.rope_dims
        }
        self.sensitivity: Sensitivity | None = None
        if self.goal.has("downstream"):
            seed = plan.calibration.seed if plan.calibration else 0
            fitted = windows[: self.fitted]
            self.sensitivity = Sensitivity(reader, fitted, work, seed, progress)
        self.thetas: dict[int, float] = {}

    def run(self) -> None:
        """Looks at the layers that are not surveyed yet, in order."""
        if self.sensitivity is not None:
            self.sensitivity.collect()
        self._choose_thetas()
        done = [
            all(self._path(index, rope_dim).exists() for rope_dim in self.configs)
            for index in range(self.count)
        ]
        start = done.index(False) if False in done else self.count
        for index in range(self.stream.start(start) if start < self.count else start, self.count):
            self.progress("survey", index, self.count)
            self._survey(self._observe(index))
            self.stream.inputs(index).remove()
        self.stream.inputs(self.count).remove()
        self.progress("survey", self.count, self.count)

    def layer(self, index: int, rope_dim: int) -> Surveyed:
        """What was kept of a layer."""
        path = self._path(index, rope_dim)
        found, facts = load_file(path), json.loads(path.with_suffix(".json").read_text())
        part = {  # copied: complex numbers call for a stricter alignment than the file's
            name: tensor.clone().to(self.reader.device) for name, tensor in found.items()
        }
        mix, spread, gain, dropped = (
            torch.view_as_complex(part[name]) for name in ("mix", "spread", "gain", "dropped")
        )
        kept = KeptRope(part["source"], mix, spread, part["frequencies"])
        metric = (part["key_metric"], part["value_metric"])
        axes = Axes(part["energy"], part["rows"], metric, part.get("centre"))
        return Surveyed(Rope(kept, gain, dropped), axes, facts)

    def losses(self) -> list[Losses]:
        """What each layer loses at any rank, in nats; of every rotary width, ascending."""
        every = []
        for rope_dim in self.configs:
            rotations, axes = [], []
            for index in range(self.count):
                path = self._path(index, rope_dim)
                rotations.append(json.loads(path.with_suffix(".json").read_text())["rope_kl"])
                with safe_open(path, "pt") as file:
                    axes.append(tuple((file.get_tensor("energy") / 2).tolist()))
            full = self.plan.source_layer.cache_width
            every.append(Losses(tuple(rotations), tuple(axes), rope_dim, full))
        return every

    def _store(self, path: Path, found: Surveyed) -> None:
        kept, axes, rope = found.rope.kept, found.axes, found.rope
        tensors = {"source": kept.source, "frequencies": kept.frequencies}
        tensors |= {"energy": axes.energy, "rows": axes.rows}
        tensors |= dict(zip(("key_metric", "value_metric"), axes.metric, strict=True))
        complex_ones = {"mix": kept.mix, "spread": kept.spread}
        complex_ones |= {"gain": rope.gain, "dropped": rope.dropped}
        for name, value in complex_ones.items():
            tensors[name] = torch.view_as_real(value.resolve_conj())
        if axes.centre is not None:
            tensors["centre"] = axes.centre
        write_json_atomic(path.with_suffix(".json"), found.facts)
        data = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        with atomic_file(path, len(data)) as file:
            file.write(data)

    def _path(self, index: int, rope_dim: int) -> Path:
        return self.work / f"survey-{index:05d}-{rope_dim}.safetensors"

    def _survey(self, layer: Layer) -> None:
        """Chooses a layer's rotations, at every width, then the axes of what is left."""
        trial, variance, chosen = layer.trial(), layer.statistics.output, {}
        for rope_dim, config in self.configs.items():
            schedule = layer_schedule(config, layer.index, self.thetas.get(rope_dim))
            schedules = [None, schedule] if self.goal.has("frequencies") else [schedule]
            chosen[rope_dim] = self.choose_rope(layer, trial, rope_dim, schedules)
        del trial
        for rope_dim, (rope, facts) in chosen.items():
            turns = rope.kept.frequencies.tolist()
            facts |= {"frequencies": turns, "variance": variance}
            found = Surveyed(rope, self._axes(layer, rope), facts)
            self._store(self._path(layer.index, rope_dim), found)

    def _axes(self, layer: Layer, rope: Rope) -> Axes:
        common = (layer.weights, layer.statistics, rope.kept)
        if self.goal.has("metric"):
            keys_felt = closed_form.key_metric(layer.statistics, layer.spec, rope.dropped)
            metric = (keys_felt, layer.value_metric)
        else:
            metric = closed_form.balance_metric(*common)
        return closed_form.output_axes(*common, metric, centred=self.goal.has("means"))

    def choose_rope(
        self,
        layer: Layer,
        trial: Trial,
        rope_dim: int,
        schedules: Sequence[torch.Tensor | None],
    ) -> tuple[Rope, dict[str, Any]]:
        """The rotations to keep, judged by the held-out error before any rank is cut."""
        best: Wrong | None = None
        for schedule in schedules:
            before = math.inf
            for shrinkage in SHRINKAGES if self.goal.has("phase") else (0.0,):
                rope = self._rope(layer, rope_dim, schedule, shrinkage)
                error = trial.error(rope)
                if best is None or error.felt < best.felt:
                    best, chosen, facts = error, rope, {"shrinkage": shrinkage}
                if error.felt > before:
                    break  # a parabola, about: further from its lowest point it only rises
                before = error.felt
        assert best is not None
        facts["rope_error"] = best.share
        if layer.importance is not None:
            facts["rope_kl"] = best.felt / 2
        return chosen, facts

    def _observe(self, index: int) -> Layer:
        """Runs a layer on its stored inputs, and stores the next layer's."""
        weights = layer_weights(self.reader, index)
        frequencies, factor = self.reader.frequencies(index)
        spec = self.reader.spec.layers[index].absorbed
        metric = None if self.sensitivity is None else self.sensitivity.matrix(index)
        felt = felt_output(weights, metric)
        weigh = self.goal.has("tokens")
        observer = Observer(weights, spec, frequencies, factor, self.fitted, felt, weigh=weigh)
        model = self.reader.layer(index)
        observer.watch(model.layers[0].self_attn)
        self.stream.run(index, model)
        return Layer(
            index,
            spec,
            weights,
            observer.statistics(),
            observer.held_out,
            metric,
            felt,
            frequencies,
            factor,
        )

    def _choose_thetas(self) -> None:
        """For layouts of one schedule, of each width: the base that errs least over all layers."""
        if self.goal.has("frequencies") or not self.goal.has("theta"):
            return
        if self.reader.family.rope_by_type:
            return  # it has several bases
        record = self.work / "theta.json"
        if not record.exists():
            write_json_atomic(record, self._try_thetas())
            self.progress("theta", self.count, self.count)
        for rope_dim, errors in json.loads(record.read_text()).items():
            self.thetas[int(rope_dim)] = float(min(errors, key=lambda theta: errors[theta]))

    def _try_thetas(self) -> dict[int, dict[float, float]]:
        """The mean error over layers of every rotary width and base."""
        name = "rope_error" if self.sensitivity is None else "rope_kl"
        source = next(iter(self.configs.values()))["rope_parameters"]["rope_theta"]
        thetas = [float(f"{source**power:.4g}") for power in THETA_POWERS]
        found = {rope_dim: dict.fromkeys(thetas, 0.0) for rope_dim in self.configs}
        for index in range(self.stream.start(0), self.count):
            self.progress("theta", index, self.count)
            layer = self._observe(index)
            trial = layer.trial()
            for rope_dim, errors in found.items():
                for theta in thetas:
                    schedule = layer_schedule(self.configs[rope_dim], index, theta)
                    _, facts = self.choose_rope(layer, trial, rope_dim, [schedule])
                    errors[theta] += facts[name] / self.count
            self.stream.inputs(index).remove()
        return found

    def _rope(
        self, layer: Layer, rope_dim: int, schedule: torch.Tensor | None, shrinkage: float
    ) -> Rope:
        return closed_form.choose_rope(
            layer.weights,
            layer.statistics,
            layer.frequencies,
            layer.factor,
            rope_dim,
            schedule=None if schedule is None else schedule.to(self.reader.device),
            shrinkage=shrinkage,
            unitary=self.goal.has("unitary"),
            sensitive=self.goal.has("metric"),
        )
