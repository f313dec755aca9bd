"""Fewer weight bytes, the cache as it is: Wanda prunes, GPTQ rounds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mlakit.baselines.bits import bit_settings, fixed
from mlakit.baselines.method import Bench, Method, Setting, Variant
from mlakit.baselines.weights import copied, decoder_layers, watch_inputs

GROUP = 128
"""Weights of a row that share a scale in GPTQ, where the row is a multiple of it; else all."""

DAMP = 0.01
"""GPTQ's share of the mean diagonal that is added to the Hessian."""


def wanda(weight: Tensor, moment: Tensor, share: float) -> Tensor:
    """Zeroes in every row the ``share`` of weights with the least ``|w| sqrt(E x^2)``.

    Args:
        weight: ``[out, in]``.
        moment: ``E[x x^T]`` of the inputs ``[in, in]``, float64.
        share: of the weights of a row.

    Source: Sun et al., https://arxiv.org/abs/2306.11695, equation 1.
    """
    score = weight.abs().double() * moment.diagonal().sqrt()
    dropped = score.topk(int(share * weight.shape[1]), dim=1, largest=False).indices
    return weight.scatter(1, dropped, 0.0)


def gptq(weight: Tensor, moment: Tensor, bits: int) -> Tensor:
    """Rounds a weight column by column, each error made up for by the columns to come.

    Args:
        weight: ``[out, in]``.
        moment: ``E[x x^T]`` of the inputs ``[in, in]``, float64: half the Hessian.
        bits: per weight, with one scale and offset per group of a row.

    Returns:
        The rounded weight, in the dtype it came in.

    Source: Frantar et al., https://arxiv.org/abs/2210.17323, algorithm 1.
    """
    left, columns = weight.double().clone(), weight.shape[1]
    damp = DAMP * moment.diagonal().mean().clamp_min(1e-12)
    hessian = moment + damp * torch.eye(columns, dtype=moment.dtype, device=moment.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    group, top = _group(columns), 2**bits - 1
    rounded = torch.empty_like(left)
    low = step = left[:, :1]
    for column in range(columns):
        if column % group == 0:
            part = left[:, column : column + group]
            low = part.amin(1, keepdim=True)
            step = ((part.amax(1, keepdim=True) - low) / top).clamp_min(1e-12)
        value = left[:, column : column + 1]
        rounded[:, column : column + 1] = low + step * ((value - low) / step).round().clamp(0, top)
        error = (value - rounded[:, column : column + 1]) / factor[column, column]
        left[:, column + 1 :] -= error * factor[column, column + 1 :]
    return rounded.to(weight.dtype)


def _group(columns: int) -> int:
    return GROUP if columns % GROUP == 0 else columns


def shrink_layers(
    bench: Bench,
    shrink: Callable[[Tensor, Tensor], Tensor],
    nbytes: Callable[[Tensor], float],
) -> Variant:
    """Changes every linear layer of the decoder, layer by layer, inputs as the changed ones give.

    Args:
        bench: source and calibration text.
        shrink: the new weight from a weight ``[out, in]`` and its input moment.
        nbytes: bytes of a weight as the method would store it.
    """
    model = copied(bench.source.model)
    total = float(sum(p.nbytes for p in model.parameters()))
    for layer in decoder_layers(model):
        linears = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
        moments: dict[Any, Tensor] = {}

        def see(name: Any, x: Tensor, moments: dict[Any, Tensor] = moments) -> None:
            moments[name] = moments.get(name, 0) + (x.mT @ x).double()

        watch_inputs(model, bench.calibration_ids, linears, see)
        for name, linear in linears.items():
            moment = moments[name] / bench.calibration_ids.numel()
            linear.weight.data = shrink(linear.weight.data, moment)
            total += nbytes(linear.weight) - linear.weight.nbytes
    return Variant(model, weight_bytes=int(total), calibration_tokens=bench.calibration_ids.numel())


def _wanda(bench: Bench, share: float) -> Variant:
    return shrink_layers(
        bench,
        lambda weight, moment: wanda(weight, moment, share),
        lambda weight: (1 - share) * weight.nbytes + weight.numel() / 8,  # and which are there
    )


def _gptq(bench: Bench, bits: float) -> Variant:
    return shrink_layers(
        bench,
        lambda weight, moment: gptq(weight, moment, int(bits)),
        lambda weight: weight.numel() * (bits / 8 + 4 / _group(weight.shape[1])),
    )


METHODS = (
    Method(
        "wanda",
        "Wanda (simple pruning)",
        "weights",
        "arXiv 2306.11695",
        "Unstructured only; the zeroes are held as numbers while it runs, and bytes count kept "
        "weights and one bit for each place.",
        partial(fixed, [Setting("50 % of weights", 0.5)]),
        _wanda,
    ),
    Method(
        "gptq",
        "GPTQ",
        "weights",
        "arXiv 2210.17323",
        "The plain algorithm without blocks, kernels or reordering by activation; rounded weights "
        "are held unpacked while it runs, and bytes count codes, scales and offsets.",
        partial(fixed, bit_settings(4, 3)),
        _gptq,
    ),
)
