"""A basis of the latent in which coarse numbers lose least, folded into the weights.

A quantised cache gives the values of a group one scale, so its rounding errors are of about one
size ``s`` in all of them, and ``s`` follows the largest. For latents ``z`` of second moment
``S = E[z z^T]`` that are read through ``W = B^T B`` (``B`` the up-projections), the function stays
the same with ``T z`` in the cache and ``B T^-1`` behind it, and where a rotation spreads all
values evenly the error in what is read is

    s^2 tr(T^-T W T^-1),   s^2 ~ tr(T S T^T) / C.

Over all invertible ``T`` the product of the traces is smallest where ``T^T T`` is the geometric
mean of ``S^-1`` and ``W`` (their product is then the square of the nuclear norm of
``S^1/2 W^1/2``). Principal axes, which ``convert`` makes, are the opposite: the first value of a
group drowns the others. Rotations alone are QuaRot's (arXiv 2404.00456) for models whose basis
may only be rotated; here nothing stands between the two matrices, so the basis is free.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mlakit.families import FAMILIES
from mlakit.nn.latent_attention import ArticleAttention, MLAttention

FLOOR = 1e-9
"""Of eigenvalues, as a share of their mean: directions that nothing fills or reads are no limit."""

SAMPLES = 4
"""Inputs per value of the latent that stand for a text's where the latent is not made of the
layer's input by one matrix."""


@torch.no_grad()
def even_latents(model: Any) -> None:
    """Changes the basis of every layer's latent in place; what the model computes stays.

    Needs no text: inputs are taken for uncorrelated, as wide as the norm before attention makes
    them. Rotary parts stay as they are.

    Args:
        model: a converted language model of transformers.
    """
    name = FAMILIES[model.config.model_type.removeprefix("mla_")].input_norm
    doublings = 0
    for layer in model.model.layers:
        norm = None if name is None else getattr(layer, name)
        doublings = max(doublings, even_attention(layer.self_attn, norm))
    _make_room(model, doublings)


@torch.no_grad()
def even_attention(attention: MLAttention, norm: nn.Module | None) -> int:
    """The same for one layer, all but its latent norm.

    Args:
        attention: the layer's.
        norm: in front of it, if there is one.

    Returns:
        How many times the latents may have doubled in length, for the norm to stay the identity.
    """
    moment, doublings = latent_moment(attention, norm), 0
    for rows, up in _parts(attention):
        weight = up.weight.double()
        change, back = even_basis(moment[rows, rows], weight.mT @ weight)
        _fold(attention, rows, up, change, back)
        longer = max(1.0, float(torch.linalg.matrix_norm(change, 2)))
        doublings = max(doublings, math.ceil(math.log2(longer)))
    return doublings


def even_basis(moment: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
    """The change of basis, and its inverse.

    Args:
        moment: ``S [C, C]``, float64.
        read: ``W [C, C]``.

    Returns:
        ``T`` and ``T^-1``, with ``tr(T S T^T) = tr(S)``; the same for the same arguments.
    """
    size, lifted = len(moment), _lifted(moment)
    root, inverse = _power(lifted, 0.5), _power(lifted, -0.5)
    middle = inverse @ _power(root @ _lifted(read) @ root, 0.5) @ inverse
    draw = torch.Generator().manual_seed(size)
    normal = torch.randn(size, size, generator=draw, dtype=torch.float64)
    rotation = torch.linalg.qr(normal).Q.to(moment.device)
    change, back = rotation @ _power(middle, 0.5), _power(middle, -0.5) @ rotation.mT
    scale = float((moment.trace() / (change @ moment @ change.mT).trace()).sqrt())
    return change * scale, back / scale


def latent_moment(attention: MLAttention, norm: nn.Module | None) -> Tensor:
    """``E[z z^T] [C, C]`` of a layer's latents, float64, for inputs that are uncorrelated.

    Args:
        attention: the layer's.
        norm: in front of it, if there is one.
    """
    down, rank = attention.kv_a_proj_with_mqa, attention.kv_lora_rank
    weight = down.weight[:rank].double()
    bias = weight.new_zeros(rank) if down.bias is None else down.bias[:rank].double()
    inputs = input_scale(attention.config.hidden_size, norm, down.weight)
    if not attention.config.indirect:
        latent = weight * inputs
        return latent @ latent.mT + torch.outer(bias, bias)
    draw = torch.Generator().manual_seed(rank)
    drawn = torch.randn(1, SAMPLES * rank, len(inputs), generator=draw, dtype=torch.float64)
    drawn = (drawn.to(inputs.device) * inputs).to(down.weight.dtype)
    latent = attention.latent_inputs(drawn)[0].double() @ weight.mT + bias
    return latent.mT @ latent / len(latent)


def input_scale(size: int, norm: nn.Module | None, like: Tensor) -> Tensor:
    """Root mean square ``[D]`` of each of a layer's inputs, float64: its norm's own weights."""
    signs = torch.ones(size, dtype=like.dtype, device=like.device)
    signs[1::2] = -1  # a mean of 0, so that a LayerNorm gives its weights as well
    return signs.double().abs() if norm is None else norm(signs).double().abs()


def _parts(attention: MLAttention) -> Iterator[tuple[slice, nn.Linear]]:
    """Parts of the latent that are mixed among themselves, each with what reads it."""
    rank = attention.kv_lora_rank
    if isinstance(attention, ArticleAttention):
        yield slice(0, rank // 2), attention.v_b_proj
        yield slice(rank // 2, rank), attention.k_b_proj
    else:
        yield slice(0, rank), attention.kv_b_proj


def _fold(attention: MLAttention, rows: slice, up: nn.Linear, change: Tensor, back: Tensor) -> None:
    """Puts ``T`` into the down-projection and ``T^-1`` into what reads the latent."""
    down = attention.kv_a_proj_with_mqa
    for part in (down.weight, down.bias):
        if part is not None:
            part[rows] = (change @ part[rows].double()).to(part.dtype)
    up.weight.copy_(up.weight.double() @ back)


def _make_room(model: Any, doublings: int) -> None:
    """Latent norms, the identity by their epsilon, stay it for longer latents; all alike.

    The config has one epsilon for all layers, so that a saved model is this one again.
    """
    if model.config.mla_form == "article":  # it has none
        return
    norms = [layer.self_attn.kv_a_layernorm for layer in model.model.layers]
    room = min(torch.finfo(n.weight.dtype).max / float(n.weight.max()) for n in norms)
    doublings = min(doublings, math.floor(math.log2(room)))
    model.config.latent_norm_eps *= 4.0**doublings
    for norm in norms:
        norm.variance_epsilon *= 4.0**doublings
        norm.weight.mul_(2.0**doublings)


def _lifted(matrix: Tensor) -> Tensor:
    """With a floor under its eigenvalues."""
    least = max(FLOOR * float(matrix.trace()) / len(matrix), 1e-300)
    return matrix + least * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """Of a positive definite matrix."""
    sizes, axes = torch.linalg.eigh(matrix)
    sizes = sizes.clamp_min(sizes[-1] * torch.finfo(sizes.dtype).eps)
    return (axes * sizes**exponent) @ axes.mT
