"""What a way to shrink a cache is: a record of it, its settings, and what one setting runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import Cache, PreTrainedModel

from mlakit.baselines.prefix import NewCache, Prefix
from mlakit.data import Source, source_windows
from mlakit.errors import UnsupportedModelError
from mlakit.evaluation import Subject
from mlakit.nn.hf import new_cache
from mlakit.reporting.comparison import Family
from mlakit.spec import AttentionSpec, ModelSpec

CALIBRATION_TOKENS = 8192
"""Tokens that methods of this room calibrate on."""


class Setting(NamedTuple):
    """One dose of a method: how tables call it, and the number that ``build`` gets."""

    label: str
    value: float


@dataclass(frozen=True)
class Bench:
    """What a method may work with.

    Attributes:
        source: the model to shrink; it is never changed.
        spec: the same as plain data.
        path: its folder.
        workspace: folder for checkpoints that a method writes.
        calibration: texts to choose numbers on.
        seed: of everything random.
        train_steps: gradient steps of methods that exist only trained.
        calibration_window: calibration tokens that are read together, less with a shorter context.
    """

    source: Subject
    spec: ModelSpec
    path: Path
    workspace: Path
    calibration: tuple[Source, ...]
    seed: int
    train_steps: int = 0
    calibration_window: int = 512

    @cached_property
    def calibration_ids(self) -> torch.Tensor:
        """Windows of the calibration texts ``[n, T]``, shared evenly among them."""
        length = min(self.source.context, self.calibration_window)
        count = max(1, CALIBRATION_TOKENS // length // len(self.calibration))
        tokenizer = self.source.tokenizer
        windows = [
            w for t in self.calibration for w in source_windows(t, tokenizer, length)[:count]
        ]
        return torch.tensor(windows, device=self.source.model.device)

    @property
    def layer(self) -> AttentionSpec:
        """The first layer; all are alike where ``require_plain`` let the model pass."""
        return self.spec.layers[0]


def exact(prefix: Prefix) -> Cache:
    """The cache as the model itself filled it."""
    return prefix.copy()


@dataclass(frozen=True)
class Variant:
    """What one point runs.

    Attributes:
        model: the source itself, or a changed copy of it.
        compress: makes the cache that the continuation reads from an exactly cached prefix, which
            it leaves as it is.
        needs_queries: ``compress`` reads the queries of the prefix.
        new_cache: makes the empty cache that the prefix is read into.
        reading: holds while the continuation is fed: attention may read less than the cache.
        read_share: of the bytes held, those that one decoded token reads.
        weight_bytes: of the weights as the method stores them, where they run unpacked.
        calibration_tokens: tokens that were looked at to choose numbers.
        trained_tokens: tokens that gradients were taken on.
    """

    model: PreTrainedModel
    compress: Callable[[Prefix], Cache] = exact
    needs_queries: bool = False
    new_cache: NewCache = new_cache
    reading: Callable[[Cache], AbstractContextManager[object]] = lambda cache: nullcontext()
    read_share: float = 1.0
    weight_bytes: int | None = None
    calibration_tokens: int = 0
    trained_tokens: int = 0

    @property
    def by_account(self) -> bool:
        """Whether what it saves is counted and not held: a clock would say nothing of it."""
        return self.weight_bytes is not None or self.read_share != 1


Settings = Callable[[ModelSpec, Sequence[float]], list[Setting]]
"""The doses to measure for a model and the shares of its cache asked for."""


@dataclass(frozen=True)
class Method:
    """One way to shrink a cache.

    Attributes:
        name: as ``--methods`` spells it.
        title: as tables print it.
        family: what it shrinks; points of a family have one colour.
        source: where it comes from.
        differs: what of the original this does not reproduce, one sentence.
        settings: the doses to measure for a model and the shares of its cache asked for.
        build: what one of them runs.
        slow: takes many minutes, so it runs only where it is named.
        trained: exists only trained, so it runs only where steps are given.
    """

    name: str
    title: str
    family: Family
    source: str
    differs: str
    settings: Settings
    build: Callable[[Bench, float], Variant]
    slow: bool = False
    trained: bool = False


def by_share(spec: ModelSpec, budgets: Sequence[float]) -> list[Setting]:
    """One setting for each share of the cache."""
    return [Setting(f"{100 * share:g} %", share) for share in budgets if share < 1]


def require_plain(spec: ModelSpec, length: int) -> None:
    """Refuses models whose cache the methods here would misread.

    Args:
        spec: the model.
        length: the longest sequence that will be cached.

    Raises:
        UnsupportedModelError: latent attention, soft-capped scores, layers that differ, or a
            sliding window below ``length``.
    """
    layers = spec.layers
    reasons = {
        "its attention is latent already": any(x.kv_lora_rank is not None for x in layers),
        "its scores are soft-capped": any(x.logit_softcap for x in layers),
        "its layers cache different widths": len({x.cache_width for x in layers}) > 1,
        f"a sliding window is below {length} tokens": any(
            x.sliding_window is not None and x.sliding_window < length for x in layers
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UnsupportedModelError(
                f"compare does not take this model: {reason}",
                remedy="compare the model it was converted from; for two models use mlakit eval"
                if "latent" in reason
                else "shorten the windows with --prefix-length and --suffix-length"
                if "window" in reason
                else "for its conversion alone use mlakit eval MODEL RESULT",
            )
