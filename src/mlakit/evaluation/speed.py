"""Prefill seconds and decoded tokens per second, source and result taken in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from mlakit.errors import UsageError
from mlakit.evaluation.energy import EnergyMeter
from mlakit.evaluation.quality import Progress, feed
from mlakit.evaluation.subject import Subject
from mlakit.nn.hf import cache_nbytes, new_cache
from mlakit.reporting.schema import Speed, SpeedPoint

COPY_BYTES = 256 * 2**20
"""Size of the copy that measures bandwidth: far larger than any cache of a processor."""


def speed_lengths(context: int, decoded_tokens: int) -> tuple[int, ...]:
    """An eighth, a half and all of the context, at most 8192, less the tokens to decode."""
    longest = min(context, 8192) - decoded_tokens
    return longest // 8, longest // 2, longest


def measure_speed(
    source: Subject,
    result: Subject | None = None,
    *,
    lengths: Sequence[int] | None = None,
    decoded_tokens: int = 16,
    repeats: int = 3,
    seed: int = 0,
    progress: Progress | None = None,
) -> Speed:
    """Times both models on the same random prompts, batch 1; medians over repeats.

    Args:
        source: first model.
        result: second model, timed in turn with the first.
        lengths: prompt lengths in tokens.
        decoded_tokens: tokens decoded one by one after each prompt.
        repeats: timed runs per length and model, after one that is not timed.
        seed: seed of the prompts.
        progress: told about every length.
    """
    chosen = lengths or speed_lengths(source.context, decoded_tokens)
    if min(chosen) < 1 or max(chosen) + decoded_tokens > source.context:
        raise UsageError(
            f"lengths {list(chosen)} plus {decoded_tokens} decoded tokens must lie within the "
            f"context of {source.context} tokens"
        )
    subjects = [s for s in (source, result) if s is not None]
    meter = EnergyMeter(source.model.device)
    points: list[list[SpeedPoint]] = [[] for _ in subjects]
    generator = torch.Generator().manual_seed(seed)
    for index, length in enumerate(chosen):
        shape = (length + decoded_tokens,)
        ids = torch.randint(source.model.config.vocab_size, shape, generator=generator)
        runs: list[list[Timing]] = [[] for _ in subjects]
        for repeat in range(repeats + 1):
            for subject, run in zip(subjects, runs, strict=True):
                timing = _time_once(subject, ids, length, meter)
                if repeat:
                    run.append(timing)
        for subject, run, line in zip(subjects, runs, points, strict=True):
            line.append(_point(subject, length, decoded_tokens, run))
        if progress:
            progress("speed", index + 1, len(chosen))
    return Speed(
        decoded_tokens=decoded_tokens,
        repeats=repeats,
        copy_bandwidth=copy_bandwidth(source.model.device),
        source=points[0],
        result=points[1] if result is not None else None,
    )


class Timing(NamedTuple):
    """One prompt, read and continued."""

    prefill_seconds: float
    decode_seconds: float
    cache_bytes: int
    decode_joules: float | None


@torch.inference_mode()
def _time_once(subject: Subject, ids: torch.Tensor, length: int, meter: EnergyMeter) -> Timing:
    model = subject.model
    ids = ids.to(model.device)
    cache = new_cache(model, 1, len(ids))
    start = _now(model.device)
    feed(model, ids[:length], cache, seen=0, last_only=True)
    middle, joules = _now(model.device), meter.read()
    for position in range(length, len(ids)):
        feed(model, ids[position : position + 1], cache, seen=position)
    end = _now(model.device)
    return Timing(middle - start, end - middle, cache_nbytes(cache), meter.since(joules))


def _point(subject: Subject, length: int, decoded: int, run: list[Timing]) -> SpeedPoint:
    weights = sum(p.nbytes for p in subject.model.parameters())
    joules = [timing.decode_joules for timing in run if timing.decode_joules is not None]
    return SpeedPoint(
        length=length,
        prefill_seconds=statistics.median(timing.prefill_seconds for timing in run),
        decode_tokens_per_second=decoded / statistics.median(t.decode_seconds for t in run),
        bytes_moved=weights + run[0].cache_bytes,
        decode_joules_per_token=statistics.mean(joules) / decoded if joules else None,
    )


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written, of the best of five copies of 256 MiB."""
    block = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(block)
    best = 0.0
    for _ in range(5):
        start = _now(device)
        target.copy_(block)
        best = max(best, 2 * COPY_BYTES / (_now(device) - start))
    return best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
