"""Joules that a device reports to have spent; nothing where it reports none.

NVIDIA GPUs since Volta count their whole board's energy (NVML, from ``nvidia-ml-py``); Linux counts
that of processor packages (``powercap``, usually for root alone). Both count all that runs there,
in steps of some milliseconds, so single short runs are coarse and idle draw is included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Counter:
    """One counter of joules, which begins again at 0 after ``span``."""

    read: Callable[[], float]
    span: float = float("inf")

    def between(self, before: float, after: float) -> float:
        """Joules from one reading to a later one."""
        return after - before if after >= before else after - before + self.span


class EnergyMeter:
    """All counters of a device.

    Args:
        device: a GPU, or the processor.
        powercap: folder of Linux's counters.
    """

    def __init__(self, device: torch.device, powercap: Path = POWERCAP) -> None:
        self.counters = _gpu(device) if device.type == "cuda" else _packages(powercap)

    def read(self) -> list[float]:
        """Joules of every counter now."""
        return [counter.read() for counter in self.counters]

    def since(self, before: list[float]) -> float | None:
        """Joules spent since ``read``; None where nothing counts them."""
        if not self.counters:
            return None
        readings = zip(self.counters, before, self.read(), strict=True)
        return sum(counter.between(first, last) for counter, first, last in readings)


def _gpu(device: torch.device) -> list[Counter]:
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:  # older than Volta, a part of a card, or a driver that hides it
        return []
    return [Counter(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)]


def _packages(powercap: Path) -> list[Counter]:
    found = []
    for folder in sorted(powercap.glob("intel-rapl:*")):  # AMD's are named so too
        try:
            if not (folder / "name").read_text("ascii").startswith("package"):
                continue
            span = float((folder / "max_energy_range_uj").read_text("ascii")) / 1e6
            found.append(Counter(_microjoules(folder / "energy_uj"), span))
            found[-1].read()
        except OSError:
            return []
    return found


def _microjoules(path: Path) -> Callable[[], float]:
    return lambda: float(path.read_text("ascii")) / 1e6
