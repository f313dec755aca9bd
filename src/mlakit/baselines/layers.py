"""Layers that share a cache: MiniCache's merged pairs, and MLKV's followers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from mlakit.baselines.bits import fixed
from mlakit.baselines.method import Bench, Method, Setting, Variant
from mlakit.baselines.prefix import KeptLayer, NewCache, Prefix, PrefixLayer
from mlakit.baselines.weights import attentions, copied
from mlakit.spec import ModelSpec

EXACT = 0.05
"""Share of tokens, those whose directions differ most, that MiniCache keeps for both layers."""


def slerp(a: Tensor, b: Tensor) -> Tensor:
    """The direction half way between two unit vectors ``[..., n]`` on their great circle."""
    cosine = (a * b).sum(-1, keepdim=True).clamp(-1, 1)
    angle = cosine.acos()
    weight = (angle / 2).sin() / angle.sin().clamp_min(1e-6)
    middle = torch.where(angle < 1e-3, (a + b) / 2, weight * (a + b))
    return torch.nn.functional.normalize(middle, dim=-1)


@dataclass
class Shared:
    """One direction per token for two layers, and the tokens whose directions differ too much.

    Attributes:
        direction: ``[P, G d]``; likewise for both layers.
        places: int32, tokens kept exact.
    """

    direction: Tensor
    places: Tensor

    @classmethod
    def of(cls, first: Tensor, second: Tensor, keep: int) -> Shared:
        """From rows ``[P, G d]`` of two layers, float32."""
        a, b = (torch.nn.functional.normalize(x, dim=-1) for x in (first, second))
        angles = (a * b).sum(-1).clamp(-1, 1).acos()
        return cls(slerp(a, b), angles.topk(keep).indices.sort().values.int())


@dataclass
class Own:
    """What one layer keeps for itself: norms ``[P, 1]`` and exact rows ``[keep, G d]``."""

    shared: Shared
    norms: Tensor
    rows: Tensor

    def read(self) -> Tensor:
        """Rows ``[P, G d]``, float32."""
        x = self.shared.direction.float() * self.norms.float()
        x[self.shared.places.long()] = self.rows.float()
        return x


class MergedLayer(PrefixLayer):
    """A layer of a merged pair."""

    def __init__(self, keys: Tensor, values: Tensor, own: tuple[Own, Own]) -> None:
        length = keys.shape[2]
        super().__init__(keys[..., length:, :], values[..., length:, :], seen=length, held=length)
        self.own, self.groups = own, keys.shape[1]

    def unpack(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the prefix."""
        keys, values = (
            part.read().unflatten(1, (self.groups, -1)).transpose(0, 1)[None].to(self.dtype)
            for part in self.own
        )
        return keys, values


def merge_pairs(start: int, prefix: Prefix) -> Cache:
    """A cache in which layers ``start`` and on share directions two by two."""
    layers: list[Any] = [KeptLayer(k, v, seen=k.shape[2]) for k, v in prefix.layers]
    for first in range(start, len(layers) - 1, 2):
        pair = prefix.layers[first : first + 2]
        keep = int(EXACT * pair[0][0].shape[2])
        halves: list[tuple[Own, Own]] = []
        for part in (0, 1):
            x = [layer[part][0].transpose(0, 1).flatten(1) for layer in pair]
            shared = Shared.of(x[0].float(), x[1].float(), keep)
            shared.direction = shared.direction.to(x[0].dtype)
            rows = [each[shared.places.long()] for each in x]
            norms = [each.float().norm(dim=-1, keepdim=True).to(each.dtype) for each in x]
            halves.append((Own(shared, norms[0], rows[0]), Own(shared, norms[1], rows[1])))
        for index in (0, 1):
            own = halves[0][index], halves[1][index]
            layers[first + index] = MergedLayer(*pair[index], own)
    return Cache(layers=layers)


class FollowerLayer(DynamicLayer):
    """A layer that reads the cache of the one it follows and holds nothing itself."""

    def __init__(self, leader: DynamicLayer) -> None:
        super().__init__()
        self.leader = leader

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The leader's keys and values; it has stored this step's already."""
        keys, values = self.leader.keys, self.leader.values
        assert keys is not None and values is not None
        return keys, values


def following(group: int) -> NewCache:
    """Makes empty caches in which ``group`` neighbouring layers share the first one's."""

    def make(model: PreTrainedModel, batch: int, length: int) -> Cache:
        layers: list[Any] = []
        for index in range(model.config.num_hidden_layers):
            leader = index - index % group
            layers.append(DynamicLayer() if index == leader else FollowerLayer(layers[leader]))
        return Cache(layers=layers)

    return make


def average_shared(members: Sequence[Any]) -> None:
    """Gives the first of some attentions the mean of their key and value projections."""
    for name in ("k_proj", "v_proj"):
        parts = [getattr(member, name) for member in members]
        for kind in ("weight", "bias"):
            tensors = [getattr(part, kind) for part in parts]
            if tensors[0] is not None:
                mean = torch.stack([t.data.float() for t in tensors]).mean(0)
                tensors[0].data = mean.to(tensors[0].dtype)


def _mlkv(bench: Bench, group: float) -> Variant:
    model, size = copied(bench.source.model), int(group)
    found = attentions(model)
    for leader in range(0, len(found), size):
        average_shared(found[leader : leader + size])
    return Variant(model, new_cache=following(size))


def groups(spec: ModelSpec, budgets: Sequence[float]) -> list[Setting]:
    """Two and four layers with one cache."""
    count = len(spec.layers)
    return [Setting(f"{size} layers share", size) for size in (2, 4) if size <= count]


def _minicache(bench: Bench, start: float) -> Variant:
    first = len(bench.spec.layers) // 2
    return Variant(bench.source.model, partial(merge_pairs, first))


METHODS = (
    Method(
        "minicache",
        "MiniCache",
        "layers",
        "arXiv 2405.14366",
        f"Pairs from the middle layer up; the {EXACT:.0%} of tokens whose directions differ most "
        "stay exact, where the original takes a threshold; not combined with quantisation.",
        partial(fixed, [Setting("upper half in pairs", 0.5)]),
        _minicache,
    ),
    Method(
        "mlkv",
        "MLKV, untrained",
        "layers",
        "arXiv 2406.09297",
        "Layers share the averaged key and value weights of their group and nothing is trained "
        "after it, which the original does.",
        groups,
        _mlkv,
    ),
)
