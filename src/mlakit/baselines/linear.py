"""A prefix as a state of constant size: linear attention, taught to imitate softmax.

Tokens after the prefix keep softmax, as LoLCATs mixes both: a query adds what the state answers to
what it reads exactly, under one denominator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import Cache

from mlakit.baselines.method import CALIBRATION_TOKENS, Bench, Method, Setting, Variant
from mlakit.baselines.prefix import ATTENTION, PrefixLayer, read_prefix
from mlakit.spec import ModelSpec

STEPS, RATE = 200, 0.01
"""Adam's steps per layer and its rate."""


@dataclass
class FeatureMap:
    """What makes queries and keys into features, per head: ``[softmax(x W), softmax(-x W)]``.

    Attributes:
        query: W of each query head ``[H, d, F/2]``.
        key: W of each key head ``[G, d, F/2]``.
        weight: logarithm of what the state counts beside ``exp(q k)``, ``[H, 1, 1]``.

    Source: Hedgehog, https://arxiv.org/abs/2402.04347, section 4.2.
    """

    query: Tensor
    key: Tensor
    weight: Tensor

    @classmethod
    def new(cls, heads: int, groups: int, dim: int, device: torch.device) -> FeatureMap:
        """F = 2 d, the identity as W."""
        eye = torch.eye(dim, device=device)
        return cls(
            eye.repeat(heads, 1, 1), eye.repeat(groups, 1, 1), torch.zeros(heads, 1, 1).to(device)
        )

    def of_queries(self, queries: Tensor) -> Tensor:
        """Features ``[H, S, F]`` of queries ``[H, S, d]``."""
        return features(queries @ self.query)

    def state(self, keys: Tensor, values: Tensor) -> Tensor:
        """The state ``[G, F, d_v + 1]`` of keys and values ``[G, P, d]``; ones give the sums."""
        ones = torch.cat([values, torch.ones_like(values[..., :1])], -1)
        return features(keys @ self.key).mT @ ones


def features(x: Tensor) -> Tensor:
    """Positive features ``[..., F]`` of ``[..., F/2]``."""
    return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)


def mixed_attention(
    features: Tensor, state: Tensor, weight: Tensor, scores: Tensor, values: Tensor
) -> Tensor:
    """Softmax over exact tokens and linear attention over a state, in one average.

    Args:
        features: of the queries ``[H, S, F]``, float32.
        state: ``[G, F, d_v + 1]``.
        weight: logarithm of what the state counts, ``[H, 1, 1]``.
        scores: of the exact tokens ``[H, S, n]``, minus infinity where they are not seen.
        values: of the exact tokens ``[G, n, d_v]``.

    Returns:
        ``[H, S, d_v]``.
    """
    repeats = len(features) // len(state)
    state, values = (x.repeat_interleave(repeats, 0) for x in (state, values))
    sums = features @ state
    far, count = sums[..., :-1], sums[..., -1:].clamp_min(torch.finfo(sums.dtype).tiny)
    share = count.log() + weight  # as a score, so that scores of any size stay finite
    top = torch.maximum(scores.amax(-1, keepdim=True), share).detach()
    weights, share = (scores - top).exp(), (share - top).exp()
    return (weights @ values + share * (far / count)) / (weights.sum(-1, keepdim=True) + share)


class StateLayer(PrefixLayer):
    """A prefix as its state alone, float32."""

    def __init__(self, keys: Tensor, values: Tensor, feature_map: FeatureMap) -> None:
        """Sums up a prefix ``[1, G, P, d]``."""
        length = keys.shape[2]
        super().__init__(keys[..., length:, :], values[..., length:, :], seen=length, held=0)
        self.model_parts = lambda: feature_map  # one for all tokens
        self.state = feature_map.state(keys[0].float(), values[0].float())


class MixedAttention(TorchFunctionMode):
    """Answers every attention call from the layer's state and its exact tokens."""

    def __init__(self, cache: Cache) -> None:
        super().__init__()
        self.cache: Any = cache
        self.call = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replaces attention; all else passes."""
        kwargs = kwargs or {}
        if func is not ATTENTION:
            return func(*args, **kwargs)
        layer = self.cache.layers[self.call % len(self.cache.layers)]
        self.call += 1
        queries, dtype = args[0][0].float(), args[0].dtype
        keys, values = layer.keys[0].float(), layer.values[0].float()
        scale = kwargs.get("scale") or queries.shape[-1] ** -0.5
        scores = causal_scores(queries, keys, scale)
        found = layer.model_parts()
        read = found.of_queries(queries)
        return mixed_attention(read, layer.state, found.weight, scores, values)[None].to(dtype)


def causal_scores(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """``[H, S, n]`` of queries ``[H, S, d]``, the last S of the n tokens whose keys are given."""
    steps, length = queries.shape[1], keys.shape[1]
    scores = queries @ keys.repeat_interleave(len(queries) // len(keys), 0).mT * scale
    seen = torch.ones(steps, length, dtype=torch.bool, device=keys.device).tril(length - steps)
    return scores.masked_fill(~seen, float("-inf"))


Sample = tuple[Tensor, Tensor, Tensor]
"""Queries ``[H, T, d]``, keys and values ``[G, T, d]`` of a layer on one window, float32."""


def teach(samples: Sequence[Sample], scale: float, seed: int) -> FeatureMap:
    """Trains a layer's feature map to give the outputs of softmax attention.

    The first half of each window becomes the state, the second half asks. One window a step.
    """
    queries, keys, _ = samples[0]
    found = FeatureMap.new(len(queries), len(keys), keys.shape[-1], keys.device)
    found.weight += log_share(found, samples[0], scale)
    parts = [found.query, found.key, found.weight]
    for part in parts:
        part.requires_grad_(True)
    optimiser = torch.optim.Adam(parts, lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(STEPS):
            index = int(torch.randint(len(samples), (), generator=generator))
            loss = imitation(found, samples[index], scale)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    for part in parts:
        part.requires_grad_(False)
    return found


def log_share(found: FeatureMap, sample: Sample, scale: float) -> Tensor:
    """How much more softmax gives to the first half of a window than the state, ``[H, 1, 1]``."""
    queries, keys, values = sample
    half = keys.shape[1] // 2
    asked, repeats = queries[:, half:], len(queries) // len(keys)
    scores = asked @ keys[:, :half].repeat_interleave(repeats, 0).mT * scale
    state = found.state(keys[:, :half], values[:, :half]).repeat_interleave(repeats, 0)
    own = (found.of_queries(asked) @ state)[..., -1]
    return (scores.logsumexp(-1) - own.log()).mean(-1)[:, None, None]


def imitation(found: FeatureMap, sample: Sample, scale: float) -> Tensor:
    """Mean square error of the mixed attention, over that of an output of zero."""
    queries, keys, values = sample
    half = keys.shape[1] // 2
    asked = queries[:, half:]
    repeats = len(queries) // len(keys)
    exact = causal_scores(asked, keys, scale).softmax(-1) @ values.repeat_interleave(repeats, 0)
    near = causal_scores(asked, keys[:, half:], scale)
    state = found.state(keys[:, :half], values[:, :half])
    read = found.of_queries(asked)
    mixed = mixed_attention(read, state, found.weight, near, values[:, half:])
    return (mixed - exact).square().mean() / exact.square().mean()


def _settings(spec: ModelSpec, budgets: Sequence[float]) -> list[Setting]:
    dim = spec.layers[0].head_dim
    return [Setting(f"{2 * dim} features", 2 * dim)]


def _linear(bench: Bench, count: float) -> Variant:
    model = bench.source.model
    samples: list[list[Sample]] = [[] for _ in bench.spec.layers]
    scale = 1.0
    for ids in bench.calibration_ids:
        prefix = read_prefix(model, ids, max_length=len(ids), queries=True)
        scale = prefix.scale
        for layer, (keys, values) in enumerate(prefix.layers):
            parts = (prefix.queries[layer], keys, values)
            samples[layer].append((parts[0][0].float(), parts[1][0].float(), parts[2][0].float()))
    maps = [teach(windows, scale, bench.seed) for windows in samples]
    return Variant(
        model,
        lambda prefix: prefix.each(
            lambda layer, keys, values: StateLayer(keys, values, maps[layer])
        ),
        reading=MixedAttention,
        trained_tokens=bench.calibration_ids.numel(),
    )


METHODS = (
    Method(
        "linear",
        "linear attention, taught",
        "states",
        "LoLCATs, arXiv 2410.10254",
        f"Feature maps alone are trained, {STEPS} steps a layer on {CALIBRATION_TOKENS:,} tokens, "
        "with no LoRA after it; only the prefix is linear, what follows it keeps softmax.",
        _settings,
        _linear,
    ),
)
