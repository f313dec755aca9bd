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
from mlakit.conversion.adapt import partial_rorope
from mlakit.conversion.calibrate import (
    Moment,
    batch_size,
    layer_weights,
    partial_rope_layer,
    partial_rope_perplexity,
    split_held_out,
)
from mlakit.conversion.factor import Tensors, all_finite, compress, joint_low_rank
from mlakit.conversion.plan import ConversionPlan, Progress
from mlakit.conversion.rotary_sizes import freqfold_candidates
from mlakit.conversion.rotate import Rotation
from mlakit.conversion.stream import LayerReader, Stream
from mlakit.errors import MlakitError

LayerResult = tuple[int, Tensors, dict[str, Any]]
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
        size = batch_size(windows.shape[1])
        self.source = Stream(work, "source", self.windows, reader, size)
        self.partial = Stream(work, "partial", self.windows, reader, size)

    def layers(self, done: Callable[[int], bool]) -> Iterator[LayerResult]:
        """Converts every layer that is not done yet, in order.

        The caller must have stored a layer for good before it asks for the next one.
        """
        self._collect_key_moments()
        self.freqfold, tried = self._choose_freqfold()
        self.measured = {
            "freqfold": self.freqfold,
            "held_out_perplexity": {str(fold): value for fold, value in tried.items()},
        }
        start = next((index for index in range(self.count) if not done(index)), self.count)
        for index in range(self.partial.start(start), self.count):
            self.progress("compress", index, self.count)
            weights, rotation = layer_weights(self.reader, index), self._rotation(index)
            model = partial_rope_layer(self.reader, index, weights, rotation)
            moment = self._pass_through(self.partial, index, model)
            rank = self.plan.target.kv_lora_rank or 0
            low_rank = joint_low_rank(weights, rotation, moment, rank)
            spec = self.reader.spec.layers[index]
            yield index, compress(weights, spec, rotation, low_rank), {"kept": low_rank.kept}
            self.partial.inputs(index).remove()
        self.progress("compress", self.count, self.count)

    def _collect_key_moments(self) -> None:
        """First pass: the source's own activations give ``E[k k^T]`` of every layer."""
        paths = [self._key_moment(index) for index in range(self.count)]
        missing = next((i for i, path in enumerate(paths) if not path.exists()), self.count)
        if missing == self.count:
            return
        for index in range(self.source.start(missing), self.count):
            self.progress("calibrate", index, self.count)
            moment = self._pass_through(self.source, index, self.reader.layer(index))
            keys = layer_weights(self.reader, index).keys
            tensor = (keys @ moment @ keys.mT).cpu()
            _save(self._key_moment(index), tensor)
            self.source.inputs(index).remove()
        self.source.inputs(self.count).remove()
        self.progress("calibrate", self.count, self.count)

    def _choose_freqfold(self) -> tuple[int, dict[int, float]]:
        """The fold to use and, for ``auto``, the held-out perplexity of each one tried.

        As published, folds double from d/R for as long as the partial-RoPE model improves; unlike
        there, it is judged on held-out calibration text, never on a test set.
        """
        if self.plan.goal.freqfold != "auto":
            return int(self.plan.goal.freqfold), {}
        source, rope_dim = self.plan.source_layer, self.plan.target.qk_rope_head_dim or 0
        folds = freqfold_candidates(source.rotary_dim, rope_dim)
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
        rope_dim = self.plan.target.qk_rope_head_dim or 0
        spec = self.reader.spec.layers[index]
        return partial_rorope(moment, spec, rope_dim, fold or self.freqfold)

    def _pass_through(self, stream: Stream, index: int, model: Any) -> torch.Tensor:
        """Runs a layer on its stored inputs, stores the next layer's; gives ``E[x x^T]``."""
        moment = Moment(layer_weights(self.reader, index))
        moment.watch(model.layers[0].self_attn)
        stream.run(index, model)
        if not all_finite(moment.value):
            raise MlakitError(
                f"The activations of layer {index} are not finite numbers",
                remedy="check that the source itself works: mlakit generate",
            )
        return moment.value

    def _key_moment(self, index: int) -> Path:
        return self.work / f"keys-{index:05d}.safetensors"


def _save(path: Path, moment: torch.Tensor) -> None:
    from safetensors.torch import save

    data = save({"moment": moment.contiguous()})
    with atomic_file(path, len(data)) as file:
        file.write(data)
