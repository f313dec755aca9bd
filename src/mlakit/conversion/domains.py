"""The texts of a conversion: who has which share, and what the model's own samples cost. No torch.

A domain is a kind of text: prose, code, a language, what the model itself writes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlakit.account import cache_bytes, parameters
from mlakit.checkpoint import Checkpoint
from mlakit.conversion.amounts import (
    CALIBRATION_TOKENS,
    HELD_OUT,
    SHORT_WINDOW,
    TOKEN_BYTES,
    WINDOW,
)
from mlakit.conversion.cost import Estimate
from mlakit.conversion.cost.machine import CPU_FLOPS, CUDA_FLOPS
from mlakit.data import BUILTIN, Source
from mlakit.errors import UsageError
from mlakit.spec import ModelSpec

SAMPLES_CACHE = 2**30
"""Bytes that the caches of samples drawn together take, at most (one sample may take more)."""

MOST_SAMPLES = 64
"""Samples that are drawn together, at most."""


@dataclass(frozen=True)
class Domain:
    """One of the texts: a kind of text, a language, what the model itself writes.

    Attributes:
        name: for tables.
        source: the file, folder or dataset, ``builtin`` or ``self``.
        sha256: of the text; None for what the model writes itself, which follows from the source
            checkpoint and the seed.
        tokens: how many are used, at most.
    """

    name: str
    source: str
    sha256: str | None
    tokens: int


@dataclass(frozen=True)
class Calibration:
    """The texts whose activations are looked at.

    Attributes:
        domains: each has its share of the windows, held-out ones included.
        checks: texts that are only measured on, when all is done.
        tokens: of all domains, at most.
        window: tokens per window.
        seed: chooses the windows of a longer text, and what the model writes itself.
    """

    domains: tuple[Domain, ...]
    checks: tuple[Domain, ...]
    tokens: int
    window: int
    seed: int


def plan_texts(
    model: ModelSpec,
    sources: Sequence[Source],
    checks: Sequence[Source],
    tokens: int,
    seed: int,
    window: int | None = None,
) -> Calibration:
    """Every text's share of the tokens.

    Args:
        model: the source.
        sources: texts to calibrate with.
        checks: texts to measure on.
        tokens: to calibrate with, at most.
        seed: of all choices.
        window: tokens that are read together, at most; how far back statistics look. None for
            the context up to WINDOW, less where text or tokens give only few of them.

    Raises:
        UsageError: there are too few tokens for windows, or windows are too short.
        MlakitError: a text cannot be read.
    """
    if window is not None and window < 2:
        raise UsageError(f"--calib-window {window} is below 2", remedy=f"the default is {WINDOW}")
    longest = tokens // (2 * len(sources))
    if longest < 2:
        raise UsageError(
            f"--calib-tokens {tokens} is too few",
            remedy=f"give thousands; default {CALIBRATION_TOKENS}",
        )
    if window is None:
        window = usual_window(sources, tokens)
    window = min(window, model.max_position_embeddings, longest)
    windows = tokens // window
    shares = [
        windows // len(sources) + (place < windows % len(sources)) for place in range(len(sources))
    ]
    held_out = max(1, windows // HELD_OUT)
    return Calibration(
        domains=tuple(
            _domain(source, share * window) for source, share in zip(sources, shares, strict=True)
        ),
        checks=tuple(_domain(source, held_out * window) for source in checks),
        tokens=tokens,
        window=window,
        seed=seed,
    )


def usual_window(sources: Sequence[Source], tokens: int) -> int:
    """The longest of which every text gives enough to hold some out, within limits."""
    each = tokens // len(sources)
    texts = [len(source.content.plain.encode()) for source in sources if not source.own]
    fewest = min([each, *(size // TOKEN_BYTES for size in texts)])
    return min(WINDOW, max(SHORT_WINDOW, fewest // HELD_OUT))


def _domain(source: Source, tokens: int) -> Domain:
    sha256 = None if source.own else source.content.sha256
    return Domain(source.name, source.label, sha256, tokens)


def rows_together(row_bytes: int) -> int:
    """Samples of a model's own that are drawn at once, from the cache bytes of one."""
    return max(1, min(MOST_SAMPLES, SAMPLES_CACHE // max(1, row_bytes)))


def sampling_bytes(checkpoint: Checkpoint, model: ModelSpec, length: int) -> int:
    """Memory that a model needs to write samples of ``length`` tokens: all of it, and caches."""
    weights = sum(checkpoint.nbytes(name) for name in checkpoint.names)
    row = cache_bytes(model.layers, 1, length, 4 if model.dtype == "float32" else 2)
    return weights + rows_together(row) * (row + 16 * model.vocab_size)


def with_samples(
    estimate: Estimate, texts: Calibration, checkpoint: Checkpoint, model: ModelSpec, device: str
) -> Estimate:
    """A conversion's estimate, that of writing samples included."""
    own = _own_tokens(texts)
    if not own:
        return estimate
    speed = CUDA_FLOPS if device.startswith("cuda") else CPU_FLOPS * (os.cpu_count() or 1)
    return replace(
        estimate,
        memory_bytes=max(estimate.memory_bytes, sampling_bytes(checkpoint, model, texts.window)),
        seconds=round(estimate.seconds + 2.0 * parameters(model).total * own / speed, 1),
    )


def text_warnings(texts: Calibration) -> list[str]:
    """What may disappoint about the texts, one sentence each."""
    found = []
    if _own_tokens(texts):
        found.append(
            f"self: the whole model is in memory while it writes {_own_tokens(texts):,} tokens; the"
            " conversion itself needs one layer at a time"
        )
    if any(domain.source == BUILTIN for domain in texts.domains):
        found.append(
            "calibrated on mlakit's own short text; --calib self, or texts like those that the"
            " model will see, fit it better"
        )
    return found


def _own_tokens(texts: Calibration) -> int:
    domains = (*texts.domains, *texts.checks)
    return sum(domain.tokens for domain in domains if domain.sha256 is None)
