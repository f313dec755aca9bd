"""Fewer key/value heads: GQA and MQA by averaging, and whole groups pruned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mlakit.baselines.method import Bench, Method, Setting, Variant
from mlakit.baselines.weights import attentions, copied, watch_inputs
from mlakit.spec import ModelSpec


def _divisors(spec: ModelSpec, budgets: Sequence[float]) -> list[Setting]:
    heads = spec.layers[0].num_key_value_heads
    return [
        Setting(f"{part} of {heads} K/V heads", part)
        for part in range(heads - 1, 0, -1)
        if heads % part == 0
    ]


def _rows(linear: Any, pick: Any) -> None:
    """Replaces the outputs of a linear layer by ``pick`` of them."""
    linear.weight = torch.nn.Parameter(pick(linear.weight.detach()), requires_grad=False)
    if linear.bias is not None:
        linear.bias = torch.nn.Parameter(pick(linear.bias.detach()), requires_grad=False)
    linear.out_features = len(linear.weight)


def merge_heads(x: Tensor, heads: int, dim: int) -> Tensor:
    """Averages neighbouring heads of rows ``[G d, ...]`` until there are ``heads``."""
    parts = x.unflatten(0, (heads, -1, dim)).float().mean(1)
    return parts.flatten(0, 1).to(x.dtype)


def _gqa(bench: Bench, heads: float) -> Variant:
    model, count, dim = copied(bench.source.model), int(heads), bench.layer.head_dim
    for attention in attentions(model):
        for linear in (attention.k_proj, attention.v_proj):
            _rows(linear, lambda x: merge_heads(x, count, dim))
        attention.num_key_value_groups = bench.layer.num_attention_heads // count
    model.config.num_key_value_heads = count
    return Variant(model)


def group_importance(bench: Bench) -> list[Tensor]:
    """Mean square of what each key/value group adds to its layer's output, ``[G]`` per layer."""
    groups = bench.layer.num_key_value_heads
    found = attentions(bench.source.model)
    sums = [torch.zeros(groups, dtype=torch.float64) for _ in found]

    def see(layer: int, x: Tensor) -> None:
        weight = found[layer].o_proj.weight.float().unflatten(1, (groups, -1))
        parts = torch.einsum("tgx,dgx->tgd", x.unflatten(1, (groups, -1)), weight)
        sums[layer] += parts.square().sum((0, 2)).double().cpu()

    modules = {layer: attention.o_proj for layer, attention in enumerate(found)}
    watch_inputs(bench.source.model, bench.calibration_ids, modules, see)
    return sums


def _pruned(bench: Bench, heads: float) -> Variant:
    model, layer, count = copied(bench.source.model), bench.layer, int(heads)
    groups = layer.num_key_value_heads
    for attention, importance in zip(attentions(model), group_importance(bench), strict=True):
        keep = importance.topk(count).indices.sort().values
        for name in ("q_proj", "k_proj", "v_proj"):
            _rows(
                getattr(attention, name),
                lambda x, keep=keep: x.unflatten(0, (groups, -1))[keep].flatten(0, 1),
            )
        columns = attention.o_proj.weight.detach().unflatten(1, (groups, -1))[:, keep].flatten(1)
        attention.o_proj.weight = torch.nn.Parameter(columns, requires_grad=False)
        attention.o_proj.in_features = columns.shape[1]
    model.config.head_dim = layer.head_dim
    model.config.num_key_value_heads = count
    model.config.num_attention_heads = layer.num_attention_heads // groups * count
    return Variant(model, calibration_tokens=bench.calibration_ids.numel())


METHODS = (
    Method(
        "gqa",
        "GQA / MQA by averaging",
        "heads",
        "arXiv 2305.13245",
        "Neighbouring heads are averaged and nothing is trained after it, where the original "
        "trains on with 5 % of the pre-training.",
        _divisors,
        _gqa,
    ),
    Method(
        "pruned-groups",
        "groups pruned (Sheared)",
        "heads",
        "Sheared LLaMA, arXiv 2310.06694",
        "The key/value groups that add least to their layer's output go, with their queries; no "
        "learned masks, no layers, hidden or feed-forward sizes, and no training after it.",
        _divisors,
        _pruned,
    ),
)
