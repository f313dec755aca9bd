"""Uncertainty of scores over problems: every share that is printed has its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

from mlakit.evaluation.quality import bootstrap
from mlakit.reporting.schema import Estimate

Z = 1.959964
"""97.5 % quantile of the normal distribution."""


def wilson(share: float, trials: int) -> Estimate:
    """A share with Wilson's score interval (E. B. Wilson 1927, JASA 22:209).

    It lies between 0 and 1 and has a width even where all or none were hit.
    """
    scale = 1 + Z**2 / trials
    middle = (share + Z**2 / (2 * trials)) / scale
    half = Z * math.sqrt(share * (1 - share) / trials + Z**2 / (4 * trials**2)) / scale
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Estimate(value=share, low=min(share, low), high=max(share, high))


def mean_score(marks: Sequence[float], *, seed: int) -> Estimate:
    """Mean of the problems' marks, each between 0 and 1, with its interval.

    Wilson's for rights and wrongs. Other marks vary less, so the bootstrap over problems is
    narrower; where all are equal it would have no width, and Wilson's is kept.
    """
    if _rights(marks) or len(set(marks)) == 1:
        return wilson(math.fsum(marks) / len(marks), len(marks))
    return bootstrap(marks, seed=seed)


def mean_gain(source: Sequence[float], result: Sequence[float], *, seed: int) -> Estimate:
    """Result minus source on the same problems: mean of the pairs' differences.

    For rights and wrongs the adjusted Wald interval of Bonett and Price (2012, Journal of
    Educational and Behavioral Statistics 37:479), which has a width even where no pair differs;
    for marks between them the bootstrap over problems, unless all differ by the same.
    """
    gains = [b - a for a, b in zip(source, result, strict=True)]
    if not _rights([*source, *result]) and len(set(gains)) > 1:
        return bootstrap(gains, seed=seed)
    trials = len(gains)
    won = (math.fsum(max(gain, 0.0) for gain in gains) + 1) / (trials + 2)
    lost = (math.fsum(max(-gain, 0.0) for gain in gains) + 1) / (trials + 2)
    half = Z * math.sqrt((won + lost - (won - lost) ** 2) / (trials + 2))
    low, high = max(-1.0, won - lost - half), min(1.0, won - lost + half)
    value = math.fsum(gains) / trials
    return Estimate(value=value, low=min(value, low), high=max(value, high))


class Comparison(TypedDict):
    """The part of a score that comes from marks; keys as in `TaskScore`."""

    source: Estimate
    result: Estimate | None
    difference: Estimate | None
    p_value: float | None


def compare(
    source: Sequence[float], result: Sequence[float] | None = None, *, seed: int
) -> Comparison:
    """Means of one model's marks or two, and how they differ on the same problems."""
    if result is None:
        alone = mean_score(source, seed=seed)
        return Comparison(source=alone, result=None, difference=None, p_value=None)
    return Comparison(
        source=mean_score(source, seed=seed),
        result=mean_score(result, seed=seed),
        difference=mean_gain(source, result, seed=seed),
        p_value=mcnemar(source, result),
    )


def mcnemar(source: Sequence[float], result: Sequence[float]) -> float | None:
    """Two-sided p value of McNemar's exact test on paired rights and wrongs; None for other marks.

    The chance, were both models equally good, of pairs that differ as unevenly as these.
    """
    if not _rights([*source, *result]):
        return None
    gains = [b - a for a, b in zip(source, result, strict=True)]
    won, lost = gains.count(1.0), gains.count(-1.0)
    tail = sum(math.comb(won + lost, i) for i in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (won + lost))


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Chance that at least one of k samples passes, unbiased, from n samples of which c passed.

    Chen et al. 2021, arXiv 2107.03374, equation 1: 1 - C(n-c, k) / C(n, k).
    """
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def _rights(marks: Sequence[float]) -> bool:
    """Whether every mark is right or wrong, nothing between."""
    return set(marks) <= {0.0, 1.0}
