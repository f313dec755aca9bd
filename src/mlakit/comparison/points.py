"""From scores to a point: means, intervals and shares of the source's cache."""

from __future__ import annotations

import numpy as np

from mlakit.account import as_mha, cache_bytes_per_token
from mlakit.baselines import Variant
from mlakit.comparison.exam import Exam, Scores, tally
from mlakit.evaluation.quality import bootstrap
from mlakit.nn.hf import attention_specs
from mlakit.reporting.comparison import Missing, Pace, Point


def make_point(
    exam: Exam,
    method: str,
    setting: str,
    variant: Variant,
    scores: Scores,
    pace: Pace | None = None,
) -> Point | Missing:
    """The point of one setting; none where its numbers are not finite."""
    source_nll, nll, kl, top1 = (scores.column(index) for index in range(4))
    if not np.isfinite(kl).all():
        return Missing(method=method, setting=setting, reason="its logits are NaN or infinite")
    own = exam.source_scores
    model = exam.source.model
    mha = [as_mha(spec) for spec in attention_specs(model)]
    mha_bytes = cache_bytes_per_token(mha, model.dtype.itemsize) * exam.length
    weights = variant.weight_bytes
    if weights is None:
        weights = sum(p.nbytes for p in variant.model.parameters())
    mean = bootstrap(nll.mean(axis=1), seed=exam.seed)
    seen = scores.hits_seen and tally(exam.seen_questions, scores.hits_seen, own.hits_seen)
    return Point(
        method=method,
        setting=setting,
        bytes_per_token=scores.nbytes / exam.length,
        peak_bytes_per_token=scores.peak / exam.length,
        percent_of_own=100 * scores.nbytes / own.nbytes,
        percent_of_mha=100 * scores.nbytes / mha_bytes,
        read_percent=100 * variant.read_share * scores.nbytes / own.nbytes,
        weight_percent=100 * weights / sum(p.nbytes for p in model.parameters()),
        simulated=variant.weight_bytes is not None,
        calibration_tokens=variant.calibration_tokens,
        trained_tokens=variant.trained_tokens,
        kl=[float(value) for value in kl.mean(axis=1)],
        nll=[float(value) for value in nll.mean(axis=1)],
        kl_mean=bootstrap(kl.mean(axis=1), seed=exam.seed),
        kl_p999=float(np.quantile(kl, 0.999)),
        top1=bootstrap(top1.mean(axis=1), seed=exam.seed),
        perplexity=mean.mapped(lambda x: float(np.exp(x))),
        nll_difference=bootstrap((nll - source_nll).mean(axis=1), seed=exam.seed),
        recall=tally(exam.questions, scores.hits, own.hits),
        recall_seen=seen or None,
        pace=pace,
    )
