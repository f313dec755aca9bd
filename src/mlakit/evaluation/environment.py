"""Where the numbers were taken."""

from __future__ import annotations

import datetime
import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from mlakit.reporting.schema import Environment

PACKAGES = ("mlakit", "torch", "transformers", "numpy")


def describe_environment(*, command: str, seed: int, device: torch.device) -> Environment:
    """Versions, hardware, threads, seed and the command of this run."""
    versions = {"python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in PACKAGES}
    return Environment(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        seed=seed,
        device=str(device),
        threads=torch.get_num_threads(),
        hardware=_hardware(device),
        versions=versions,
    )


def _hardware(device: torch.device) -> str:
    processor = f"{_processor()}, {os.cpu_count()} logical CPUs"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}; {processor}"
    return processor


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
