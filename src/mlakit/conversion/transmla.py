"""The published compress conversion, layer by layer (TransMLA, arXiv 2502.07864v3, section 4).

Two passes over the calibration windows, as published. The first runs the source and keeps one
key moment per layer, from which the rotation for any freqfold follows. The second runs the model
with partial RoPE and fits the joint low rank to what its layers see. Each pass keeps the inputs
of one layer on disk; whatever is there when a run is killed is used when it goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mlakit.checkpoint import write_json_atomic
from mlakit.checkpoint.writing import atomic_file
from mlakit.conversion.budget import freqfold_candidates
from mlakit.conversion.calibrate import (
    Moment,
    batch_size,
    layer_weights,
    partial_rope_layer,
    partial_rope_perplexity,
    run_layer,
    split_held_out,
)
from mlakit.conversion.factor import Tensors, compress, joint_low_rank
from mlakit.conversion.plan import ConversionPlan, Progress
from mlakit.conversion.rotate import Rotation, rorope
from mlakit.conversion.stream import Activations, LayerReader
from mlakit.errors import MlakitError

LayerResult = tuple[int, Tensors, dict[str, float]]
"""Layer index, its new attention tensors in float64, and what was measured on it."""


class TransMLA:
    """One compress conversion in progress.

    Args:
        reader: the source.
        plan: sizes, freqfold.
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
        self.work = work
        self.progress = progress
        self.count = len(plan.layers)
        self.windows, self.held_out = windows, windows[:0]
        if plan.goal.freqfold == "auto":
            self.windows, self.held_out = split_held_out(windows)
        self.size = batch_size(windows.shape[1])

    def layers(self, done: Callable[[int], bool]) -> Iterator[LayerResult]:
        """Converts every layer that is not done yet, in order.

        The caller must have stored a layer for good before it asks for the next one.
        """
        self._collect_key_moments()
        self.freqfold, self.perplexity = self._choose_freqfold()
        start = next((index for index in range(self.count) if not done(index)), self.count)
        start = self._first_inputs("partial", start)
        for index in range(start, self.count):
            self.progress("compress", index, self.count)
            weights, rotation = layer_weights(self.reader, index), self._rotation(index)
            model = partial_rope_layer(self.reader, index, weights, rotation)
            moment = self._pass_through("partial", index, model)
            rank = self.plan.target.kv_lora_rank or 0
            low_rank = joint_low_rank(weights, rotation, moment, rank)
            spec = self.reader.spec.layers[index]
            yield index, compress(weights, spec, rotation, low_rank), {"kept": low_rank.kept}
            self._inputs("partial", index).remove()
        self.progress("compress", self.count, self.count)

    def _collect_key_moments(self) -> None:
        """First pass: the source's own activations give ``E[k k^T]`` of every layer."""
        paths = [self._key_moment(index) for index in range(self.count)]
        missing = next((i for i, path in enumerate(paths) if not path.exists()), self.count)
        if missing == self.count:
            return
        for index in range(self._first_inputs("source", missing), self.count):
            self.progress("calibrate", index, self.count)
            moment = self._pass_through("source", index, self.reader.layer(index))
            keys = layer_weights(self.reader, index).keys
            tensor = (keys @ moment @ keys.mT).cpu()
            _save(self._key_moment(index), tensor)
            self._inputs("source", index).remove()
        self._inputs("source", self.count).remove()
        self.progress("calibrate", self.count, self.count)

    def _choose_freqfold(self) -> tuple[int, dict[int, float]]:
        """The fold to use and, for ``auto``, the held-out perplexity of each one tried.

        As published, folds double from d/R for as long as the partial-RoPE model improves; unlike
        there, it is judged on held-out calibration text, never on a test set.
        """
        if self.plan.goal.freqfold != "auto":
            return int(self.plan.goal.freqfold), {}
        source, rope_dim = self.plan.source_layer, self.plan.target.qk_rope_head_dim or 0
        folds = freqfold_candidates(source.head_dim, rope_dim)
        record = self.work / "freqfold.json"
        tried = {}
        if record.exists():
            tried = {int(fold): value for fold, value in json.loads(record.read_text()).items()}
        steps = iter(range(1, len(folds) * self.count + 1))
        total = len(folds) * self.count
        for fold in folds:
            values = list(tried.values())
            if len(values) > 1 and values[-1] >= values[-2]:
                break
            if fold not in tried:
                tried[fold] = partial_rope_perplexity(
                    self.reader,
                    self.held_out,
                    partial(self._rotation, fold=fold),
                    lambda: self.progress("freqfold", next(steps), total),
                )
                write_json_atomic(record, tried)
        self.progress("freqfold", total, total)
        return min(tried, key=lambda fold: (tried[fold], fold)), tried

    def _rotation(self, index: int, fold: int | None = None) -> Rotation:
        moment = load_file(self._key_moment(index))["moment"].to(self.reader.device)
        groups = self.plan.source_layer.num_key_value_heads
        rope_dim = self.plan.target.qk_rope_head_dim or 0
        return rorope(moment, groups, rope_dim, fold or self.freqfold)

    def _pass_through(self, stream: str, index: int, model: Any) -> torch.Tensor:
        """Runs a layer on its stored inputs, stores the next layer's; gives ``E[x x^T]``."""
        moment = Moment()
        moment.watch(model.layers[0].self_attn)
        batches = self._inputs(stream, index).batches(self.size)
        outputs = run_layer(model, batches, self.reader.device)
        self._inputs(stream, index + 1).write(outputs)
        if not bool(moment.value.isfinite().all()):
            raise MlakitError(
                f"The activations of layer {index} are not finite numbers",
                remedy="check that the source itself works: mlakit generate",
            )
        return moment.value

    def _first_inputs(self, stream: str, wanted: int) -> int:
        """The layer to start at: ``wanted`` if its inputs are stored, else 0, embedded anew."""
        if wanted == self.count or self._inputs(stream, wanted).exists():
            return wanted
        self._inputs(stream, 0).write(self.reader.embed(self.windows, self.size))
        return 0

    def _inputs(self, stream: str, index: int) -> Activations:
        shape = (*self.windows.shape, self.plan.source_layer.hidden_size)
        return Activations(self.work / f"{stream}-{index:05d}.f32", shape)

    def _key_moment(self, index: int) -> Path:
        return self.work / f"keys-{index:05d}.safetensors"


def _save(path: Path, moment: torch.Tensor) -> None:
    from safetensors.torch import save

    data = save({"moment": moment.contiguous()})
    with atomic_file(path, len(data)) as file:
        file.write(data)
