"""What a run learns from and is measured on: windows of tokens, in an order that never varies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mlakit.data import Lessons, Source, SourceLike, named_sources, read_lessons, source_windows
from mlakit.errors import MlakitError, UsageError
from mlakit.evaluation.quality import Windows, describe_texts, open_texts, window_lengths
from mlakit.healing.recipe import Recipe

LONGEST_WINDOW = 2048
HELD_BACK = 0.05
"""Share of the training windows that is held back to measure on, at most."""


@dataclass(frozen=True)
class Part:
    """One text of the training data.

    Attributes:
        name: of the text.
        place: where it is, as reports print it.
        sha256: of its content.
        windows: that are trained on in one epoch.
        tokens: in them that count.
        dropped: tokens that filled no window.
        empty: rows that held nothing.
        cut: what was read of a dataset that is too long; nothing where all was.
    """

    name: str
    place: str
    sha256: str
    windows: int
    tokens: int
    dropped: int
    empty: tuple[str, ...]
    cut: str

    @property
    def notes(self) -> tuple[str, ...]:
        """What was not read."""
        found = []
        if self.empty:
            found.append(
                f"{len(self.empty)} empty rows were passed over, the first is {self.empty[0]}"
            )
        if self.cut:
            found.append(f"only the beginning of a dataset was read, {self.cut}")
        return tuple(found)


@dataclass(frozen=True)
class Material:
    """Windows ready for training.

    Attributes:
        lessons: one epoch, windows of ``length + 1`` tokens: inputs and, one further, targets.
        held_out: windows to measure on.
        parts: where the lessons come from.
    """

    lessons: Lessons
    held_out: Windows
    parts: tuple[Part, ...]

    @property
    def length(self) -> int:
        """Tokens per window that the model reads."""
        return self.lessons.ids.shape[1] - 1

    def order(self, steps: int, batch: int, seed: int) -> np.ndarray:
        """The window of every place in every step's batch, ``[steps * batch]``.

        Each epoch is a permutation of its own; the last one is cut off.
        """
        count, wanted = len(self.lessons), steps * batch
        epochs = [
            np.random.default_rng((seed, epoch)).permutation(count)
            for epoch in range(-(-wanted // count))
        ]
        return np.concatenate(epochs)[:wanted]


def window_length(recipe: Recipe, context: int) -> int:
    """Tokens per window.

    Raises:
        UsageError: more than the models read.
    """
    length = recipe.sequence_length or min(context, LONGEST_WINDOW)
    if length > context:
        raise UsageError(
            f"--sequence-length {length:,} is longer than the context of {context:,} tokens",
            remedy=f"use at most {context:,}",
        )
    if length < 8:
        raise UsageError(f"--sequence-length {length} leaves nothing to learn from")
    return length


def training_sources(recipe: Recipe) -> tuple[Source, ...]:
    """The texts to train on.

    Raises:
        UsageError: there are none, or two have one name.
    """
    if not recipe.data:
        raise UsageError("There is nothing to train on", remedy="name a text with --data")
    return named_sources(list(recipe.data))


def read_material(
    recipe: Recipe,
    sources: Sequence[Source],
    held_out: SourceLike | Sequence[SourceLike] | None,
    tokenizer: Any,
    context: int,
    vocabulary: int,
) -> Material:
    """Reads, cuts and checks all texts.

    Args:
        recipe: how long a window is, and what counts.
        sources: the texts to train on.
        held_out: texts to measure on; None holds the end of every training text back.
        tokenizer: of both models.
        context: the longest sequence both read.
        vocabulary: tokens that both know.

    Raises:
        UsageError, MlakitError: texts that cannot be read or are too short; says which and where.
    """
    length = window_length(recipe, context)
    lessons: list[Lessons] = []
    ends: list[tuple[Source, np.ndarray]] = []
    share = -(-recipe.held_out_windows // len(sources))
    for source in sources:
        read = read_lessons(source, tokenizer, length + 1, completion_only=recipe.completion_only)
        _check_vocabulary(read, vocabulary, source)
        if held_out is None:
            read, end = _held_back(read, share, source)
            ends.append((source, end))
        lessons.append(read)
    measured = _measured(recipe, held_out, ends, tokenizer, length)
    mixed = _mixed(lessons, recipe)
    parts = tuple(_part(source, one) for source, one in zip(sources, mixed, strict=True))
    joined = Lessons(
        np.concatenate([one.ids for one in mixed]),
        np.concatenate([one.counted for one in mixed]),
        sum(one.dropped for one in mixed),
    )
    return Material(joined, measured, parts)


def _measured(
    recipe: Recipe,
    held_out: SourceLike | Sequence[SourceLike] | None,
    ends: Sequence[tuple[Source, np.ndarray]],
    tokenizer: Any,
    length: int,
) -> Windows:
    """Windows as ``mlakit eval`` scores them: three quarters are a cached prefix."""
    prefix, suffix = window_lengths(length - 1, None, None)
    size, wanted = prefix + suffix + 1, recipe.held_out_windows
    if held_out is None:
        texts = tuple(source for source, _ in ends)
        named = ", ".join(source.label for source in texts)
        text = describe_texts(texts).model_copy(update={"name": f"the end of {named}, held back"})
        found = list(ends)
    else:
        texts = open_texts(held_out)
        text = describe_texts(texts)
        found = [(t, np.asarray(source_windows(t, tokenizer, size, wanted))) for t in texts]
    ids = np.concatenate([rows[:, :size] for _, rows in found]).astype(np.int64)
    names = tuple(source.name for source, rows in found for _ in rows)
    return Windows(torch.from_numpy(ids), prefix, suffix, text, names)


def _part(source: Source, lessons: Lessons) -> Part:
    return Part(
        name=source.name,
        place=source.label,
        sha256=source.content.sha256,
        windows=len(lessons),
        tokens=int(lessons.counted[:, 1:].sum()),
        dropped=lessons.dropped,
        empty=source.content.empty,
        cut=source.content.cut,
    )


def _check_vocabulary(lessons: Lessons, vocabulary: int, source: Source) -> None:
    largest = int(lessons.ids.max())
    if largest >= vocabulary:
        raise UsageError(
            f"{source.label} becomes token {largest}, and the models know {vocabulary} tokens:"
            " the tokenizer is not theirs",
            remedy="copy the tokenizer files of the original into the student's folder",
        )


def _held_back(lessons: Lessons, count: int, source: Source) -> tuple[Lessons, np.ndarray]:
    """All but the last windows, and those; a text's end, so that no passage is in both."""
    count = min(count, max(1, int(len(lessons) * HELD_BACK)))
    if len(lessons) <= count:
        raise MlakitError(
            f"{source.label} has {len(lessons)} windows: none can be held back to measure on",
            remedy="give more text, a shorter --sequence-length, or --held-out TEXT",
        )
    return lessons.part(slice(None, -count)), lessons.ids[-count:]


def _mixed(lessons: Sequence[Lessons], recipe: Recipe) -> list[Lessons]:
    """All windows, or as many of each text as the shares allow without repeating one."""
    if recipe.weights is None:
        return list(lessons)
    total = min(len(one) / weight for one, weight in zip(lessons, recipe.weights, strict=True))
    mixed = []
    for index, (one, weight) in enumerate(zip(lessons, recipe.weights, strict=True)):
        order = np.random.default_rng((recipe.seed, 1 + index)).permutation(len(one))
        mixed.append(one.part(np.sort(order[: max(1, int(total * weight))])))
    return mixed


def with_micro_batch(recipe: Recipe, length: int, processes: int) -> Recipe:
    """The recipe with its micro batch chosen and checked against batch and processes.

    Raises:
        UsageError: the batch cannot be divided like this.
    """
    share, rest = divmod(recipe.batch, processes)
    if rest:
        raise UsageError(
            f"a batch of {recipe.batch} windows cannot be shared by {processes} processes",
            remedy=f"use a --batch that {processes} divides",
        )
    micro = recipe.micro_batch
    if micro is None:
        micro = next(
            m for m in range(share, 0, -1) if share % m == 0 and (m == 1 or m * length <= 8192)
        )
    if share % micro:
        raise UsageError(
            f"--micro-batch {micro} does not divide the {share} windows of a process",
            remedy="leave it out, or use a divisor",
        )
    return replace(recipe, micro_batch=micro)
