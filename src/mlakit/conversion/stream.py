"""One decoder layer at a time: its inputs in a memory-mapped file, its weights read when needed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mlakit.checkpoint import Checkpoint
from mlakit.checkpoint.writing import atomic_file
from mlakit.conversion.cost.machine import cpu_multiplies_bfloat16
from mlakit.conversion.factor import all_finite
from mlakit.errors import MlakitError, UnsupportedModelError
from mlakit.families import FAMILIES, Family
from mlakit.spec import ModelSpec


class Activations:
    """A float32 file ``[windows, T, D]`` that is either whole or not there.

    Args:
        path: the file.
        shape: ``(windows, T, D)``.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.path = path
        self.shape = shape

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return 4 * self.shape[0] * self.shape[1] * self.shape[2]

    def exists(self) -> bool:
        """Whether the file is there and complete."""
        return self.path.is_file() and self.path.stat().st_size == self.nbytes

    def write(self, batches: Iterable[torch.Tensor]) -> None:
        """Writes batches ``[b, T, D]`` one after the other; the file appears when all are in."""
        with self.writer() as write:
            for batch in batches:
                write(batch)

    @contextmanager
    def writer(self) -> Iterator[Callable[[torch.Tensor], None]]:
        """Takes one batch ``[b, T, D]`` after the other; the file appears at the end."""
        with atomic_file(self.path, self.nbytes) as file:

            def write(batch: torch.Tensor) -> None:
                file.write(batch.float().cpu().contiguous().numpy().data)

            yield write

    def windows(self, rows: Sequence[int]) -> torch.Tensor:
        """These windows, ``[len(rows), T, D]`` float32, on the CPU."""
        mapped = np.memmap(self.path, dtype=np.float32, mode="r", shape=self.shape)
        return torch.from_numpy(np.array(mapped[list(rows)]))

    def batches(self, size: int) -> Iterator[torch.Tensor]:
        """Batches of at most ``size`` windows, ``[b, T, D]`` float32, on the CPU."""
        mapped = np.memmap(self.path, dtype=np.float32, mode="r", shape=self.shape)
        for start in range(0, self.shape[0], size):
            yield torch.from_numpy(np.array(mapped[start : start + size]))

    def remove(self) -> None:
        """Deletes the file, if it is there."""
        self.path.unlink(missing_ok=True)


class Stream:
    """One pass of calibration windows through a chain of layers, resumable at every layer.

    The inputs of one layer are on disk, those of the next are written while it runs.

    Args:
        folder: where the inputs are kept.
        name: of this pass.
        windows: token ids ``[windows, T]``.
        reader: gives embeddings and layers.
        size: windows that go through a layer together.
    """

    def __init__(
        self, folder: Path, name: str, windows: torch.Tensor, reader: LayerReader, size: int
    ) -> None:
        self.folder, self.name = folder, name
        self.windows, self.reader, self.size = windows, reader, size

    def start(self, wanted: int) -> int:
        """The layer to start at: ``wanted`` if its inputs are stored, else 0, embedded anew."""
        if wanted == self.reader.spec.num_hidden_layers or self.inputs(wanted).exists():
            return wanted
        self.inputs(0).write(self.reader.embed(self.windows, self.size))
        return 0

    def run(self, index: int, model: Any) -> None:
        """Runs a one-layer model on the inputs of a layer and stores the next layer's."""
        batches = self.inputs(index).batches(self.size)
        self.inputs(index + 1).write(run_layer(model, batches, self.reader.device))

    def inputs(self, index: int) -> Activations:
        """The file of a layer's inputs."""
        shape = (*self.windows.shape, self.reader.spec.hidden_size)
        return Activations(self.folder / f"{self.name}-{index:05d}.f32", shape)


class LayerReader:
    """Builds the family's own model around any one decoder layer of a checkpoint.

    The family's code then makes its own masks, windows and rotations: nothing is imitated here.

    Args:
        checkpoint: the source.
        model: its description.
        device: where layers run.
    """

    def __init__(self, checkpoint: Checkpoint, model: ModelSpec, device: torch.device) -> None:
        from transformers import AutoConfig

        self.checkpoint = checkpoint
        self.spec = model
        self.family = FAMILIES[model.family]
        self.device = device
        self._finite: set[str] = set()
        with _config_errors(checkpoint.source):
            self._config = AutoConfig.from_pretrained(checkpoint.path)

    def check(self) -> None:
        """Refuses a config that transformers builds no layer from.

        Raises:
            UnsupportedModelError: says what it stumbled over.
        """
        with _config_errors(self.checkpoint.source):
            self._skeleton(0)

    def tensors(self, index: int) -> dict[str, torch.Tensor]:
        """All tensors of a layer, without its prefix, in their stored dtypes."""
        prefix = self.family.layer(index)
        return {
            name.removeprefix(prefix): self._read(name)
            for name in self.checkpoint.names
            if name.startswith(prefix) and "rotary_emb" not in name
        }

    def _read(self, name: str) -> torch.Tensor:
        """A tensor of the source, looked through for what is no number the first time."""
        tensor = self.checkpoint.read(name)
        if name not in self._finite:
            if not all_finite(tensor):
                raise MlakitError(
                    f"{name} of {self.checkpoint.source} holds numbers that are not finite",
                    remedy="the weights are damaged: download or save the checkpoint again",
                )
            self._finite.add(name)
        return tensor

    def attention(self, index: int) -> dict[str, torch.Tensor]:
        """The attention tensors of the standard layer (``families.layouts``), on the device."""
        prefix = self.family.attention_prefix(index)
        tensors = {
            name.removeprefix(prefix): self._read(name).to(self.device)
            for name in self.checkpoint.names
            if name.startswith(prefix) and "rotary_emb" not in name
        }
        return self.family.layout.standard(tensors, self.spec.layers[index])

    def layer(self, index: int) -> Any:
        """A model of this one layer, float32; call it with ``inputs_embeds``.

        Its ``last_hidden_state`` is what the layer gives to the next one. Matrices that are
        stored in bfloat16 stay so where the device multiplies them fast, as the source itself
        runs; they are then pages of the checkpoint's own file. All between them is float32.
        """
        model = self._skeleton(index)
        layer, tensors = model.layers[0], module_tensors(self.tensors(index), self.family)
        attention = {
            f"self_attn.{name}": module
            for name, module in layer.self_attn.named_modules()
            if isinstance(module, nn.Linear)
        }
        parts = {**attention, "mlp": layer.mlp} if multiplies_bfloat16(self.device) else {}
        stays: set[str] = set()
        for prefix, module in parts.items():
            names = {name for name in tensors if name.startswith(f"{prefix}.")}
            if {tensors[name].dtype for name in names} == {torch.bfloat16}:
                stays |= names
                module.register_forward_pre_hook(_narrow)
                module.register_forward_hook(_widen)
        for name in tensors.keys() - stays:
            tensors[name] = tensors[name].float()
        layer.load_state_dict(tensors, assign=True)
        model.norm = nn.Identity()
        return model.to(self.device)

    def frequencies(self, index: int) -> tuple[torch.Tensor, float]:
        """A layer's rotary frequencies ``[d/2]``, float64, and the factor on its cos and sin."""
        spec, rotary = self.spec.layers[index], self._skeleton(index).rotary_emb
        found: torch.Tensor = next(
            value for name, value in rotary.named_buffers() if name.endswith("inv_freq")
        )
        if spec.rope is None:
            found = torch.zeros_like(found)
        padded = nn.functional.pad(found.double(), (0, spec.absorbed.head_dim // 2 - len(found)))
        return padded.to(self.device), float(getattr(rotary, "attention_scaling", 1.0))

    @cached_property
    def longest_embedding(self) -> float:
        """The largest ``|x|`` that a token enters the first layer with."""
        table = self.checkpoint.read(self.family.embedding)
        longest = max(float(rows.float().norm(dim=1).max()) for rows in table.split(4096))
        return longest * self.family.embedding_scale(self.spec.config)

    def head(self) -> tuple[nn.Module, torch.Tensor]:
        """The final norm, float32, and the output matrix ``[vocabulary, D]`` as it is stored."""
        norm = self._skeleton(0).norm
        name = self.family.final_norm
        stored = {kind: self.checkpoint.read(f"{name}.{kind}") for kind in self.family.norm_tensors}
        norm.load_state_dict({kind: part.float() for kind, part in stored.items()}, assign=True)
        tied = self.spec.tie_word_embeddings
        name = self.family.embedding if tied else self.family.output
        return norm.to(self.device), self.checkpoint.read(name).to(self.device)

    def embed(self, windows: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
        """Embeddings ``[b, T, D]`` of windows ``[windows, T]`` of token ids, in batches."""
        table = self.checkpoint.read(self.family.embedding)
        scale = self.family.embedding_scale(self.spec.config)
        for batch in windows.split(size):
            yield table[batch].float() * scale

    def _skeleton(self, index: int) -> Any:
        """The family's model with this one layer and no weights."""
        from transformers import AutoModel

        config = copy.deepcopy(self._config)
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[index]]
        filled = {**self.family.defaults, **self.spec.config}
        for key, value in self.family.single(filled, index).items():
            setattr(config, key, value)
        config.num_hidden_layers = 1
        config.vocab_size, config.pad_token_id = 1, None  # the embedding is never used
        # Where scores are soft-capped, some versions' SDPA leaves the cap out; else they choose.
        kind = "eager" if any(layer.logit_softcap for layer in self.spec.layers) else None
        with torch.device("meta"):
            model = AutoModel.from_config(
                config, dtype=torch.float32, attn_implementation=kind, trust_remote_code=False
            )
        model.embed_tokens = nn.Identity()
        model.rotary_emb = type(model.rotary_emb)(config=config)
        return model.eval()


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16 products with float32 sums."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and cpu_multiplies_bfloat16()


def _narrow(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return args[0].bfloat16(), *args[1:]


def _widen(module: nn.Module, args: Any, output: Any) -> Any:
    """Float32 again; some blocks also give what their router decided."""
    if isinstance(output, tuple):
        return output[0].float(), *output[1:]
    return output.float()


@torch.no_grad()
def run_layer(
    model: Any, batches: Iterable[torch.Tensor], device: torch.device
) -> Iterator[torch.Tensor]:
    """Hidden states ``[b, T, D]`` after a one-layer model, batch by batch, on the CPU."""
    for batch in batches:
        hidden = batch.to(device)
        yield model(inputs_embeds=hidden, use_cache=False).last_hidden_state.cpu()


def module_tensors(tensors: dict[str, torch.Tensor], family: Family) -> dict[str, torch.Tensor]:
    """A stored layer's tensors as transformers' module names them: experts in two tensors."""
    block, found = f"{family.expert_block}.experts.", dict(tensors)
    numbers = {name.split(".")[2] for name in found if name.startswith(block)}
    if "0" in numbers:
        gate, up, down = (
            torch.stack([found.pop(f"{block}{i}.{name}.weight") for i in range(len(numbers))])
            for name in family.expert_projections
        )
        found["mlp.experts.gate_up_proj"] = torch.cat([gate, up], 1)
        found["mlp.experts.down_proj"] = down
    renamed = f"{family.expert_block}."
    return {
        f"mlp.{name.removeprefix(renamed)}" if name.startswith(renamed) else name: tensor
        for name, tensor in found.items()
    }


@contextmanager
def _config_errors(source: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers checks configs in many ways
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UnsupportedModelError(
            f"transformers can build no layer from the config.json of {source}: {reason}",
            remedy="check that config.json is complete and belongs to these weights",
        ) from error
