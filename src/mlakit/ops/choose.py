"""Which implementation of ``mla_decode`` runs where, and why. A pure function.

A new kernel is one file beside this one, one name here and one line in ``choose``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mlakit.errors import UsageError

NAMES = ("cpu", "torch", "reference")


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
    fits_cpu = device == "cpu" and dtype != torch.float64
    if override:
        if override not in NAMES:
            raise UsageError(
                f"MLAKIT_KERNEL is {override!r}, which is no implementation",
                remedy=f"Set it to one of {', '.join(NAMES)}, or unset it.",
            )
        if override == "cpu" and not fits_cpu:
            raise UsageError(
                f"MLAKIT_KERNEL is 'cpu', which cannot run {dtype} on {device}",
                remedy="Unset MLAKIT_KERNEL, or set it to 'torch'.",
            )
        return Choice(override, "asked for by MLAKIT_KERNEL")
    if fits_cpu:
        return Choice("cpu", "tensors on the CPU: chunks in float32, one sequence per thread")
    if device == "cpu":
        return Choice("torch", "float64: plain torch computes in full precision")
    return Choice("torch", f"no kernel of ours for {device}: plain torch in float32")
