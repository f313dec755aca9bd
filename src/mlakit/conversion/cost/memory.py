"""Peak memory of a conversion, as a sum of named parts per phase. No torch.

Each part is something that the code holds at that time; pages of mapped files (weights that stay
as they are stored) are not counted, because the kernel may drop them. Where tensors of one kind
come and go within an expression, the part is the most that is held of them at once.
"""

from __future__ import annotations

from mlakit.conversion.amounts import (
    BATCH_TOKENS,
    LOGITS,
    SCORES,
    SENSITIVITY_BATCH,
    STEP_TOKENS,
    TRIAL_BLOCK,
    TRIAL_QUERIES,
)
from mlakit.conversion.cost.dimensions import Dimensions

LIBRARIES = 370 * 2**20
"""Own pages of Python with torch, transformers and a tokenizer loaded."""

HEAP_BLOCK = 32 * 2**20
"""Bytes from which the C library always takes pages for a block alone."""

Parts = dict[str, int]


def footprint(size: Dimensions, *, survey: bool, sensed: bool, refined: bool) -> dict[str, Parts]:
    """Bytes of every part by phase; the peak is the phase with the largest sum.

    Args:
        size: of the layer and the calibration.
        survey: the method looks at attention (``mlakit``), not only at moments of inputs.
        sensed: gradients of the predictions are taken.
        refined: gradient steps follow.
    """
    phases = {"write": _writing(size)}
    if size.tokens:
        phases["moments"] = _observing(size, attention=survey)
        phases["judge"] = _judging(size)
    if survey:
        phases["choose"] = _choosing(size)
    if sensed:
        phases["sensitivity"] = _sensing(size)
    if refined:
        phases["refine"] = _refining(size)
    return {name: {"libraries": LIBRARIES, **parts} for name, parts in phases.items()}


def peak(phases: dict[str, Parts]) -> int:
    """Bytes of the largest phase."""
    return max(sum(parts.values()) for parts in phases.values())


def _layer(size: Dimensions) -> int:
    """Matrices of a source layer that are pages of the process's own."""
    return 0 if size.stored else 4 * (size.source + size.block)


def _batch(size: Dimensions, tokens: int) -> int:
    """Tokens that go through a layer together: so many, or one window."""
    return max(min(tokens, size.tokens), size.window)


def _forward(size: Dimensions, tokens: int) -> int:
    """Activations of one batch: states, queries, keys, values; then those of the block."""
    attention = 4 * (5 * size.hidden + 3 * size.query + 2 * size.width)
    block = 4 * 4 * size.hidden + (2 if size.stored else 4) * 3 * size.inner
    return _batch(size, tokens) * max(attention, block)


def _scores(size: Dimensions, copies: int) -> int:
    """Several blocks of scores, float32, of some queries of all heads."""
    return 4 * copies * max(SCORES, size.heads * size.window)


def _observing(size: Dimensions, attention: bool) -> Parts:
    states = (2 if size.stored else 4) * size.hidden * _batch(size, BATCH_TOKENS)
    parts = {
        "layer": _layer(size),
        "float64 weights": 8 * size.source,
        "batch": _forward(size, BATCH_TOKENS),
        "moments": 12 * ((size.width if attention else size.hidden) + 1) ** 2,
    }
    if attention:
        parts |= {
            "weights to multiply with": (2 if size.stored else 4) * size.shared,
            "attention of a window": _scores(size, 6),
            "heads of a batch": _heads(size),
            "metric of outputs": _metric(size),
            "held-out windows": 2 * 4 * size.hidden * size.held_out,
            "freed and kept": _kept(states) + _kept(4 * size.query * size.window),
        }
    return parts


def _heads(size: Dimensions) -> int:
    """Queries, keys and values of a batch, twice and half of them once more; then those of one
    window, turned, and repeated for every head."""
    batch = _batch(size, BATCH_TOKENS)
    return 4 * batch * (2 * size.query + 7 * size.width // 2) + 4 * 5 * size.query * size.window


def _metric(size: Dimensions) -> int:
    """Of a layer's outputs, and what the heads feel of it."""
    return 8 * size.hidden**2 + 4 * size.hidden * size.query


def _turned(size: Dimensions, tokens: int) -> int:
    """Queries or keys of all heads with and without rotation, float32, at the widest."""
    return 4 * size.heads * (size.head + size.widest) * tokens


def _tried(size: Dimensions) -> int:
    """The same of the heads that a candidate is tried with at once."""
    whole = _turned(size, size.window)
    return min(whole, max(4 * TRIAL_BLOCK, whole // size.groups))


def _kept(block: int) -> int:
    """Holes that the C library keeps of freed blocks: measured with and without it, four to eight
    of the largest. From a threshold on blocks are pages of their own, which leave none."""
    return 6 * block if block < HEAP_BLOCK else 0


def _choosing(size: Dimensions) -> Parts:
    heads = 4 * (size.query + size.width + size.hidden) * size.held_out
    value_metric = 4 * 3 * size.query**2 // size.groups + 8 * size.query * size.hidden
    axes = 8 * (2 * size.width * size.hidden + 7 * size.width**2)
    block = _tried(size)
    asked = min(TRIAL_QUERIES, size.held_out, size.window)
    attending = 5 * block + 4 * size.query * asked
    missed = 4 * ((size.query + 3 * size.hidden) * asked + size.hidden**2)
    trial = 4 * size.source + heads + max(attending, missed)
    return {
        "float64 weights": 8 * size.source,
        "moments": 8 * (size.width + 1) ** 2,
        "metric of outputs": _metric(size),
        "held-out windows": 2 * 4 * size.hidden * size.held_out,
        "trial, metric of values or axes": max(trial, value_metric, axes),
        "freed and kept": _kept(block),
    }


def _sensing(size: Dimensions) -> Parts:
    tokens = _batch(size, SENSITIVITY_BATCH)
    saved = 4 * (10 * size.hidden + 4 * size.query + 2 * size.width) + 6 * 2 * size.inner
    return {
        "layer": _layer(size),
        "saved for the way down": tokens * saved,
        "matrix": (8 + 4 + 4) * size.hidden**2,
        "slice of the vocabulary": _logits(size, tokens, 8 * 4),
    }


def _logits(size: Dimensions, tokens: int, each: int) -> int:
    """A slice of the vocabulary: its rows in float32, and bytes of each logit of some tokens."""
    rows = min(max(1, LOGITS // tokens), size.vocabulary)
    return rows * (each * tokens + 4 * size.hidden)


def _judging(size: Dimensions) -> Parts:
    """The predictions of a held-out window: those of source and result, then float64 numbers."""
    return {
        "states": 6 * 4 * size.hidden * size.window,
        "slice of the vocabulary": _logits(size, size.window, 6 * 4 + 5 * 8),
    }


def _writing(size: Dimensions) -> Parts:
    cut = 8 * (2 * size.width * size.hidden + 6 * size.width**2) if size.tokens else 0
    axes = 8 * size.width * (size.hidden + size.width) if size.tokens else 0
    return {
        "float64 weights": 8 * size.source,
        "axes to be cut, or cut and the converted layer": max(cut, axes + 2 * 8 * size.target),
    }


def _refining(size: Dimensions) -> Parts:
    tokens = max(min(STEP_TOKENS, size.tokens - size.held_out), size.window)
    return {
        "layer": _layer(size),
        "float64 layer": 8 * (size.target - size.query * size.hidden),
        "converted layer and its best state": 2 * 4 * size.target,
        "gradients and Adam": 3 * 4 * size.target,
        "saved for the way down": 4 * 8 * size.hidden * tokens + 8 * _turned(size, tokens),
        "freed and kept": _kept(_turned(size, size.window)),
        "metric of outputs": 3 * 4 * size.hidden**2,
    }
