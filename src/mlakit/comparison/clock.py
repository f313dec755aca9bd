"""How fast a variant decodes and reads a prefix, in turn with the source, by one clock.

What is timed is this package's own code: most rows unpack their cache at every step, so it says
what they cost here, not what a kernel of their authors reaches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from transformers import Cache

from mlakit.baselines import Variant, read_prefix
from mlakit.comparison.exam import Context, Exam
from mlakit.evaluation.quality import feed
from mlakit.reporting.comparison import Pace

DECODED, REPEATS = 16, 3
"""Tokens decoded one by one, and timed runs after one that is not timed."""


def paces(exam: Exam, variants: Sequence[Variant]) -> list[Pace | None]:
    """Pace of each variant on the first window; None where its savings are by account."""
    return [None if v.by_account else pace(exam, v) for v in variants]


def pace(exam: Exam, variant: Variant) -> Pace:
    """Medians of runs of the variant and of the source, one after the other."""
    text, source = exam.texts[0], Variant(exam.source.model)
    runs: list[list[tuple[float, float]]] = [[], []]
    for _ in range(REPEATS + 1):
        for run, each in zip(runs, (variant, source), strict=True):
            run.append(_once(each, text))
    (first, decode), (own_first, own_decode) = (
        tuple(statistics.median(column) for column in zip(*run[1:], strict=True)) for run in runs
    )
    count = min(DECODED, len(text.after[0]))
    return Pace(
        tokens_per_second=count / decode,
        of_original=own_decode / decode,
        first_token_seconds=first,
        first_token_of_original=first / own_first,
    )


@torch.no_grad()
def _once(variant: Variant, text: Context) -> tuple[float, float]:
    """Seconds to read and compress a prefix, and to decode after it."""
    model, ids = variant.model, text.after[0][:DECODED].to(variant.model.device)
    read = len(text.ids)
    start = _now(model.device)
    prefix = read_prefix(
        model,
        text.ids,
        max_length=read + len(ids),
        queries=variant.needs_queries,
        new_cache=variant.new_cache,
    )
    cache: Cache = variant.compress(prefix)
    middle = _now(model.device)
    with variant.reading(cache):
        for place in range(len(ids)):
            feed(model, ids[place : place + 1], cache, seen=read + place)
    return middle - start, _now(model.device) - middle


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
