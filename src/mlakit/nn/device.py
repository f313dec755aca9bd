"""The device that a user named."""

from __future__ import annotations

import torch

from mlakit.errors import UsageError


def usable_device(name: str) -> torch.device:
    """The device of this name, on which a tensor can be made.

    Raises:
        UsageError: there is none, or torch cannot use it here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"The device {name!r} cannot be used: {str(error).splitlines()[0]}",
            remedy="use --device cpu; mlakit doctor lists the devices",
        ) from error
    return device
