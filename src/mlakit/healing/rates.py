"""Learning rates: one for all weights as given, or one for each weight by its size."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from mlakit.healing.lora import MARK

AUTO_RATE = 0.003
"""The learning rate, relative to the root mean square of each trained weight. Adam moves every
number by about its rate, so each weight then changes by the same share of itself in a step."""


def choose_rates(model: nn.Module, learning_rate: float | None) -> dict[str, float]:
    """The largest learning rate of every trained parameter, by name.

    Args:
        model: with its trainable parameters chosen.
        learning_rate: for all of them; None for ``AUTO_RATE`` of each one's own size.
    """
    parameters = dict(model.named_parameters())
    names = [name for name, parameter in parameters.items() if parameter.requires_grad]
    if learning_rate is not None:
        return dict.fromkeys(names, learning_rate)
    return {name: AUTO_RATE * _size(name, parameters) for name in names}


def _size(name: str, parameters: Mapping[str, Tensor]) -> float:
    """What a parameter's changes are to be compared with."""
    if name.endswith(f"{MARK}0.up"):
        # It begins as zero: the size at which up @ down is as large as the weight that it changes.
        down = parameters[f"{name[: -len('up')]}down"]
        weight = parameters[name.replace("0.up", "original")]
        return _root_mean_square(weight) / (_root_mean_square(down) * math.sqrt(down.shape[-2]))
    return _root_mean_square(parameters[name])


def _root_mean_square(tensor: Tensor) -> float:
    found = float(tensor.detach().float().square().mean().sqrt())
    return max(found, 1e-8)
