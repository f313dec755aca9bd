"""Time: whole calls in turns, device time of single kernels, and what the machine can do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlakit.errors import MlakitError

FLUSH_FACTOR = 4
"""Times the size of the device's L2 cache that is written between two runs."""

PATIENCE = 3.0
"""Seconds after which a shape gets no further rounds."""

FEWEST_ROUNDS = 3


class DeviceLost(MlakitError):
    """A contender broke while it was timed, and nothing after it in this process would be true.

    Attributes:
        contender: which one.
    """

    def __init__(self, contender: str, why: str) -> None:
        super().__init__(
            f"{contender} broke the device: {why}",
            remedy="measure the others without it: name them with --kernel, or --no-rivals",
        )
        self.contender = contender


@dataclass(frozen=True)
class Timing:
    """Seconds of several runs.

    Attributes:
        median: of all runs.
        low: first quartile.
        high: third quartile.
        runs: how many.
    """

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """From the seconds of each run."""
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high, len(seconds))


@dataclass(frozen=True)
class KernelTiming:
    """Device time of one call's kernels.

    Attributes:
        together: every kernel of the call: planning, attention and combine.
        longest: only the kernel that takes longest, the attention itself; combine excluded, which
            is how FlashMLA's own tests count.
        name: that kernel's.
    """

    together: Timing
    longest: Timing
    name: str


class Clock:
    """Times functions on one device.

    On CUDA a buffer larger than the L2 cache is inverted before every run, so that no run finds
    its data there; the launches of a run overlap that work, as they overlap other work in a
    model. On the CPU it is the wall clock, and nothing is flushed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffer: Tensor | None = None
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            size = max(FLUSH_FACTOR * cache, 2**28)
            self._buffer = torch.zeros(size, dtype=torch.uint8, device=device)

    def flush(self) -> None:
        """Evicts what the last run left in the L2 cache; the kernel's name is used by no other."""
        if self._buffer is not None:
            torch.bitwise_not(self._buffer, out=self._buffer)

    def alive(self) -> bool:
        """Whether the device still answers; after some errors it never does in this process."""
        if self.device.type != "cuda":
            return True
        try:
            torch.cuda.synchronize(self.device)
            torch.zeros(1, device=self.device).item()
        except RuntimeError:
            return False
        return True

    def once(self, run: Callable[[], Any]) -> float:
        """Seconds of one run."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        self.flush()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def in_turn(self, runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Timing]:
        """Times each of several functions once per round, after a round to warm up.

        Taking turns spreads what else the machine does over all of them. After ``PATIENCE`` and
        ``FEWEST_ROUNDS`` there are no more rounds.

        Raises:
            DeviceLost: one of them failed.
        """
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        start = time.perf_counter()
        for turn in range(rounds + 1):
            if turn > FEWEST_ROUNDS and time.perf_counter() - start > PATIENCE:
                break
            for name, run in runs.items():
                try:
                    spent = self.once(run)
                except RuntimeError as error:
                    raise DeviceLost(name, str(error).partition("\n")[0]) from error
                if turn:
                    seconds[name].append(spent)
        return {name: Timing.of(values) for name, values in seconds.items()}

    def kernels(self, name: str, run: Callable[[], Any], rounds: int) -> KernelTiming | None:
        """Device time of a call's kernels, by torch's profiler; None without CUDA or profiler.

        Args:
            name: what is timed.
            run: the call.
            rounds: how often.

        Raises:
            DeviceLost: it failed.
        """
        if self.device.type != "cuda":
            return None
        from torch.profiler import ProfilerActivity, profile

        try:
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                for _ in range(rounds):
                    self.flush()
                    run()
                torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            if self.alive():
                return None  # the profiler's own trouble: some machines lend no counters
            raise DeviceLost(name, str(error).partition("\n")[0]) from error
        return kernel_timing(
            [
                (event.time_range.start, event.name, event.time_range.elapsed_us() / 1e6)
                for event in profiler.events() or []
                if event.device_type == torch.autograd.DeviceType.CUDA
            ]
        )


def kernel_timing(events: list[tuple[float, str, float]]) -> KernelTiming | None:
    """Timing of the calls between the flushes of a profile.

    Args:
        events: (start, name, seconds) of every piece of device work.

    Returns:
        None if nothing was recorded.
    """
    calls: list[dict[str, float]] = []
    for _, name, seconds in sorted(events):
        if "bitwise_not" in name.lower():
            calls.append({})
        elif calls:
            calls[-1][name] = calls[-1].get(name, 0.0) + seconds
    calls = [call for call in calls if call]
    if not calls:
        return None
    total: dict[str, float] = {}
    for call in calls:
        for name, seconds in call.items():
            total[name] = total.get(name, 0.0) + seconds
    longest = max(total, key=total.__getitem__)
    return KernelTiming(
        Timing.of([sum(call.values()) for call in calls]),
        Timing.of([call.get(longest, 0.0) for call in calls]),
        longest,
    )


@dataclass(frozen=True)
class Ceilings:
    """What this machine did in the same run, the best of several tries.

    Attributes:
        copy_gb_per_s: of a copy, bytes read plus bytes written.
        read_gb_per_s: of a sum over memory, bytes read.
        matmul_tflops: of a square matrix product.
        matmul_dtype: its dtype, the fastest that there is for the kernels' numbers.
        matmul_size: rows of its matrices; 0 where a device's maker states all three.
    """

    copy_gb_per_s: float
    read_gb_per_s: float
    matmul_tflops: float
    matmul_dtype: str
    matmul_size: int

    @property
    def matmul(self) -> str:
        """The product in words."""
        if not self.matmul_size:
            return f"{self.matmul_dtype}, stated"
        return f"{self.matmul_dtype} {self.matmul_size}³"

    @property
    def gb_per_s(self) -> float:
        """The bandwidth roof: decode mostly reads, so the faster of the two."""
        return max(self.copy_gb_per_s, self.read_gb_per_s)

    def roof(self, intensity: float, matmul_tflops: float | None = None) -> float:
        """TFLOPS that a kernel of so many FLOP per byte can reach.

        Args:
            intensity: FLOP per byte.
            matmul_tflops: of a matrix product at the time of the kernel; this one's by default.
        """
        return min(matmul_tflops or self.matmul_tflops, intensity * self.gb_per_s / 1e3)


def matmul(device: torch.device, dtype: str, size: int) -> Callable[[], Tensor]:
    """A square matrix product, ``2 size^3`` FLOP."""
    matrix = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    product = torch.empty_like(matrix)
    return lambda: torch.mm(matrix, matrix, out=product)


def measure_ceilings(clock: Clock, dtype: str, quick: bool) -> Ceilings:
    """A copy, a read-only stream and a matrix product.

    Args:
        clock: of the device.
        dtype: of the kernels that are held against them. On CUDA the product is in bfloat16; on a
            CPU it is in this dtype or in float32, in which a CPU may well be faster.
        quick: small and few.
    """
    on_cuda = clock.device.type == "cuda"
    count = 2**24 if quick else 2**31 if on_cuda else 2**28
    size = 512 if quick else 8192 if on_cuda else 1024
    dtypes = ("bfloat16",) if on_cuda else tuple(dict.fromkeys(("float32", dtype)))
    try:
        source = torch.zeros(count // 4, dtype=torch.float32, device=clock.device)
        target = torch.empty_like(source)
        runs = {"copy": lambda: target.copy_(source), "read": lambda: source.sum()}
        runs |= {name: matmul(clock.device, name, size) for name in dtypes}
        best = {
            name: min(clock.once(run) for _ in range(3 if quick else 10))
            for name, run in runs.items()
        }
    except torch.OutOfMemoryError as error:
        raise MlakitError(
            "not enough memory on the device to measure its ceilings",
            remedy="stop what else is running there",
        ) from error
    fastest = min(dtypes, key=best.__getitem__)
    return Ceilings(
        copy_gb_per_s=2 * count / best["copy"] / 1e9,
        read_gb_per_s=count / best["read"] / 1e9,
        matmul_tflops=2 * size**3 / best[fastest] / 1e12,
        matmul_dtype=fastest,
        matmul_size=size,
    )
