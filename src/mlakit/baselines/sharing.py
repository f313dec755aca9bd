"""Layers that share keys and values and are trained to: MLKV, and YOCO's decoder of decoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from mlakit.baselines.layers import FollowerLayer, average_shared, following, groups
from mlakit.baselines.method import Bench, Method, Setting, Variant
from mlakit.baselines.states import yoco_window
from mlakit.baselines.training import train
from mlakit.baselines.weights import attentions, copied, decoder_layers
from mlakit.spec import ModelSpec


class WindowLayer(DynamicLayer):
    """The newest tokens that a window of W can still reach: W - 1.

    Attributes:
        seen: tokens read so far.
    """

    is_sliding = True  # the model's own mask goes by the layers that hold everything
    keys: Tensor | None
    values: Tensor | None

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window, self.seen = window, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """What was held and the new tokens; keeps the newest of them."""
        keys, values = super().update(key_states, value_states)
        self.seen += key_states.shape[2]
        first = max(0, keys.shape[2] - self.window + 1)
        self.keys, self.values = keys[:, :, first:].clone(), values[:, :, first:].clone()
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens read."""
        return self.seen

    @property
    def held(self) -> int:
        """Tokens that it still has."""
        return min(self.seen, self.window - 1)


class Windowed(nn.Module):
    """A layer's own attention, each token to itself and the W - 1 before it."""

    def __init__(self, attention: nn.Module, window: int) -> None:
        super().__init__()
        self.attention, self.window = attention, window

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        """As the attention does, under the window's mask; the cache must hold WindowLayers."""
        index: Any = self.attention.layer_idx
        held, length = kwargs["past_key_values"].layers[index].held, hidden_states.shape[1]
        key = torch.arange(held + length, device=hidden_states.device)
        query = key[held:, None]
        seen = (key <= query) & (key > query - self.window)
        mask = hidden_states.new_zeros(seen.shape).masked_fill(~seen, float("-inf"))
        return self.attention(hidden_states, **kwargs | {"attention_mask": mask[None, None]})


class DecoderDecoder:
    """The cache of a decoder of decoders: windows below, one layer's keys and values above."""

    def __init__(self, window: int) -> None:
        self.window = window

    def __call__(self, model: PreTrainedModel, batch: int, length: int) -> Cache:
        """An empty one."""
        count = model.config.num_hidden_layers
        whole = DynamicLayer()
        layers: list[Any] = [WindowLayer(self.window) for _ in range(count // 2)]
        layers += [whole, *(FollowerLayer(whole) for _ in range(count // 2 + 1, count))]
        return Cache(layers=layers)


def decoder_decoder(model: PreTrainedModel, window: int) -> PreTrainedModel:
    """A copy whose lower half attends in windows and whose upper half shares one layer's cache."""
    student = copied(model)
    lower = len(decoder_layers(student)) // 2
    average_shared(attentions(student)[lower:])
    for layer in decoder_layers(student)[:lower]:
        layer.self_attn = Windowed(layer.self_attn, window)
    return student


def _yoco_settings(spec: ModelSpec, budgets: Sequence[float]) -> list[Setting]:
    window = yoco_window(spec)
    return [Setting(f"windows of {window:,}", window)] if len(spec.layers) > 1 else []


def _yoco(bench: Bench, window: float) -> Variant:
    size = int(window)
    return train(bench, decoder_decoder(bench.source.model, size), DecoderDecoder(size))


def _mlkv(bench: Bench, group: float) -> Variant:
    student, size = copied(bench.source.model), int(group)
    found = attentions(student)
    for leader in range(0, len(found), size):
        average_shared(found[leader : leader + size])
    return train(bench, student, following(size))


METHODS = (
    Method(
        "mlkv-trained",
        "MLKV, trained",
        "layers",
        "arXiv 2406.09297",
        "As untrained MLKV, then attention alone is trained for the steps asked for; the original "
        "trains the whole model on.",
        groups,
        _mlkv,
        trained=True,
    ),
    Method(
        "yoco",
        "YOCO, trained",
        "layers",
        "arXiv 2405.05254",
        "Made from the model's own layers, windows below and one averaged cache above, and "
        "attention alone is trained for the steps asked for, where the original trains from "
        "scratch; the prefill does not stop early.",
        _yoco_settings,
        _yoco,
        trained=True,
    ),
)
