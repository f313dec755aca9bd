"""How much the model's predictions answer to what each attention block puts out.

A small error ``delta`` in the output of a block changes the predictions by
``KL = 1/2 delta^T F delta`` nats to second order, with the Fisher information
``F = E[g g^T]``, g the gradient of ``log p(y)`` with respect to that output and y drawn from the
model's own predictions (Amari; Martens, arXiv 1412.1193, section 5). With ``G = E[g g^T]`` over
tokens, g summed over all predictions that a token's output reaches, errors that are independent
from token to token cost ``1/2 E[delta^T G delta]`` nats per token.

One pass up that keeps every layer's inputs on disk, one pass down with one layer in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from mlakit.checkpoint.writing import atomic_file
from mlakit.conversion.amounts import SENSITIVITY_BATCH, SENSITIVITY_TOKENS
from mlakit.conversion.factor import all_finite
from mlakit.conversion.head import Head
from mlakit.conversion.plan import Progress
from mlakit.conversion.stream import Activations, LayerReader, Stream
from mlakit.errors import MlakitError


class Sensitivity:
    """``G`` of every layer, kept in the work folder.

    Args:
        reader: the source.
        windows: token ids ``[windows, T]``; of more than enough some are taken from all over.
        work: folder for the result, and for what a later start can use.
        seed: draws the labels.
        progress: told about every layer, up and down.
    """

    def __init__(
        self,
        reader: LayerReader,
        windows: torch.Tensor,
        work: Path,
        seed: int,
        progress: Progress,
    ) -> None:
        wanted = max(1, min(len(windows), SENSITIVITY_TOKENS // windows.shape[1]))
        rows = [index * len(windows) // wanted for index in range(wanted)]
        self.reader, self.windows, self.work = reader, windows[rows], work
        self.seed, self.progress = seed, progress
        self.count = reader.spec.num_hidden_layers
        size = max(1, SENSITIVITY_BATCH // windows.shape[1])
        self.stream = Stream(work, "sense", self.windows, reader, size)

    def collect(self) -> None:
        """Computes what is not there yet; the same to the bit wherever it goes on."""
        missing = [index for index in range(self.count) if not self._file(index).exists()]
        if not missing:
            return
        last = max(missing)
        if not self._gradients(last + 1).exists():
            self._up()
            self._score()
            last = self.count - 1
        for index in range(last, -1, -1):
            self.progress("sensitivity", 2 * self.count - index - 1, 2 * self.count)
            self._down(index)
            self._gradients(index + 1).remove()
            self.stream.inputs(index).remove()
        self._gradients(0).remove()
        self.progress("sensitivity", 2 * self.count, 2 * self.count)

    def matrix(self, index: int) -> torch.Tensor:
        """``G`` of a layer, see ``importance``."""
        return importance(self.work, index).to(self.reader.device)

    def _up(self) -> None:
        """Stores the inputs of every layer, and what the last one gives."""
        if not self.stream.inputs(0).exists():
            self.stream.start(0)
        for index in range(self.count):
            self.progress("sensitivity", index, 2 * self.count)
            if not self.stream.inputs(index + 1).exists():
                self.stream.run(index, self.reader.layer(index))

    def _score(self) -> None:
        """Stores the gradient with respect to what the last layer gives."""
        head, size = Head(self.reader), self.stream.size
        draws = torch.rand(self.windows.shape, generator=torch.Generator().manual_seed(self.seed))
        batches = zip(self.stream.inputs(self.count).batches(size), draws.split(size), strict=True)
        self._gradients(self.count).write(head.score_gradient(*batch) for batch in batches)
        self.stream.inputs(self.count).remove()

    def _down(self, index: int) -> None:
        """One layer: the gradients of its inputs, then its ``G``."""
        model, size = self.reader.layer(index), self.stream.size
        model.requires_grad_(False)
        seen: list[torch.Tensor] = []
        model.layers[0].self_attn.register_forward_hook(
            lambda module, args, output: seen.append(output[0])
        )
        total = torch.zeros((self.reader.spec.hidden_size,) * 2, dtype=torch.float64)
        total = total.to(self.reader.device)
        above = self._gradients(index + 1).batches(size)
        with self._gradients(index).writer() as write:
            for inputs, gradient in zip(self.stream.inputs(index).batches(size), above):
                hidden = inputs.to(self.reader.device).requires_grad_(True)
                output: Any = model(inputs_embeds=hidden, use_cache=False).last_hidden_state
                below, own = torch.autograd.grad(
                    output, (hidden, seen.pop()), gradient.to(self.reader.device)
                )
                write(below)
                flat = own.flatten(0, 1)
                total += flat.mT @ flat
        if not all_finite(total):
            raise MlakitError(
                f"The gradients of layer {index} are not finite numbers",
                remedy="check that the source itself works: mlakit generate",
            )
        tokens, size = self.windows.numel(), len(total)
        known, level = tokens / (tokens + size), float(total.trace()) / tokens / size
        total.mul_(known / tokens).diagonal().add_((1 - known) * level)
        data = save({"matrix": total.float().cpu().contiguous()})
        with atomic_file(self._file(index), len(data)) as file:
            file.write(data)

    def _gradients(self, index: int) -> Activations:
        """With respect to the inputs of a layer."""
        return Activations(self.work / f"gradient-{index:05d}.f32", self.stream.inputs(index).shape)

    def _file(self, index: int) -> Path:
        return _file(self.work, index)


def importance(work: Path, index: int) -> torch.Tensor:
    """``G`` of a layer, ``[D, D]`` float64: nats of KL divergence are ``1/2 E[delta^T G delta]``.

    Measured on few tokens it is drawn towards a multiple of the identity of the same trace.

    Args:
        work: the folder that ``Sensitivity`` kept it in.
        index: of the layer.
    """
    return load_file(_file(work, index))["matrix"].double()


def _file(work: Path, index: int) -> Path:
    return work / f"sensitivity-{index:05d}.safetensors"
