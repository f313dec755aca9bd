"""What a benchmark ran on: recorded beside every figure, so that figures can be compared."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("mlakit", "transformers", "triton", "numpy", "flash_mla", "flashinfer-python", "vllm")


def environment(gpu: int = 0) -> dict[str, Any]:
    """Machine, software and load at this moment, as plain JSON values.

    Args:
        gpu: number of the GPU that is described, if there is one.
    """
    record: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "torch_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "commit": _commit(),
    }
    for package in PACKAGES:
        try:
            record[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            record[package] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(gpu)
        record["gpu"] = properties.name
        record["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        record["gpu_multiprocessors"] = properties.multi_processor_count
        record["gpu_capability"] = f"{properties.major}.{properties.minor}"
        record["cuda"] = torch.version.cuda
    return record


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of a checkout; None for an installed package, whose folder may be in another's."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
