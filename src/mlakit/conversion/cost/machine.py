"""How fast this machine multiplies and writes: found out in a fraction of a second, or assumed.

No torch here.
"""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path

PRODUCTS = ((512, 40), (1024, 8))
"""Rows and columns of the matrices that the processor is timed with, and how often: short ones
come through between what else runs, long ones fill many cores."""

CPU_FLOPS = 2e10
CUDA_FLOPS = 2e13
DISK_BYTES_PER_SECOND = 5e8
"""Assumed speeds (per CPU core; any GPU; any disk) behind the estimate of the time."""

CPUINFO = Path("/proc/cpuinfo")
BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}
"""What x86 and ARM call instructions for bfloat16 products with float32 sums."""

VECTOR_SPEED, TILES_SPEED = 2.8, 4.5
"""``cpu_bfloat16_speed`` with instructions on vectors, which take four times the numbers, less what
memory takes; and with those on tiles (800 over 160 GFLOP/s on one core of a Xeon)."""


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether the processor has such instructions; no where the system does not say."""
    return bool(BFLOAT16 & _cpu_features())


def cpu_bfloat16_speed() -> float:
    """Products of bfloat16 matrices over those of float32 ones."""
    if not cpu_multiplies_bfloat16():
        return 1.0
    return TILES_SPEED if "amx_bf16" in _cpu_features() else VECTOR_SPEED


def _cpu_features() -> set[str]:
    if not CPUINFO.is_file():
        return set()
    lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    named = [line.split(":", 1)[1] for line in lines if line.startswith(("flags", "Features"))]
    return {name for line in named for name in line.split()}


@cache
def cpu_flops() -> float:
    """Float32 operations per second of matrix products, on all cores that are to be used.

    The best of a few products: what a long run gets where nothing else runs.
    """
    import numpy as np

    best = 0.0
    for size, times in PRODUCTS:
        a = np.full((size, size), 0.5, dtype=np.float32)
        for _ in range(times):
            start = time.perf_counter()
            np.matmul(a, a)
            best = max(best, 2.0 * size**3 / (time.perf_counter() - start))
    return best


@cache
def cpu_bytes_per_second() -> float:
    """Bytes that one pass of a simple operation over large arrays reads and writes per second."""
    import numpy as np

    a = np.ones(2**23, dtype=np.float32)
    out = np.empty_like(a)
    best = float("inf")
    for _ in range(16):
        start = time.perf_counter()
        np.add(a, a, out=out)
        best = min(best, time.perf_counter() - start)
    return 2.0 * a.nbytes / best
