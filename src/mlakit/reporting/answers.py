"""The two questions a comparison answers: the smallest good cache, the best at a budget."""

from __future__ import annotations

import numpy as np

from mlakit.reporting.comparison import Answer, Comparison, Point
from mlakit.reporting.style import number, percent

CLOSE = 0.01
"""What "within 1 % of the original" allows perplexity to move and recall to fall."""

SLACK = 1.02
"""Bytes over a budget, or over another point's, that do not count."""

RESAMPLES = 2000


def mean_recall(point: Point) -> float | None:
    """Share of questions answered, of those the source can do; None without any."""
    columns = [c.result or 0.0 for c in point.recall.columns()] if point.recall else []
    return sum(columns) / len(columns) if columns else None


def tied(one: Point, other: Point, seed: int) -> bool:
    """Whether the paired 95 % interval of the KL difference over windows holds zero."""
    difference = np.asarray(one.kl) - np.asarray(other.kl)
    if len(difference) < 2:
        return bool(difference.mean() == 0)
    picks = np.random.default_rng(seed).integers(len(difference), size=(RESAMPLES, len(difference)))
    low, high = np.quantile(difference[picks].mean(axis=1), [0.025, 0.975])
    return bool(low <= 0 <= high)


def rivals(found: Comparison) -> list[Point]:
    """The original and all points that are about the cache's bytes."""
    other = {m.name for m in found.methods if m.family in ("reads", "weights")}
    return [p for p in found.points if p.method not in other]


def within_one_percent(found: Comparison, point: Point) -> bool:
    """Perplexity within 1 % of the original's on either side, and recall at most 1 % lower.

    A better perplexity than the original's is a change too: a cache that forgets may gain it.
    """
    ratio = point.perplexity.value / found.original.perplexity.value
    own, source = mean_recall(point), mean_recall(found.original)
    kept = own is None or not source or own >= (1 - CLOSE) * source
    return abs(ratio - 1) <= CLOSE and kept


def smallest(found: Comparison) -> Answer:
    """The smallest cache within 1 % of the original, and those of the same size."""
    able = [p for p in rivals(found) if within_one_percent(found, p)]
    best = min(able, key=lambda p: (p.bytes_per_token, p.kl_mean.value))
    ties = [p for p in able if p is not best and p.bytes_per_token <= SLACK * best.bytes_per_token]
    untrained = None
    if best.trained:
        free = [p for p in able if not p.trained]
        untrained = min(free, key=lambda p: (p.bytes_per_token, p.kl_mean.value))
    return _answer(found, "Smallest cache within 1 % of the original", best, ties, untrained)


def best_at(found: Comparison, budget: float) -> Answer | None:
    """The lowest KL among caches of at most a share of the source's; None where nothing fits."""
    able = [p for p in rivals(found) if p.percent_of_own <= 100 * budget * SLACK]
    if not able:
        return None
    best = min(able, key=lambda p: p.kl_mean.value)
    ties = [p for p in able if p is not best and tied(p, best, found.seed)]
    untrained = None
    if best.trained and not any(not p.trained for p in ties):
        free = [p for p in able if not p.trained]
        untrained = min(free, key=lambda p: p.kl_mean.value) if free else None
    title = f"Best quality at {percent(100 * budget)} of your own cache"
    answer = _answer(found, title, best, ties, untrained)
    finder = max(able, key=lambda p: mean_recall(p) or 0.0)
    if (mean_recall(finder) or 0.0) <= (mean_recall(best) or 0.0) + CLOSE:
        return answer
    more = f". It forgets: most questions are answered by {found.title(finder)}"
    return answer.model_copy(update={"text": f"{answer.text}{more}: {in_words(found, finder)}"})


def answers(found: Comparison) -> list[Answer]:
    """The smallest good cache, then the best at each budget."""
    at = [best_at(found, budget) for budget in found.budgets if budget < 1]
    return [smallest(found), *(answer for answer in at if answer is not None)]


def _answer(
    found: Comparison, question: str, best: Point, ties: list[Point], untrained: Point | None
) -> Answer:
    words = [f"{found.title(best)}: {in_words(found, best)}"]
    if ties:
        words.append(f"A tie with {', '.join(found.title(p) for p in ties)}")
    if untrained is not None:
        words.append(f"Without any training {found.title(untrained)}: {in_words(found, untrained)}")
    return Answer(
        question=question,
        best=best.key,
        ties=[p.key for p in ties],
        untrained=None if untrained is None else untrained.key,
        text=". ".join(words),
    )


def in_words(found: Comparison, point: Point) -> str:
    """Bytes and quality of a point; quality is never said without bytes."""
    words = [
        f"{percent(point.percent_of_own)} of your own cache",
        f"KL {number(point.kl_mean.value)} nats",
        f"perplexity {number(point.perplexity.value)} "
        f"(the original's is {number(found.original.perplexity.value)})",
    ]
    recall, source = mean_recall(point), mean_recall(found.original)
    if recall is not None and source is not None:
        words.append(f"recall {percent(100 * recall)} (the original's is {percent(100 * source)})")
    if point.trained:
        words.append(f"gradients on {point.trained_tokens:,} tokens")
    return ", ".join(words)
