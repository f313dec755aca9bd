"""A sweep: for every shape, check each contender against float64, then time the right ones."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from mlakit.benching.clock import Ceilings, Clock, DeviceLost, KernelTiming, Timing, matmul
from mlakit.benching.contenders import RIVALS, Absent, Contender, Run, ours
from mlakit.benching.problem import Problem, Shape, make_problem
from mlakit.benching.result import Missing, ShapeResult, make_points
from mlakit.benching.truth import judge, sample_truth, tolerance_of

Progress = Callable[[str, int, int], None]


LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
LENGTHS_ON_CPU = (1024, 2048, 4096)
HEADS = (16, 32, 64, 128)


def standard_sweeps(on_cuda: bool, quick: bool) -> list[tuple[int, int, int, bool]]:
    """(heads, length, queries, varlen) of FlashMLA's two sweeps, the most telling first.

    One is over head counts, the other at 128 heads over lengths, with 1 and 2 queries, fixed and
    ragged. On the CPU lengths end earlier; quick ones are the ends of each axis, without ragged.
    """
    middle = 4096 if on_cuda else 2048
    lengths = LENGTHS if on_cuda else LENGTHS_ON_CPU
    if quick:
        return [(16, 256, 1, False), (128, 256, 1, False)]
    heads = [(count, middle, 1, False) for count in HEADS]
    if on_cuda:
        heads += [(count, 2 * middle, 1, False) for count in HEADS]
    over = [
        (128, length, queries, varlen)
        for queries in (1, 2)
        for varlen in (False, True)
        for length in lengths
    ]
    return list(dict.fromkeys(heads + over))


def default_batch(on_cuda: bool, quick: bool) -> int:
    """Sequences: 128 as FlashMLA has them, few on the CPU."""
    return (8 if quick else 128) if on_cuda else (2 if quick else 4)


def default_rounds(on_cuda: bool, quick: bool) -> int:
    """Timed runs per contender and shape."""
    return 2 if quick else 20 if on_cuda else 5


def run_sweep(
    shapes: Sequence[Shape],
    kernels: Sequence[str],
    clock: Clock,
    ceilings: Ceilings,
    rounds: int,
    *,
    rivals: Mapping[str, Contender] | None = None,
    seconds: float | None = None,
) -> Iterator[ShapeResult]:
    """Measures shape after shape.

    Args:
        shapes: what to measure, in order.
        kernels: our implementations by name.
        clock: of the device.
        ceilings: of the same machine.
        rounds: timed runs of each contender.
        rivals: other people's, by name; all that there are by default.
        seconds: shapes that would start later than this are left out.

    Raises:
        DeviceLost: nothing more can be measured in this process.
    """
    contenders = {name: ours(name) for name in kernels}
    contenders |= RIVALS if rivals is None else rivals
    start = time.perf_counter()
    for shape in shapes:
        if seconds is not None and time.perf_counter() - start > seconds:
            reason = f"the time given, {seconds:.0f} s, was used up"
            yield ShapeResult(shape, (), tuple(Missing(n, reason, False) for n in contenders))
            continue
        yield _measure(shape, contenders, kernels, clock, ceilings, rounds)


@torch.inference_mode()
def _measure(
    shape: Shape,
    contenders: Mapping[str, Contender],
    kernels: Sequence[str],
    clock: Clock,
    ceilings: Ceilings,
    rounds: int,
) -> ShapeResult:
    missing: list[Missing] = []
    runs: dict[str, Run] = {}
    errors: dict[str, float] = {}
    try:
        problem = make_problem(shape, clock.device)
        sample = sample_truth(problem)
    except torch.OutOfMemoryError:
        _free(clock.device)
        reason = f"the shape's {shape.nbytes / 2**30:.1f} GiB do not fit on the device"
        return ShapeResult(shape, (), tuple(Missing(n, reason, False) for n in contenders))
    for name, contender in contenders.items():
        found = _prepare(problem, contender, sample)
        if isinstance(found, Missing) and found.failed and not clock.alive():
            raise DeviceLost(name, f"{found.reason} at {shape.label}")
        if isinstance(found, tuple):
            runs[name], errors[name] = found
        else:
            missing.append(replace(found, contender=name))
    timings, matmul_tflops = _in_turn(clock, runs, rounds, ceilings)
    device: dict[str, KernelTiming | None] = {
        name: clock.kernels(name, run, max(2, rounds // 2)) for name, run in runs.items()
    }
    points = make_points(shape, timings, device, errors, kernels, ceilings, matmul_tflops)
    del problem, sample, runs
    _free(clock.device)
    return ShapeResult(shape, points, tuple(missing), matmul_tflops)


def _in_turn(
    clock: Clock, runs: Mapping[str, Run], rounds: int, ceilings: Ceilings
) -> tuple[dict[str, Timing], float | None]:
    """Whole calls; on the CPU with a matrix product among them, and its TFLOPS."""
    if clock.device.type == "cuda":
        return clock.in_turn(runs, rounds), None
    size = ceilings.matmul_size
    product = matmul(clock.device, ceilings.matmul_dtype, size)
    timings = clock.in_turn({**runs, "matmul": product}, rounds)
    return timings, 2 * size**3 / timings.pop("matmul").median / 1e12


def _prepare(
    problem: Problem, contender: Contender, sample: tuple[list[int], torch.Tensor, torch.Tensor]
) -> tuple[Run, float] | Missing:
    """A contender that is right, and its largest error; or why it does not take part."""
    chosen, true_out, true_lse = sample
    try:
        run = contender(problem)
        out, lse = run()
        judgement = judge(
            out[chosen],
            true_out,
            None if lse is None else lse[chosen],
            true_lse,
            tolerance_of(problem.q.dtype),
        )
    except Absent as absence:
        return Missing("", str(absence), False)
    except torch.OutOfMemoryError:
        _free(problem.q.device)
        return Missing("", "it does not fit in the device's memory beside the cache", False)
    except Exception as error:  # others' kernels break in their own ways; the sweep goes on
        line = str(error).strip().splitlines()
        return Missing("", f"{type(error).__name__}: {line[0] if line else ''}", True)
    if judgement.wrong:
        return Missing("", f"wrong, so not timed: {judgement.wrong}", True)
    return run, judgement.largest_error


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
