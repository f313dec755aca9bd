"""One function per verb, with the same argument names as the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mlakit.conversion.plan import ConversionPlan
    from mlakit.generation import GenerationResult
    from mlakit.inspection import Inspection
    from mlakit.reporting.schema import Report

__all__ = [
    "convert",
    "demo",
    "doctor",
    "eval",
    "generate",
    "inspect",
    "load",
    "register",
    "track_shapes",
    "verify",
]


def load(model: str | Path, *, dtype: str | None = None, device: str = "cpu") -> PreTrainedModel:
    """A converted or an ordinary checkpoint as a transformers model, ready to run."""
    from mlakit.nn.hf import load as read

    return read(model, dtype=dtype, device=device)


def register() -> None:
    """Tell transformers' Auto classes about converted checkpoints; safe to call twice."""
    from mlakit.nn.hf import register as announce

    announce()


def doctor() -> dict[str, str]:
    """What is installed here and which decode implementation would run, with the reason."""
    import platform
    from importlib import metadata

    import torch

    from mlakit.ops.choose import choose

    findings = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("mlakit", "torch", "transformers", "triton", "flash_mla", "datasets"):
        try:
            findings[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            findings[package] = "not installed"
    findings["cpu threads"] = str(torch.get_num_threads())
    devices = ["cpu"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        findings[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        devices.append("cuda")
    for device in dict.fromkeys(devices):
        choice = choose(device, torch.bfloat16)
        findings[f"decode on {device}"] = f"{choice.name}: {choice.reason}"
    return findings
