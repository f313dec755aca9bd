"""Fewer dimensions: a low-rank latent per layer with the rotation kept, and CLOVER's values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlakit.baselines.method import Bench, Method, Setting, Variant, by_share
from mlakit.baselines.prefix import PrefixLayer, Rotation, read_prefix
from mlakit.baselines.weights import attentions
from mlakit.spec import ModelSpec


def principal(moment: Tensor, rank: int) -> Tensor:
    """The ``rank`` directions ``[n, rank]`` that hold most of a second moment ``[n, n]``."""
    return torch.linalg.eigh(moment.double()).eigenvectors.flip(1)[:, :rank].float()


def merged(x: Tensor) -> Tensor:
    """Heads side by side: ``[1, G, P, d]`` to ``[P, G d]``, float32."""
    return x[0].transpose(0, 1).flatten(1).float()


class LowRankLayer(PrefixLayer):
    """One latent of all keys before their rotation, one of all values."""

    def __init__(
        self, keys: Tensor, values: Tensor, bases: tuple[Tensor, Tensor], rotation: Rotation
    ) -> None:
        """Projects a prefix ``[1, G, P, d]`` on bases ``[G d, rank]`` of keys and values."""
        length = keys.shape[2]
        super().__init__(keys[..., length:, :], values[..., length:, :], seen=length, held=length)
        self.model_parts = lambda: (bases, rotation)  # one for all tokens
        self.groups = keys.shape[1]
        rows = merged(rotation.turn_back(keys.float())), merged(values)
        self.latents = [(x @ basis).to(keys.dtype) for x, basis in zip(rows, bases, strict=True)]

    def unpack(self) -> tuple[Tensor, Tensor]:
        """Keys, rotated, and values of the prefix."""
        bases, rotation = self.model_parts()
        keys, values = (
            (latent.float() @ basis.mT).unflatten(1, (self.groups, -1)).transpose(0, 1)[None]
            for latent, basis in zip(self.latents, bases, strict=True)
        )
        return rotation.turn(keys).to(self.dtype), values.to(self.dtype)


def _palu(bench: Bench, share: float) -> Variant:
    model, width = bench.source.model, bench.layer.cache_width // 2
    rotation = Rotation(model, bench.spec)
    rank = max(1, int(share * width + 1e-9))
    moments = [
        [torch.zeros(width, width, dtype=torch.float64) for _ in "kv"] for _ in bench.spec.layers
    ]
    for ids in bench.calibration_ids:
        for sums, (k, v) in zip(moments, read_prefix(model, ids, max_length=len(ids)).layers):
            for total, x in zip(sums, (merged(rotation.turn_back(k.float())), merged(v))):
                total += (x.mT @ x).double().cpu()
    bases = [tuple(principal(m, rank).to(model.device) for m in pair) for pair in moments]
    return Variant(
        model,
        lambda prefix: prefix.each(
            lambda layer, keys, values: LowRankLayer(keys, values, bases[layer], rotation)  # type: ignore[arg-type]
        ),
        calibration_tokens=bench.calibration_ids.numel(),
    )


class ThinValuesLayer(PrefixLayer):
    """Keys as they are, fewer numbers per value."""

    def __init__(self, keys: Tensor, values: Tensor, pair: tuple[Tensor, Tensor]) -> None:
        """Takes values ``[1, G, P, d]`` down and, when read, up: ``[G, d, r]``, ``[G, r, d]``."""
        length = keys.shape[2]
        super().__init__(keys[..., length:, :], values[..., length:, :], seen=length, held=length)
        self.model_parts = lambda: pair  # one for all tokens
        self.kept_keys = keys.clone()
        self.thin = (values.float() @ pair[0]).to(values.dtype)

    def unpack(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the prefix."""
        return self.kept_keys, (self.thin.float() @ self.model_parts()[1]).to(self.dtype)


def value_pair(values: Tensor, outputs: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """What makes ``W_O W_V`` its own best approximation of a rank, per key/value head.

    With U the left singular vectors of ``O V`` (outputs of the head's group stacked in O), the
    best is ``U_r U_r^T O V = O (O^+ U_r) (U_r^T O) V``: values go down by ``U_r^T O`` and up by
    ``O^+ U_r``.

    Args:
        values: ``[G, d, D]``.
        outputs: ``[G, n, d]``, the rows of the group's output projections.
        rank: r.

    Returns:
        What multiplies a row of values to go down ``[G, d, r]``, and up ``[G, r, d]``.
    """
    outputs = outputs.double()
    left, sizes, _ = torch.linalg.svd(values.double(), full_matrices=False)
    scaled = outputs @ left * sizes[:, None]  # O V without its right factor, which is orthogonal
    kept = torch.linalg.svd(scaled, full_matrices=False).U[..., :rank]
    return (outputs.mT @ kept).float(), (torch.linalg.pinv(outputs) @ kept).mT.float()


def _clover(bench: Bench, share: float) -> Variant:
    layer = bench.layer
    groups, dim = layer.num_key_value_heads, layer.value_dim
    rank = int((2 * share - 1) * dim + 1e-9)
    pairs = []
    for attention in attentions(bench.source.model):
        values = attention.v_proj.weight.detach().float().unflatten(0, (groups, dim))
        outputs = attention.o_proj.weight.detach().float().unflatten(1, (groups, -1, dim))
        pairs.append(value_pair(values, outputs.permute(1, 2, 0, 3).flatten(1, 2), rank))
    return Variant(
        bench.source.model,
        lambda prefix: prefix.each(
            lambda index, keys, values: ThinValuesLayer(keys, values, pairs[index])
        ),
    )


def _value_settings(spec: ModelSpec, budgets: Sequence[float]) -> list[Setting]:
    dim = spec.layers[0].value_dim
    return [
        Setting(f"values {dim} to {part}", (1 + part / dim) / 2)
        for part in (dim // 2, dim // 4)
        if part
    ]


METHODS = (
    Method(
        "low-rank",
        "low rank, RoPE kept",
        "dimensions",
        "Palu, arXiv 2407.21118",
        "The prefix is read exactly and projected afterwards, where the original computes with its "
        "factors from the first token; one rank for all layers, from calibrated keys and values.",
        by_share,
        _palu,
    ),
    Method(
        "clover",
        "CLOVER, values",
        "dimensions",
        "arXiv 2411.17426",
        "Values alone, pruned by the SVD of each value and output pair; keys stay, because their "
        "rotation does not commute with the pairs, and nothing is fine-tuned.",
        _value_settings,
        _clover,
    ),
)
