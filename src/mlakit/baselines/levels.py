"""Levels at uneven distances: KVQuant's fit the model, TurboQuant's a normal distribution."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import Cache

from mlakit.baselines.bits import bit_settings, fixed, pack_bits, unpack_bits
from mlakit.baselines.method import Bench, Method, Variant
from mlakit.baselines.prefix import Prefix, PrefixLayer, Rotation, read_prefix

OUTLIERS = 0.01
"""Share of KVQuant's numbers that are stored as they are."""

FIRST = 1
"""First tokens that KVQuant keeps exact."""

ROUNDS = 30


def fit_levels(samples: Tensor, bits: int) -> Tensor:
    """The ``2^bits`` levels with the least mean square error: Lloyd's algorithm in one dimension.

    Args:
        samples: numbers ``[n]``, in float32 or float64.
        bits: per number.

    Returns:
        Levels ``[2^bits]``, ascending.

    Source: Lloyd, Least squares quantization in PCM, 1982.
    """
    ordered = samples.sort().values
    count = 2**bits
    places = (torch.arange(count, device=samples.device) + 0.5) / count * len(ordered)
    levels = ordered[places.long()]
    sums = torch.nn.functional.pad(ordered.double().cumsum(0), (1, 0))
    for _ in range(ROUNDS):
        edges = torch.searchsorted(ordered, (levels[1:] + levels[:-1]) / 2)
        ends = torch.nn.functional.pad(edges, (1, 1))
        ends[-1] = len(ordered)
        members = ends.diff()
        means = (sums[ends[1:]] - sums[ends[:-1]]) / members.clamp_min(1)
        levels = torch.where(members > 0, means.to(levels.dtype), levels)
    return levels


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """Index of the nearest level to each number, int64."""
    return torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2)


@dataclass
class Levelled:
    """Numbers as indices into levels, but for outliers.

    Attributes:
        codes: packed indices.
        centre: float16, broadcast over the numbers; likewise ``width``.
        places: int32, of the outliers in the flat tensor; ``outliers``: float16.
        levels: of the model, not of a token: not counted with the cache.
    """

    codes: Tensor
    centre: Tensor
    width: Tensor
    places: Tensor
    outliers: Tensor
    levels: list[float]
    bits: int
    shape: torch.Size

    @classmethod
    def of(
        cls, x: Tensor, levels: Tensor, centre: Tensor, width: Tensor, bits: int, share: float
    ) -> Levelled:
        """Rounds ``(x - centre) / width`` to levels; the farthest ``share`` of x stays as it is."""
        normal = (x.float() - centre.float()) / width.float()
        places = normal.abs().flatten().topk(int(share * x.numel())).indices.sort().values
        codes = pack_bits(nearest(normal, levels), bits)
        outliers = x.flatten()[places].half()
        return cls(codes, centre, width, places.int(), outliers, levels.tolist(), bits, x.shape)

    def read(self) -> Tensor:
        """The numbers again, float32."""
        codes = unpack_bits(self.codes, self.bits, self.shape.numel()).view(self.shape)
        levels = torch.tensor(self.levels, device=codes.device)
        x = levels[codes.long()] * self.width.float() + self.centre.float()
        x.view(-1)[self.places.long()] = self.outliers.float()
        return x


def centre_and_width(x: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Middle and half range of the last axis without its outliers, float16 ``[..., 1]``."""
    ordered = x.float().sort(-1).values  # torch.quantile takes no more than 2^24 numbers
    low, high = (_between(ordered, place) for place in (share / 2, 1 - share / 2))
    return ((high + low) / 2).half(), ((high - low) / 2).clamp_min(1e-4).half()


def _between(ordered: Tensor, share: float) -> Tensor:
    """The quantile of sorted numbers along the last axis, ``[..., 1]``."""
    place = share * (ordered.shape[-1] - 1)
    first = min(int(place), max(ordered.shape[-1] - 2, 0))
    pair = ordered[..., first : first + 2]
    return torch.lerp(pair[..., :1], pair[..., -1:], place - first)


@dataclass(frozen=True)
class LevelPlan:
    """What KVQuant knows of one layer before it sees a text.

    Attributes:
        centre: of each key channel before rotation ``[1, G, 1, d]``; likewise ``width``.
        key_levels: ``[2^bits]``; likewise ``value_levels``.
    """

    centre: Tensor
    width: Tensor
    key_levels: Tensor
    value_levels: Tensor


class LevelLayer(PrefixLayer):
    """KVQuant: keys before rotation by channel, values by token; outliers and first token exact."""

    def __init__(
        self, keys: Tensor, values: Tensor, plan: LevelPlan, rotation: Rotation, bits: int
    ) -> None:
        """Rounds a prefix ``[1, G, P, d]``."""
        length = keys.shape[2]
        super().__init__(keys[..., length:, :], values[..., length:, :], seen=length, held=length)
        self.first = keys[..., :FIRST, :].clone(), values[..., :FIRST, :].clone()
        self.model_parts = lambda: rotation  # one for all tokens
        unturned = rotation.turn_back(keys.float())[..., FIRST:, :]
        rows = values[..., FIRST:, :].float()
        middle, spread = centre_and_width(rows, OUTLIERS)
        self.packed = (
            Levelled.of(unturned, plan.key_levels, plan.centre, plan.width, bits, OUTLIERS),
            Levelled.of(rows, plan.value_levels, middle, spread, bits, OUTLIERS),
        )

    def unpack(self) -> tuple[Tensor, Tensor]:
        """Keys, rotated, and values of the prefix."""
        keys, values = (part.read() for part in self.packed)
        pad = torch.nn.functional.pad(keys, (0, 0, FIRST, 0))
        turned = self.model_parts().turn(pad)[..., FIRST:, :].to(self.dtype)
        return (
            torch.cat([self.first[0], turned], -2),
            torch.cat([self.first[1], values.to(self.dtype)], -2),
        )


def plan_levels(bench: Bench, rotation: Rotation, bits: int) -> list[LevelPlan]:
    """Reads the calibration text and fits every layer's levels."""
    model = bench.source.model
    keys: dict[int, list[Tensor]] = {}
    values: dict[int, list[Tensor]] = {}
    for ids in bench.calibration_ids:
        for layer, (k, v) in enumerate(read_prefix(model, ids, max_length=len(ids)).layers):
            keys.setdefault(layer, []).append(rotation.turn_back(k.float())[..., FIRST:, :])
            values.setdefault(layer, []).append(v.float()[..., FIRST:, :])
    plans = []
    for layer in keys:
        k, v = torch.cat(keys[layer], 2), torch.cat(values[layer], 2)
        centre, width = (x.mT for x in centre_and_width(k.mT, OUTLIERS))
        middle, spread = centre_and_width(v, OUTLIERS)
        fitted = [
            fit_levels(_inner((x - c.float()) / w.float()), bits)
            for x, c, w in ((k, centre, width), (v, middle, spread))
        ]
        plans.append(LevelPlan(centre, width, fitted[0], fitted[1]))
    return plans


def _inner(normal: Tensor) -> Tensor:
    """Numbers that are no outliers, flat."""
    flat = normal.flatten()
    return flat[flat.abs() <= 1.0]


def _kvquant(bench: Bench, bits: float) -> Variant:
    rotation = Rotation(bench.source.model, bench.spec)
    plans = plan_levels(bench, rotation, int(bits))

    def pack(layer: int, keys: Tensor, values: Tensor) -> LevelLayer:
        return LevelLayer(keys, values, plans[layer], rotation, int(bits))

    return Variant(
        bench.source.model,
        lambda prefix: prefix.each(pack),
        calibration_tokens=bench.calibration_ids.numel(),
    )


def random_rotation(dim: int, seed: int) -> Tensor:
    """An orthogonal matrix ``[d, d]``, float32, the same for the same seed."""
    noise = torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(noise.double())
    return (q * r.diagonal().sign()).float()


def bell_levels(bits: int) -> Tensor:
    """Lloyd's levels for a standard normal distribution, float32."""
    quantiles = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
    return fit_levels(torch.special.ndtri(quantiles), bits).float()


class RotatedLayer(PrefixLayer):
    """TurboQuant: each vector's norm in float16, its direction rotated at random and levelled."""

    def __init__(
        self, keys: Tensor, values: Tensor, matrix: Tensor, levels: Tensor, bits: int
    ) -> None:
        """Rounds a prefix ``[1, G, P, d]``; ``matrix`` is ``[d, d]``, orthogonal."""
        length, dim = keys.shape[2:]
        super().__init__(keys[..., length:, :], values[..., length:, :], seen=length, held=length)
        self.bits, self.shape = bits, keys.shape
        self.model_parts = lambda: (matrix, levels)  # one for all layers and tokens
        self.norms, self.codes = [], []
        for x in (keys, values):
            norm = x.float().norm(dim=-1, keepdim=True).clamp_min(1e-6).half()
            turned = x.float() / norm.float() @ matrix * dim**0.5
            self.norms.append(norm)
            self.codes.append(pack_bits(nearest(turned, levels), bits))

    def unpack(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the prefix."""
        matrix, levels = self.model_parts()
        found = []
        for norm, packed in zip(self.norms, self.codes, strict=True):
            codes = unpack_bits(packed, self.bits, self.shape.numel()).view(self.shape)
            turned = levels[codes.long()] * self.shape[-1] ** -0.5
            found.append((turned @ matrix.mT * norm.float()).to(self.dtype))
        return found[0], found[1]


def turbo(bits: int, seed: int, prefix: Prefix) -> Cache:
    """A cache of RotatedLayers."""
    keys = prefix.layers[0][0]
    matrix = random_rotation(keys.shape[-1], seed).to(keys.device)
    levels = bell_levels(bits).to(keys.device)
    return prefix.each(lambda _, k, v: RotatedLayer(k, v, matrix, levels, bits))


METHODS = (
    Method(
        "kvquant",
        "KVQuant",
        "bits",
        "arXiv 2401.18079",
        f"Levels are fitted by plain error, without the gradients that weigh it; {OUTLIERS:.0%} of "
        f"the numbers and the first {FIRST} token stay exact.",
        partial(fixed, bit_settings(4, 3, 2)),
        _kvquant,
    ),
    Method(
        "turboquant",
        "TurboQuant",
        "bits",
        "arXiv 2504.19874",
        "The variant for least square error, without the extra bit that corrects inner products; "
        "levels are those of a normal distribution.",
        partial(fixed, bit_settings(4, 3, 2)),
        lambda bench, bits: Variant(bench.source.model, partial(turbo, int(bits), bench.seed)),
    ),
)
