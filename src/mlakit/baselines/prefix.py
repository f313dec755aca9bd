"""A prefix in a cache: exactly as the model filled it, and compressed, with exact tokens after it.

Every method of this room acts between the two. What follows the prefix stays exact in all of them,
so feeding a continuation step by step or at once gives the same logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from mlakit.errors import UnsupportedModelError
from mlakit.evaluation.quality import feed
from mlakit.families import FAMILIES
from mlakit.nn.hf import new_cache
from mlakit.nn.rotary import rotate
from mlakit.ops.cpu_prefill import prefill
from mlakit.spec import ModelSpec

NewCache = Callable[[PreTrainedModel, int, int], Cache]
"""Makes an empty cache for a model, a number of sequences and of tokens."""

ATTENTION = torch.nn.functional.scaled_dot_product_attention

FACTORS = {ATTENTION: "scale", prefill: "softmax_scale"}
"""Who computes attention, and what they call the factor on scores."""


class SeenQueries(TorchFunctionMode):
    """Keeps the queries ``[B, H, S, d]`` of every attention call, in the order of the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.queries: list[Tensor] = []
        self.scale: float | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Looks at attention and lets everything pass."""
        kwargs = kwargs or {}
        if func in FACTORS:
            self.queries.append(args[0])
            self.scale = kwargs.get(FACTORS[func]) or args[0].shape[-1] ** -0.5
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Prefix:
    """P tokens in an exact cache.

    Attributes:
        model: that read them.
        ids: the tokens ``[P]``.
        cache: its own cache.
        queries: per layer ``[1, H, P, d]``, rotated; empty where nobody asked.
        scale: factor on the scores.
        found: what a method worked out of this prefix, for its other settings.
    """

    model: PreTrainedModel
    ids: Tensor
    cache: Cache
    queries: tuple[Tensor, ...] = ()
    scale: float = 1.0
    found: dict[Any, Tensor] = field(default_factory=dict)

    @property
    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys, rotated, and values of every layer, ``[1, G, P, d]`` each."""
        layers: list[Any] = self.cache.layers
        return [(layer.keys, layer.values) for layer in layers]

    def copy(self) -> Cache:
        """The exact cache, to be fed on."""
        return copy.deepcopy(self.cache)

    def each(self, pack: Callable[[int, Tensor, Tensor], PrefixLayer]) -> Cache:
        """A cache with ``pack(index, keys, values)`` as its layers."""
        layers: list[Any] = [pack(i, *pair) for i, pair in enumerate(self.layers)]
        return Cache(layers=layers)


@torch.no_grad()
def read_prefix(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    max_length: int,
    queries: bool = False,
    new_cache: NewCache = new_cache,
) -> Prefix:
    """Reads tokens into an empty cache.

    Args:
        model: an ordinary or converted causal language model.
        ids: int64 ``[P]``.
        max_length: tokens that the cache will have to hold.
        queries: keep the queries too.
        new_cache: makes the cache; one of the model's own kind by default.
    """
    ids = ids.to(model.device)
    cache = new_cache(model, 1, max_length)
    if not queries:
        feed(model, ids, cache, seen=0, last_only=True)
        return Prefix(model, ids, cache)
    with SeenQueries() as seen:
        feed(model, ids, cache, seen=0, last_only=True)
    return Prefix(model, ids, cache, tuple(seen.queries), seen.scale or 1.0)


class Rotation:
    """The rotary embedding of a model at positions 0, 1, ... P - 1, there and back.

    Args:
        model: whose keys turn.
        spec: its layers.

    Raises:
        UnsupportedModelError: keys turn in another layout than halves of the whole head.
    """

    def __init__(self, model: PreTrainedModel, spec: ModelSpec) -> None:
        family, layer = FAMILIES[spec.family], spec.layers[0]
        plain = not family.layout.interleaved and not family.rope_by_type
        turned = all(x.rope is not None and x.rope.dim == x.head_dim for x in spec.layers)
        if not plain or not turned:
            raise UnsupportedModelError(
                f"keys of {spec.model_type} do not turn as halves of a whole head",
                remedy="leave this method out",
            )
        self.embedding: Any = model.get_decoder().rotary_emb
        self.dim = layer.head_dim

    def turn(self, keys: Tensor) -> Tensor:
        """Rotates ``[1, G, P, d]`` to its positions."""
        return rotate(keys, *self._angles(keys))

    def turn_back(self, keys: Tensor) -> Tensor:
        """What ``turn`` made it from."""
        cos, sin = self._angles(keys)
        scale = (cos.square() + sin.square()).unsqueeze(1)  # 1 but for YaRN
        return rotate(keys, cos, -sin) / scale

    def _angles(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.arange(keys.shape[2], device=keys.device)[None]
        return self.embedding(keys.new_zeros(1, dtype=torch.float32), positions)


class PrefixLayer(DynamicLayer):
    """One layer: a packed prefix and, in ``keys`` and ``values``, the exact tokens after it.

    A subclass keeps its packed tensors as attributes, where their bytes are counted, and hands out
    keys and values in ``unpack``.

    Attributes:
        seen: tokens that the packed part stands for.
        held: tokens that ``unpack`` hands out.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, *, seen: int, held: int) -> None:
        """Keeps these exact tokens ``[1, G, n, d]``, clones of their own."""
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys.clone(), values.clone()
        self.seen, self.held = seen, held

    def unpack(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the packed part, ``[1, G, held, d]`` each, in the model's dtype."""
        return self.keys[..., :0, :], self.values[..., :0, :]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds exact tokens; returns all that a query may see."""
        super().update(key_states, value_states)
        keys, values = self.unpack()
        return torch.cat([keys, self.keys], -2), torch.cat([values, self.values], -2)

    def get_seq_length(self) -> int:
        """Tokens read so far, those that are no longer held included: positions go by it."""
        return self.seen + int(self.keys.shape[-2])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens held, and how far the first of them is moved so that the last is the newest."""
        held = self.held + int(self.keys.shape[-2]) + query_length
        return held, self.get_seq_length() + query_length - held


class KeptLayer(PrefixLayer):
    """Some of the tokens, exact; every head may keep its own."""

    def __init__(self, keys: Tensor, values: Tensor, *, seen: int) -> None:
        super().__init__(keys, values, seen=seen - keys.shape[-2], held=0)
