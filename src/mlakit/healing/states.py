"""Trained weights and their optimiser in safetensors files, whole or not there."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mlakit.checkpoint import writing

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""What Adam remembers of a weight."""


def gathered(tensor: Tensor) -> Tensor:
    """A tensor, whole, on the CPU; all processes take part where it is sharded."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().cpu()


def gathered_weights(trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The trained weights as they are now; on a CPU the very same memory, to be written at once."""
    return {name: gathered(parameter) for name, parameter in trained.items()}


def gathered_moments(trained: Mapping[str, nn.Parameter], optimiser: Any) -> dict[str, Tensor]:
    """What the optimiser remembers, as ``weight/moment``."""
    return {
        f"{name}/{moment}": gathered(optimiser.state[parameter][moment])
        for name, parameter in trained.items()
        for moment in MOMENTS
        if moment in optimiser.state.get(parameter, {})
    }


@torch.no_grad()
def put_weights(trained: Mapping[str, nn.Parameter], stored: Mapping[str, Tensor]) -> None:
    """Overwrites the trained weights, sharded as they are."""
    for name, parameter in trained.items():
        parameter.copy_(_like(parameter, stored[name]))


def put_moments(
    trained: Mapping[str, nn.Parameter], optimiser: Any, stored: Mapping[str, Tensor]
) -> None:
    """Overwrites what the optimiser remembers."""
    for name, parameter in trained.items():
        state = {}
        for moment in MOMENTS:
            value = stored.get(f"{name}/{moment}")
            if value is not None:
                state[moment] = value if moment == "step" else _like(parameter, value)
        optimiser.state[parameter] = state


def random_states() -> dict[str, Tensor]:
    """Where torch's random numbers stand, on which dropout depends; of this process's device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def put_random_states(states: Mapping[str, Tensor]) -> None:
    """Goes on from there."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writing.write_tensors(path, tensors)


def copy_tensors(source: Path, path: Path) -> None:
    """The same file under another name, whole or not there."""
    with source.open("rb") as read, writing.atomic_file(path, source.stat().st_size) as file:
        shutil.copyfileobj(read, file)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads it back."""
    return load_file(path)


def _like(parameter: Any, value: Tensor) -> Tensor:
    """A value on the device, and sharded in the way, of a parameter."""
    value = value.to(device=parameter.device, dtype=parameter.dtype)
    if hasattr(parameter, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value
