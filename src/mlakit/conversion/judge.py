"""What a written conversion loses on the held-out windows: per layer, and in the predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mlakit.conversion.calibrate import batch_size, split_held_out
from mlakit.conversion.card import converted_config
from mlakit.conversion.factor import Tensors
from mlakit.conversion.head import Head
from mlakit.conversion.observe import HeldOut
from mlakit.conversion.plan import ConversionPlan, Progress
from mlakit.conversion.quantised import round_latents
from mlakit.conversion.sensitivity import importance
from mlakit.conversion.stream import LayerReader, Stream
from mlakit.conversion.student import Student, layer_schedule


class Judge:
    """Runs source and result, one layer of each at a time, over windows no statistic has seen.

    Args:
        reader: the source.
        plan: the result's sizes.
        windows: token ids ``[windows, T]``; the held-out ones among them are looked at.
        checks: more windows ``[K, T]``, for the predictions alone.
        sensed: the folder of ``Sensitivity``.
        work: for the two streams.
        progress: told about every layer.
    """

    def __init__(
        self,
        reader: LayerReader,
        plan: ConversionPlan,
        windows: torch.Tensor,
        checks: torch.Tensor,
        sensed: Path,
        work: Path,
        progress: Progress,
    ) -> None:
        self.reader, self.plan, self.sensed, self.progress = reader, plan, sensed, progress
        held_out = split_held_out(windows)[1]
        self.held_out, windows = len(held_out), torch.cat([held_out, checks])
        size = batch_size(windows.shape[1])
        self.source = Stream(work, "judge-source", windows, reader, size)
        self.result = Stream(work, "judge-result", windows, reader, size)
        self.config = converted_config(reader.checkpoint.config, plan, reader.spec, 0)
        self.layers: list[dict[str, float]] = []

    def see(self, index: int, tensors: Tensors, frequencies: Sequence[float] | None) -> None:
        """Takes the next layer.

        Args:
            index: of the layer; they come in order, all of them.
            tensors: the layer's attention as it is written, named below ``self_attn.``.
            frequencies: what its rotary dimensions turn with; None for the config's schedule.
        """
        self.progress("judge", index, len(self.plan.layers))
        if index == 0:
            for stream in (self.source, self.result):
                stream.start(0)
        model = self.reader.layer(index)
        seen: list[HeldOut] = []

        def keep(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            hidden, mask = args[0] if args else kwargs["hidden_states"], kwargs["attention_mask"]
            for row, (x, y) in enumerate(zip(hidden, output[0], strict=True)):
                own = None if mask is None else mask[row if len(mask) > 1 else 0, 0]
                if len(seen) < self.held_out:
                    seen.append(HeldOut(x, y, own))

        hook = model.layers[0].self_attn.register_forward_hook(keep, with_kwargs=True)
        self.source.run(index, model)
        hook.remove()
        turns = layer_schedule(self.config, index).tolist() if frequencies is None else frequencies
        student = Student(self.config, index, tensors, turns, self.reader.device)
        if kind := self.plan.target.cache_format:
            round_latents(student.attention, kind)
        sensed = self.plan.goal.has("downstream")
        metric = importance(self.sensed, index).to(self.reader.device) if sensed else None
        wrong = student.error(seen, metric)
        found = {"error": wrong.share} | ({"kl": wrong.felt / 2} if sensed else {})
        self.layers.append(found)
        model.layers[0].self_attn = student
        self.result.run(index, model)
        for stream in (self.source, self.result):
            stream.inputs(index).remove()

    def divergence(self) -> list[tuple[float, float]]:
        """How far the result's predictions are from the source's, on each window.

        Returns:
            The mean KL divergence, and the source's own loss beside it, nats per token; of the
            held-out windows, then of the checks.
        """
        head, last = Head(self.reader), len(self.plan.layers)
        batches = zip(*(stream.inputs(last).batches(1) for stream in (self.source, self.result)))
        found = []
        for (source, other), ids in zip(batches, self.source.windows.split(1), strict=True):
            kl, loss = head.compare(source, other, ids[:, 1:])
            found.append((float(kl.mean()), float(loss.mean())))
        for stream in (self.source, self.result):
            stream.inputs(last).remove()
        return found
