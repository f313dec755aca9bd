"""Which implementation of the operators runs where, and why.

A new kernel is one file beside this one and one line in ``FILES``: it has ``decode(call)`` and,
where it can, ``decode_selected(call)``, which return ``out [N, H, C]`` and ``lse [N, H]`` (and the
largest score). ``choose`` takes the first of ``ORDER`` that can do what a call asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from mlakit.errors import UsageError
from mlakit.ops.call import DenseCall, SparseCall, dense_call

FILES = {
    "cpu": "cpu",
    "gluon": "gluon_decode",
    "triton": "triton_decode",
    "flash_mla": "flash_mla_decode",
    "torch": "torch_decode",
    "reference": "reference",
}
ORDER = ("cpu", "gluon", "triton", "torch")
REASONS = {
    "cpu": "tensors on the CPU: a piece of the cache at a time, in its cores' caches",
    "gluon": "512 + 64 on Hopper: warps of their own fetch, others multiply, written in Gluon",
    "triton": "tensors on a GPU: split sequences, compiled by Triton",
}


@dataclass(frozen=True)
class Choice:
    """An implementation's name and the reason for it, as ``mlakit doctor`` prints them."""

    name: str
    reason: str


def implementation(name: str) -> Any:
    """The module of one of ``FILES``; imports it, and Triton where it needs Triton."""
    return import_module(f"mlakit.ops.{FILES[name]}")


def choose(call: DenseCall | SparseCall, override: str | None = None) -> Choice:
    """Pick the implementation for a call; only shapes, dtypes and devices are read.

    Args:
        call: what is to be computed.
        override: the value of the environment's ``MLAKIT_KERNEL``, if set: one of ``FILES``.

    Raises:
        UsageError: if the override is unknown or cannot do this.
    """
    if override:
        if override not in FILES:
            raise UsageError(
                f"MLAKIT_KERNEL is {override!r}, which is no implementation",
                remedy=f"Set it to one of {', '.join(FILES)}, or unset it.",
            )
        reason = why_not(override, call)
        if reason:
            raise UsageError(
                f"MLAKIT_KERNEL is {override!r}, which cannot run this call: {reason}",
                remedy="Unset MLAKIT_KERNEL, or set it to 'torch'.",
            )
        return Choice(override, "asked for by MLAKIT_KERNEL")
    reasons = {name: why_not(name, call) for name in ORDER}
    name = next(name for name in ORDER if not reasons[name])
    if name != "torch":
        return Choice(name, REASONS[name])
    if call.q.dtype == torch.float64:
        return Choice(name, "float64: plain torch computes in full precision")
    return Choice(name, f"plain torch in float32; no kernel of ours: {reasons['triton']}")


def why_not(name: str, call: DenseCall | SparseCall) -> str:
    """Why an implementation cannot run a call; empty if it can."""
    if name in ("torch", "reference"):
        return ""
    device, dtype = call.q.device.type, call.q.dtype
    if name == "cpu" and device != "cpu":
        return "it is for tensors on the CPU"
    if name != "cpu" and device != "cuda":  # an AMD GPU is called cuda too
        return f"it is for tensors on a GPU, not on {device}"
    if dtype == torch.float64:
        return "it computes in float32"
    if name == "cpu":
        return ""
    if name != "flash_mla" and find_spec("triton") is None:
        return "Triton is not installed"
    if _capability(call.q.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if name == "gluon" and (torch.version.hip or _capability(call.q.device) != (9, 0)):
        return "it is for GPUs of compute capability 9.0"  # others never import it
    return str(implementation(name).why_not(call))


def deepseek_call(device: str) -> DenseCall:
    """The call that the choice is usually asked about: bfloat16, 512 + 64, pages of 64."""
    q = torch.empty(1, 1, 16, 576, dtype=torch.bfloat16, device=device)
    k_cache = torch.empty(1, 64, 1, 576, dtype=torch.bfloat16, device=device)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    return dense_call(q, k_cache, table, table[0], 512, softmax_scale=1.0)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
