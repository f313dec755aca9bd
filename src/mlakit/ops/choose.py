"""Which implementation of ``mla_decode`` runs where, and why.

A new kernel is one file beside this one, one name here and one line in ``choose``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch

from mlakit.errors import UsageError

NAMES = ("cpu", "triton", "torch", "reference")


@dataclass(frozen=True)
class Choice:
    """An implementation's name and the reason for it, as ``mlakit doctor`` prints them."""

    name: str
    reason: str


def choose(device: str, dtype: torch.dtype, override: str | None = None) -> Choice:
    """Pick the implementation for tensors of one device type and dtype.

    Args:
        device: torch's device type, ``cpu``, ``cuda`` ...
        dtype: of q and the cache.
        override: the value of the environment's ``MLAKIT_KERNEL``, if set: one of ``NAMES``.

    Raises:
        UsageError: if the override is unknown or cannot do this.
    """
    why_not = {"cpu": _why_not_cpu(device, dtype), "triton": _why_not_triton(device, dtype)}
    if override:
        if override not in NAMES:
            raise UsageError(
                f"MLAKIT_KERNEL is {override!r}, which is no implementation",
                remedy=f"Set it to one of {', '.join(NAMES)}, or unset it.",
            )
        if why_not.get(override):
            raise UsageError(
                f"MLAKIT_KERNEL is {override!r}, which cannot run {dtype} on {device}: "
                f"{why_not[override]}",
                remedy="Unset MLAKIT_KERNEL, or set it to 'torch'.",
            )
        return Choice(override, "asked for by MLAKIT_KERNEL")
    if not why_not["cpu"]:
        return Choice("cpu", "tensors on the CPU: chunks in float32, one sequence per thread")
    if not why_not["triton"]:
        return Choice("triton", "tensors on a GPU: split sequences, compiled by Triton")
    if dtype == torch.float64:
        return Choice("torch", "float64: plain torch computes in full precision")
    return Choice("torch", f"plain torch in float32; no kernel of ours: {why_not['triton']}")


def _why_not_cpu(device: str, dtype: torch.dtype) -> str:
    """Why the CPU path cannot run; empty if it can."""
    if device != "cpu":
        return "it is for tensors on the CPU"
    return "it computes in float32" if dtype == torch.float64 else ""


def _why_not_triton(device: str, dtype: torch.dtype) -> str:
    """Why the Triton path cannot run; empty if it can. An AMD GPU is called ``cuda`` too."""
    if device != "cuda":
        return f"Triton has none for {device}"
    if dtype == torch.float64:
        return "it computes in float32"
    return _why_no_triton_here()


@cache
def _why_no_triton_here() -> str:
    if find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return ""
