"""What every point is asked: continuations of cached windows, and questions about cached texts.

A prefix is read exactly, compressed, and only what is fed through the compressed cache counts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from mlakit.baselines import Variant, read_prefix
from mlakit.data import other_question
from mlakit.evaluation import Subject
from mlakit.evaluation.memory import whole_pages
from mlakit.evaluation.quality import Windows, feed, require_finite, score_rows
from mlakit.evaluation.recall import make_probe, recall_plan, tokenise
from mlakit.nn.hf import cache_nbytes
from mlakit.reporting.schema import Recall, RecallCell, RecallKind

PASSKEY_TRIALS = 2
"""Texts with a pass key at each length and depth; a text of codes is asked two questions."""


@dataclass(frozen=True)
class Context:
    """A text to cache and what is fed after it, each time on a cache of its own.

    Attributes:
        ids: the text, ``[P]``.
        after: continuations, ``[S]`` each.
    """

    ids: Tensor
    after: tuple[Tensor, ...]


@dataclass(frozen=True)
class Question:
    """Continuations of one text that count when their last tokens are answered, token by token."""

    kind: RecallKind
    length: int
    depth: float
    context: Context
    answers: tuple[Tensor, ...]

    def hits(self, logits: Sequence[Tensor]) -> int:
        """How many answers the most likely tokens spell."""
        pairs = zip(logits, self.answers, strict=True)
        return sum(bool((x[-len(a) :].argmax(-1).cpu() == a).all()) for x, a in pairs)


@dataclass(frozen=True)
class Scores:
    """What a variant reached.

    Attributes:
        nbytes: of the compressed cache; ``peak``: of the cache that the model filled.
        rows: per window NLL of the source, NLL, KL and equal top token, float64 ``[S]`` each.
        hits: right answers of each question; ``hits_seen``: where the question was seen.
    """

    nbytes: int
    peak: int
    rows: list[list[np.ndarray]] = field(default_factory=list)
    hits: list[int] = field(default_factory=list)
    hits_seen: list[int] = field(default_factory=list)

    def column(self, index: int) -> np.ndarray:
        """One of the scores, ``[W, S]``."""
        return np.stack([row[index] for row in self.rows])


class Exam:
    """The questions, cut once, and the source's own answers.

    Args:
        source: the model that every variant is held against.
        windows: texts to continue.
        seed: of the questions.
        recall: whether there are any.
    """

    def __init__(self, source: Subject, windows: Windows, *, seed: int, recall: bool) -> None:
        self.source, self.windows, self.seed = source, windows, seed
        self._places: list[tuple[RecallKind, int, float, int]] = [
            (kind, length, depth, trial)
            for kind, length, depth in (recall_plan(source) if recall else ())
            for trial in range(PASSKEY_TRIALS if kind == "passkey" else 1)
        ]
        cut = windows.prefix_length
        self.texts = [Context(ids[:cut], (ids[cut:-1],)) for ids in windows.ids]
        self.length = whole_pages(cut)

    @cached_property
    def all_questions(self) -> list[Question]:
        """The questions; none of them stands in the cached text."""
        return [self._question(*place, seen=False) for place in self._places]

    @cached_property
    def questions(self) -> list[Question]:
        """Those of a kind and length that the source can do: the rest says nothing of a cache."""
        columns = self.source_recall.columns() if self.source_recall else ()
        usable = {(column.kind, column.length) for column in columns if column.usable}
        return [q for q in self.all_questions if (q.kind, q.length) in usable]

    @cached_property
    def seen_questions(self) -> list[Question]:
        """The same with the question read before the cache is compressed."""
        able = {(q.kind, q.length) for q in self.questions}
        places = [place for place in self._places if place[:2] in able]
        return [self._question(*place, seen=True) for place in places]

    @cached_property
    def source_recall(self) -> Recall | None:
        """What the source itself answers, of all questions."""
        hits = self._ask(self.all_questions, [Variant(self.source.model)])[0]
        return tally(self.all_questions, hits, hits)

    def _question(
        self, kind: RecallKind, length: int, depth: float, trial: int, *, seen: bool
    ) -> Question:
        probe = make_probe(kind, length, depth, self.source, self.seed + trial)
        second = [] if kind == "passkey" or seen else [other_question(probe)]
        asked = [tokenise(self.source, each) for each in (probe, *second)]
        cut = min(each.text_length for each in asked)
        if seen:
            cut = len(asked[0].ids) - asked[0].answer_length - 1
        after = tuple(each.ids[cut:-1] for each in asked)
        answers = tuple(each.ids[-each.answer_length :] for each in asked)
        return Question(kind, length, depth, Context(asked[0].ids[:cut], after), answers)

    @cached_property
    def source_scores(self) -> Scores:
        """The source's own; its logits on the windows are kept for all others."""
        return self.score([Variant(self.source.model, needs_queries=True)])[0]

    @cached_property
    def source_logits(self) -> list[Tensor]:
        """Logits ``[S, vocabulary]`` of every window."""
        found = [self._logits(t, [Variant(self.source.model)]) for t in self.texts]
        logits = [next(each)[0] for each in found]
        for each in logits:
            require_finite(self.source, each)
        return logits

    def score(
        self, variants: Sequence[Variant], tell: Callable[[int, int], None] | None = None
    ) -> list[Scores]:
        """Scores of variants, each prefix read once for all that share a model.

        Args:
            variants: what to score.
            tell: told (contexts done, contexts in all).
        """
        looking = [v for v in variants if v.needs_queries]
        total = len(self.texts) + len(self.questions) + len(self.seen_questions) * bool(looking)
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            if tell:
                tell(done, total)

        scores = [Scores(*size) for size in self._sizes(variants)]
        cut = self.windows.prefix_length
        for text, ids, source in zip(self.texts, self.windows.ids, self.source_logits, strict=True):
            targets = ids[cut + 1 :].to(source.device)
            for score, logits in zip(scores, self._logits(text, variants), strict=True):
                score.rows.append(score_rows(source, logits[0], targets))
            step()
        for score, hits in zip(scores, self._ask(self.questions, variants, step), strict=True):
            score.hits.extend(hits)
        chosen = [score for score, v in zip(scores, variants, strict=True) if v.needs_queries]
        asked = self._ask(self.seen_questions, looking, step) if looking else []
        for score, hits in zip(chosen, asked, strict=True):
            score.hits_seen.extend(hits)
        return scores

    def _ask(
        self,
        questions: Sequence[Question],
        variants: Sequence[Variant],
        step: Callable[[], None] = lambda: None,
    ) -> list[list[int]]:
        """Right answers of each variant to each question."""
        hits: list[list[int]] = [[] for _ in variants]
        for question in questions:
            for own, logits in zip(hits, self._logits(question.context, variants), strict=True):
                own.append(question.hits(logits))
            step()
        return hits

    def _sizes(self, variants: Sequence[Variant]) -> list[tuple[int, int]]:
        """Bytes of the compressed cache and of the one that the model filled."""
        ids = self.windows.ids[0][: self.length]
        caches = self._caches(ids, self.length, variants)
        return [(cache_nbytes(cache), cache_nbytes(filled)) for cache, filled in caches]

    def _logits(self, context: Context, variants: Sequence[Variant]) -> Iterator[list[Tensor]]:
        """Each variant's logits of each continuation."""
        read = len(context.ids)
        longest = read + max(len(ids) for ids in context.after)
        caches = self._caches(context.ids, longest, variants)
        for variant, (cache, _) in zip(variants, caches, strict=True):
            logits = []
            for index, ids in enumerate(context.after):
                own = cache if index == len(context.after) - 1 else copy.deepcopy(cache)
                with torch.no_grad(), variant.reading(own):
                    logits.append(feed(variant.model, ids.to(variant.model.device), own, seen=read))
            yield logits

    @torch.no_grad()
    def _caches(
        self, ids: Tensor, longest: int, variants: Sequence[Variant]
    ) -> Iterator[tuple[Cache, Cache]]:
        """Each variant's compressed cache and the exact one; a model reads the prefix once."""
        prefix = None
        for variant in variants:
            if prefix is None or prefix.model is not variant.model:
                prefix = read_prefix(
                    variant.model,
                    ids,
                    max_length=longest,
                    queries=any(v.needs_queries for v in variants),
                    new_cache=variant.new_cache,
                )
            yield variant.compress(prefix), prefix.cache


def tally(
    questions: Sequence[Question], hits: Sequence[int], source_hits: Sequence[int]
) -> Recall | None:
    """Sums hits over the trials of each kind, length and depth; None without questions."""
    cells: dict[tuple[RecallKind, int, float], list[int]] = {}
    for question, own, source in zip(questions, hits, source_hits, strict=True):
        cell = cells.setdefault((question.kind, question.length, question.depth), [0, 0, 0])
        for place, value in enumerate((len(question.answers), source, own)):
            cell[place] += value
    if not cells:
        return None
    return Recall(
        cells=[
            RecallCell(
                kind=kind, length=length, depth=depth, trials=n, source_hits=a, result_hits=b
            )
            for (kind, length, depth), (n, a, b) in cells.items()
        ]
    )
