"""Fewer bits for every cached number: fp8, int8 and int4 by token, and KIVI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import Cache

from mlakit.baselines.method import Bench, Method, Setting, Variant
from mlakit.baselines.prefix import Prefix, PrefixLayer
from mlakit.spec import ModelSpec

GROUP = 32
"""Numbers that share a scale in KIVI: tokens for keys, channels for values."""

RESIDUAL = 32
"""Newest tokens that KIVI keeps exact; 128 as published, of prompts of many thousands."""


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes below ``2^bits`` as bytes, eight of them in ``bits`` bytes, one after another.

    Args:
        codes: integers, any shape.
        bits: 1 to 8.

    Returns:
        uint8 ``[bytes]``.
    """
    flat = codes.flatten().to(torch.uint8)
    if bits == 8:
        return flat.clone()
    eights = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8).long()
    words = (eights << _places(bits, flat.device)).sum(1)
    return words.view(torch.uint8).view(-1, 8)[:, :bits].flatten()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes of ``pack_bits``, uint8."""
    if bits == 8:
        return packed[:count]
    padded = torch.nn.functional.pad(packed.view(-1, bits), (0, 8 - bits))
    codes = padded.view(torch.int64) >> _places(bits, packed.device) & (2**bits - 1)
    return codes.flatten()[:count].to(torch.uint8)


def _places(bits: int, device: torch.device) -> Tensor:
    """Where the eight codes of a little-endian word begin."""
    return torch.arange(8, device=device) * bits


@dataclass
class Integers:
    """Numbers in groups along the last axis, each as ``low + step * code``.

    Attributes:
        codes: packed, see ``pack_bits``.
        low: float16, one number per group; likewise ``step``.
    """

    codes: Tensor
    low: Tensor
    step: Tensor
    bits: int
    shape: torch.Size

    @classmethod
    def of(cls, x: Tensor, bits: int, group: int) -> Integers:
        """Rounds ``[..., n]``, in groups of ``group`` of the last axis, to ``2^bits`` levels."""
        parts = x.float().unflatten(-1, (-1, group))
        low = parts.amin(-1, keepdim=True).half()
        step = ((parts.amax(-1, keepdim=True) - low.float()) / (2**bits - 1)).half()
        step = torch.where(step == 0, torch.ones_like(step), step)
        codes = ((parts - low.float()) / step.float()).round().clamp(0, 2**bits - 1)
        return cls(pack_bits(codes, bits), low, step, bits, x.shape)

    def read(self, dtype: torch.dtype) -> Tensor:
        """The numbers again."""
        codes = unpack_bits(self.codes, self.bits, self.shape.numel())
        parts = codes.view(*self.low.shape[:-1], -1).float()
        return (self.low.float() + self.step.float() * parts).view(self.shape).to(dtype)


class IntegerLayer(PrefixLayer):
    """Keys and values as integers; keys share scales by token or, over tokens, by channel."""

    def __init__(
        self, keys: Tensor, values: Tensor, *, bits: int, by_channel: bool, residual: int
    ) -> None:
        """Rounds a prefix ``[1, G, P, d]``.

        Args:
            keys: keys, rotated.
            values: values.
            bits: per number.
            by_channel: KIVI's keys: a channel shares its scale over GROUP tokens.
            residual: newest tokens that stay exact; where keys go by channel, more if what is
                older is no whole number of groups.
        """
        length, dim = keys.shape[2:]
        cut = max(0, length - residual)
        if by_channel:
            cut -= cut % GROUP
        super().__init__(keys[..., cut:, :], values[..., cut:, :], seen=cut, held=cut)
        self.packed: tuple[Integers, Integers] | None = None
        if cut == 0:
            return
        old = keys[..., :cut, :]
        rows = old.mT.contiguous() if by_channel else old
        channels = GROUP if by_channel and dim % GROUP == 0 else dim
        self.by_channel = by_channel
        self.packed = (
            Integers.of(rows, bits, GROUP if by_channel else dim),
            Integers.of(values[..., :cut, :], bits, channels),
        )

    def unpack(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the older tokens."""
        if self.packed is None:
            return super().unpack()
        keys, values = (part.read(self.dtype) for part in self.packed)
        return keys.mT if self.by_channel else keys, values


class Float8Layer(PrefixLayer):
    """Keys and values in float8 e4m3, with one float32 scale per head."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """Rounds a prefix ``[1, G, P, d]``."""
        length = keys.shape[2]
        super().__init__(keys[..., length:, :], values[..., length:, :], seen=length, held=length)
        self.key_codes, self.key_scale = self._rounded(keys)
        self.value_codes, self.value_scale = self._rounded(values)

    @staticmethod
    def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
        largest = torch.finfo(torch.float8_e4m3fn).max
        scale = x.float().abs().amax((2, 3), keepdim=True).clamp_min(1e-12) / largest
        return (x.float() / scale).to(torch.float8_e4m3fn), scale

    def unpack(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the prefix."""
        keys = (self.key_codes.float() * self.key_scale).to(self.dtype)
        return keys, (self.value_codes.float() * self.value_scale).to(self.dtype)


def round_integers(bits: int, by_channel: bool, residual: int, prefix: Prefix) -> Cache:
    """A cache of IntegerLayers."""
    return prefix.each(
        lambda _, keys, values: IntegerLayer(
            keys, values, bits=bits, by_channel=by_channel, residual=residual
        )
    )


def round_float8(prefix: Prefix) -> Cache:
    """A cache of Float8Layers."""
    return prefix.each(lambda _, keys, values: Float8Layer(keys, values))


def bit_settings(*choices: int) -> list[Setting]:
    """Settings by bits per number."""
    return [Setting(f"{bits} bits", bits) for bits in choices]


def _integers(bench: Bench, bits: float) -> Variant:
    return Variant(bench.source.model, partial(round_integers, int(bits), False, 0))


def _kivi(bench: Bench, bits: float) -> Variant:
    return Variant(bench.source.model, partial(round_integers, int(bits), True, RESIDUAL))


def _float8(bench: Bench, bits: float) -> Variant:
    return Variant(bench.source.model, round_float8)


def fixed(settings: list[Setting], spec: ModelSpec, budgets: Sequence[float]) -> list[Setting]:
    """These settings, whatever the model and the budgets."""
    return settings


METHODS = (
    Method(
        "fp8",
        "fp8",
        "bits",
        "float8 e4m3, as engines offer it",
        "One scale per head and layer, taken from the prefix itself; engines take 1 or a "
        "calibrated one.",
        partial(fixed, bit_settings(8)),
        _float8,
    ),
    Method(
        "int",
        "integers by token",
        "bits",
        "per-token rounding, as in common cache classes",
        "Every token and head has its own scale and offset, in float16; nothing is kept exact.",
        partial(fixed, bit_settings(8, 4)),
        _integers,
    ),
    Method(
        "kivi",
        "KIVI",
        "bits",
        "arXiv 2402.02750",
        f"The newest {RESIDUAL} tokens stay exact, 128 as published; the prefix is rounded once, "
        "after it was read exactly.",
        partial(fixed, bit_settings(4, 2)),
        _kivi,
    ),
)
