"""How far the student is from the original, on held-out windows, through its cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mlakit.evaluation.quality import Windows, bootstrap, score_windows
from mlakit.evaluation.subject import Subject
from mlakit.reporting.schema import Estimate


@dataclass(frozen=True)
class Quality:
    """What held-out windows give; means over windows.

    Attributes:
        nll: of the student, nats per token.
        perplexity: exp of it.
        kl: KL(original || student), nats per token.
        top1: share of tokens whose most likely next token is the original's.
        original_nll: of the original on the same tokens.
        intervals: 95 % bootstrap intervals over windows, by the names above.
    """

    nll: float
    perplexity: float
    kl: float
    top1: float
    original_nll: float
    intervals: dict[str, list[float] | None]

    @property
    def original_perplexity(self) -> float:
        """exp of ``original_nll``."""
        return math.exp(self.original_nll)


def measure(original: Subject, student: Subject, windows: Windows) -> Quality:
    """Scores both models after a cached prefix (``evaluation.quality``).

    Raises:
        MlakitError: a model computes NaN.
    """
    scores = score_windows(original, student, windows)
    assert scores.result_nll is not None and scores.kl is not None
    assert scores.same_top1 is not None
    found = {
        "nll": _mean(scores.result_nll),
        "kl": _mean(scores.kl),
        "top1": _mean(scores.same_top1),
        "original_nll": _mean(scores.source_nll),
    }
    found["perplexity"] = found["nll"].mapped(math.exp)
    return Quality(
        **{name: estimate.value for name, estimate in found.items()},
        intervals={
            name: None if e.low is None or e.high is None else [e.low, e.high]
            for name, e in found.items()
        },
    )


def _mean(scores: np.ndarray) -> Estimate:
    return bootstrap(scores.mean(axis=1), seed=0)
