"""SliceGPT: the residual stream in its principal directions, the weakest of them cut off."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mlakit.baselines.bits import fixed
from mlakit.baselines.method import Bench, Method, Setting, Variant
from mlakit.baselines.weights import copied, decoder_layers, watch_inputs
from mlakit.errors import UnsupportedModelError
from mlakit.families import FAMILIES

READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
WRITERS = ("o_proj", "down_proj")


def residual_moment(bench: Bench) -> Tensor:
    """Second moment ``[D, D]`` of the normalised residual stream, all reading places together."""
    model: Any = bench.source.model
    size = bench.spec.hidden_size
    total = torch.zeros(size, size, dtype=torch.float64)

    def see(_: Any, x: Tensor) -> None:
        nonlocal total
        unit = x * x.square().mean(-1, keepdim=True).rsqrt()
        total += (unit.mT @ unit).double().cpu()

    norms = [
        n for x in decoder_layers(model) for n in (x.input_layernorm, x.post_attention_layernorm)
    ]
    watch_inputs(model, bench.calibration_ids, dict(enumerate(norms)), see)
    return total


def fold_norm(norm: Any, readers: list[Any], offset: float) -> None:
    """Moves the weight of a norm into what reads it."""
    weight = norm.weight.detach().float() + offset
    for linear in readers:
        linear.weight.data = (linear.weight.float() * weight).to(linear.weight.dtype)
    norm.weight.data = torch.full_like(norm.weight, 1.0 - offset)


def slice_model(model: Any, basis: Tensor, offset: float) -> None:
    """Puts a model of RMSNorms into a basis ``[D, k]`` of its residual stream, in place.

    Norms divide by the mean over k instead of D numbers, so their weights become sqrt(D / k).
    """
    size, width = basis.shape
    decoder, dtype = model.get_decoder(), model.dtype
    head = nn.Linear(size, model.config.vocab_size, bias=False)
    head.weight = nn.Parameter(model.get_output_embeddings().weight.detach().clone(), False)
    model.set_output_embeddings(head)
    model.config.tie_word_embeddings = False
    norms = [(decoder.norm, [head])]
    for layer in decoder.layers:
        found = {n.rpartition(".")[2]: m for n, m in layer.named_modules()}
        attention, block = READERS[:3], READERS[3:]
        norms.append((layer.input_layernorm, [found[name] for name in attention]))
        norms.append((layer.post_attention_layernorm, [found[name] for name in block]))
        for name in WRITERS:
            linear = found[name]
            linear.weight = _parameter(basis.mT @ linear.weight.float(), dtype)
            if linear.bias is not None:
                linear.bias = _parameter(basis.mT @ linear.bias.float(), dtype)
            linear.out_features = width
    for norm, readers in norms:
        fold_norm(norm, readers, offset)
        norm.weight = _parameter(basis.new_full((width,), (size / width) ** 0.5 - offset), dtype)
        for linear in readers:
            linear.weight = _parameter(linear.weight.float() @ basis, dtype)
            linear.in_features = width
    embedding = decoder.embed_tokens
    embedding.weight = _parameter(embedding.weight.float() @ basis, dtype)
    embedding.embedding_dim = width
    model.config.hidden_size = width


def _parameter(x: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(x.detach().to(dtype).contiguous(), requires_grad=False)


def _sliced(bench: Bench, share: float) -> Variant:
    family = FAMILIES[bench.spec.family]
    model: Any = copied(bench.source.model)
    names = {n.rpartition(".")[2] for n, _ in decoder_layers(model)[0].named_modules()}
    plain = bench.spec.norms_per_layer == 2 and not bench.spec.norm_bias
    scaled = family.embedding_scale(bench.spec.config) != 1.0
    if not plain or scaled or not {*READERS, *WRITERS} <= names:
        raise UnsupportedModelError(
            f"{bench.spec.model_type} is more than two RMSNorms, attention and one block a layer",
            remedy="leave this method out",
        )
    width = max(1, round((1 - share) * bench.spec.hidden_size))
    vectors = torch.linalg.eigh(residual_moment(bench)).eigenvectors.flip(1)[:, :width]
    model.config.head_dim = bench.layer.head_dim
    slice_model(model, vectors.float().to(model.device), family.norm_offset)
    return Variant(model, calibration_tokens=bench.calibration_ids.numel())


METHODS = (
    Method(
        "slicegpt",
        "SliceGPT",
        "weights",
        "arXiv 2401.15024",
        "One rotation for the whole model, where the original has one for each block and turns the "
        "residual stream between them; embeddings that were tied are held twice.",
        partial(fixed, [Setting("25 % of the width", 0.25)]),
        _sliced,
    ),
)
