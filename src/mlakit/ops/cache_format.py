"""How a page of the cache holds its tokens: plain numbers, or a quantised latent and a 16-bit rope.

Plain pages are ``[num_blocks, P, 1, C + R]`` in ``bf16``, ``fp16``, ``fp32`` or ``fp64``. Quantised
pages are bytes, ``[num_blocks, P, 1, bytes_per_token]``; the latent's C values share one scale per
group and the R rope values stay bfloat16:

* ``fp8``: per token C e4m3 values, a float32 scale per group (128) and the rope part. With
  512 + 64 columns this is FlashMLA's 656-byte token.
* ``model1``: FlashMLA's MODEL1, e4m3 with groups of 64. A page holds every token's values and rope
  part first (576 bytes at 448 + 64), then every token's e8m0 scales (7, padded to 8). The page is
  padded to a multiple of a token's 576, so that one row stride reaches every token of every page.
* ``int8`` and ``int4``: as ``fp8``, with bfloat16 scales for groups of 128 and 64. A byte of int4
  holds value j in its low four bits and value ``j + ceil(C / 2)`` in its high ones, both plus 8.

The last group of a row may be shorter. Values and the token are padded to multiples of 4 bytes.
Scales are rounded up to what their dtype holds (fp8, model1: powers of two), so nothing saturates.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from mlakit.errors import UsageError

PLAIN = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


class _Codes(NamedTuple):
    """One way to quantise: bits per value, the largest code, and what is known of the scale."""

    bits: int
    largest: float
    group: int
    scale_dtype: torch.dtype
    scale_mantissa: int
    floor: float


QUANTISED = {
    "fp8": _Codes(8, 448.0, 128, torch.float32, 0, 1e-4),
    "model1": _Codes(8, 448.0, 64, torch.float8_e8m0fnu, 0, 1e-4),
    "int8": _Codes(8, 127.0, 128, torch.bfloat16, 7, 1e-20),
    "int4": _Codes(4, 7.0, 64, torch.bfloat16, 7, 1e-20),
}
"""e4m3 scales have FlashMLA's floor; the integers' only keeps a group of zeros from dividing."""


@dataclass(frozen=True)
class CacheFormat:
    """What one token of the cache is made of, and how to write and read it.

    Attributes:
        kind: a key of ``PLAIN`` or ``QUANTISED``.
        kv_lora_rank: C, the columns that are quantised.
        qk_rope_head_dim: R, the columns after them, 16-bit in every quantised kind. (FlashMLA's
            MODEL1 counts them to the value too: 448 + 64 here, ``head_dim_v`` 512 there.)
        group: values per scale; by default the kind's own, 0 in plain kinds.
        name: all of it in a word, as ``fp8:512+64/128``; see ``parse``. (A field, because compiled
            code may take the numbers for symbols, which have no text.)

    Raises:
        UsageError: if the kind is unknown or a number is out of range.
    """

    kind: str
    kv_lora_rank: int
    qk_rope_head_dim: int
    group: int = 0
    name: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in PLAIN and self.kind not in QUANTISED:
            raise UsageError(
                f"{self.kind!r} is no cache format",
                remedy=f"Use one of {', '.join([*PLAIN, *QUANTISED])}.",
            )
        if self.kv_lora_rank < 1 or self.qk_rope_head_dim < 0 or self.group < 0:
            raise UsageError(
                f"a cache of {self.kv_lora_rank} + {self.qk_rope_head_dim} columns in groups of "
                f"{self.group}; it needs at least 1 + 0, and a group of at least 1"
            )
        if self.kind in PLAIN and self.group:
            raise UsageError(f"a {self.kind} cache has no groups; leave group at 0")
        if self.kind in QUANTISED and not self.group:
            object.__setattr__(self, "group", QUANTISED[self.kind].group)
        name = f"{self.kind}:{self.kv_lora_rank}+{self.qk_rope_head_dim}/{self.group}"
        object.__setattr__(self, "name", name)

    @classmethod
    def parse(cls, name: str) -> CacheFormat:
        """The format of a ``name``."""
        kind, rank, rope, group = re.split("[:+/]", name)
        return cls(kind, int(rank), int(rope), int(group))

    @property
    def width(self) -> int:
        """Columns of a row, C + R."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor that ``allocate`` returns."""
        return PLAIN.get(self.kind, torch.uint8)

    @property
    def groups(self) -> int:
        """Scales per token; 0 in plain kinds."""
        return math.ceil(self.kv_lora_rank / self.group) if self.group else 0

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token, the padding at a page's end left out."""
        return sum(self.part_widths) * self.dtype.itemsize

    def bytes_per_page(self, block_size: int) -> int:
        """Bytes from one page of ``block_size`` tokens to the next."""
        size = block_size * self.bytes_per_token
        if self.kind != "model1":
            return size
        unit = math.lcm(*self.part_widths)
        return math.ceil(size / unit) * unit

    def allocate(
        self, num_blocks: int, block_size: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Pages ``[num_blocks, block_size, 1, C + R or bytes_per_token]``, not initialised."""
        row = sum(self.part_widths)
        stride = self.bytes_per_page(block_size) // self.dtype.itemsize
        memory = torch.empty(num_blocks, stride, dtype=self.dtype, device=device)
        return memory[:, : block_size * row].view(num_blocks, block_size, 1, row)

    def append(self, pages: Tensor, slots: Tensor, rows: Tensor) -> None:
        """Quantise rows and store them in place; nothing else in ``pages`` is written.

        Args:
            pages: as ``allocate`` returns them.
            slots: where each row goes, ``page * block_size + offset``, integers of any shape, no
                two the same; see ``slots_of``.
            rows: ``[*slots.shape, C + R]``, floating point.

        Raises:
            UsageError: if shapes or devices do not fit, or (seen on the CPU, in code that is not
                compiled) a slot is not in the cache.
        """
        self.check(pages)
        if rows.shape != (*slots.shape, self.width):
            raise UsageError(
                f"rows have shape {list(rows.shape)} for slots {list(slots.shape)}; they should "
                f"be {[*slots.shape, self.width]}"
            )
        if not pages.device == slots.device == rows.device:
            raise UsageError(
                f"the pages are on {pages.device}, slots on {slots.device} and rows on "
                f"{rows.device}; all should be on one device"
            )
        slots = slots.reshape(-1).long()
        room = pages.shape[0] * pages.shape[1]
        seen = slots.device.type == "cpu" and not torch.compiler.is_compiling()
        if seen and ((slots < 0) | (slots >= room)).any():
            raise UsageError(
                f"slots run from {int(slots.min())} to {int(slots.max())}; the cache has {room}",
                remedy="Leave out the tokens that are not to be stored.",
            )
        rows = rows.detach().reshape(-1, self.width)
        if self.kind in PLAIN and pages.is_contiguous():
            pages.view(-1, self.width).index_copy_(0, slots, rows.to(self.dtype))
            return
        encoded = self._encode(rows)
        where = (slots // max(1, pages.shape[1]), slots % max(1, pages.shape[1]))
        for part, values in zip(self._parts(pages), encoded):
            part.index_put_(where, values)

    def read(self, pages: Tensor, slots: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows ``[*slots.shape, C + R]`` of the cache as numbers; every slot must be in the cache.

        Args:
            pages: as ``allocate`` returns them.
            slots: ``page * block_size + offset``, integers of any shape.
            dtype: of the result.
        """
        if self.kind in PLAIN and pages.is_contiguous():
            return pages.view(-1, self.width)[slots].to(dtype)
        out = torch.empty(slots.numel(), self.width, dtype=dtype, device=pages.device)
        return self.read_into(out, pages, slots.reshape(-1)).view(*slots.shape, self.width)

    def read_into(self, out: Tensor, pages: Tensor, slots: Tensor) -> Tensor:
        """``read`` of ``slots [N]`` into ``out [N, C + R]``, which is also returned."""
        parts = [_take(part, slots.long()) for part in self._parts(pages)]
        if self.kind in PLAIN:
            return out.copy_(parts[0])
        codes, scales, rope = self._sections(parts)
        latent, factor = out[:, : self.kv_lora_rank], scales.to(out.dtype)
        if QUANTISED[self.kind].bits == 4:
            half = codes.shape[1]
            latent[:, :half].copy_(codes & 15)
            latent[:, half:].copy_((codes >> 4)[:, : latent.shape[1] - half])
            latent.sub_(8)
        elif self.kind == "int8":
            latent.copy_(codes.view(torch.int8))
        else:
            latent.copy_(_e4m3_as_float16(codes))
            factor.mul_(256)
        full = self.kv_lora_rank // self.group
        if full:
            whole = latent[:, : full * self.group].unflatten(1, (full, self.group))
            whole.mul_(factor[:, :full, None])
        latent[:, full * self.group :].mul_(factor[:, full:])
        out[:, self.kv_lora_rank :].copy_(rope)
        return out

    def check(self, pages: Tensor, name: str = "k_cache") -> None:
        """Refuse a tensor that is not pages of this format, with a message that says why."""
        row = sum(self.part_widths)
        if pages.dim() != 4 or pages.shape[2:] != (1, row):
            raise UsageError(
                f"{name} has shape {list(pages.shape)}; {self.kind} pages of "
                f"{self.kv_lora_rank} + {self.qk_rope_head_dim} columns should be "
                f"[num_blocks, P, 1, {row}]"
            )
        plain = self.kind in PLAIN
        if (pages.dtype != self.dtype) if plain else (pages.element_size() != 1):
            raise UsageError(
                f"{name} is {pages.dtype}; {self.kind} pages are "
                f"{self.dtype if plain else 'bytes: uint8, int8 or float8_e4m3fn'}"
            )
        strides = pages.stride()
        together = self.kind != "model1" or strides[1] == row
        if pages.numel() and (strides[3] != 1 or not together):
            raise UsageError(
                f"{name} has strides {list(strides)}; a {self.kind} token is contiguous"
                + ("" if together else " and follows the one before it")
            )

    @property
    def part_widths(self) -> tuple[int, ...]:
        """Elements per token in each of a page's parts: one, but two in model1."""
        if self.kind in PLAIN:
            return (self.width,)
        rope = 2 * self.qk_rope_head_dim
        if self.kind == "model1":
            return _align(self.code_bytes + rope, 4), _align(self.groups, 8)
        scales = QUANTISED[self.kind].scale_dtype.itemsize * self.groups
        return (_align(self.code_bytes + scales + rope, 4),)

    @property
    def code_bytes(self) -> int:
        """Bytes of a token's quantised values, padding included; of quantised kinds only."""
        return _align(math.ceil(self.kv_lora_rank * QUANTISED[self.kind].bits / 8), 4)

    def _parts(self, pages: Tensor) -> list[Tensor]:
        """Views ``[num_blocks, P, width]`` of the parts of every page."""
        blocks, block_size, _, row = pages.shape
        if self.kind in PLAIN:
            return [pages[:, :, 0]]
        if self.kind != "model1":
            return [pages.view(torch.uint8)[:, :, 0]]
        flat = pages.view(torch.uint8).view(blocks, block_size * row)
        values, scales = self.part_widths
        return [
            flat[:, : block_size * values].view(blocks, block_size, values),
            flat[:, block_size * values :].view(blocks, block_size, scales),
        ]

    def _sections(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Typed views of byte rows: codes ``[N, ...]``, scales ``[N, groups]``, rope ``[N, R]``."""
        how = QUANTISED[self.kind]
        codes = parts[0][:, : math.ceil(self.kv_lora_rank * how.bits / 8)]
        rope_at, scale_at = self.code_bytes, 0
        size = how.scale_dtype.itemsize * self.groups
        if self.kind != "model1":
            rope_at, scale_at = rope_at + size, rope_at
        scales = parts[-1][:, scale_at : scale_at + size].view(how.scale_dtype)
        rope = parts[0][:, rope_at : rope_at + 2 * self.qk_rope_head_dim].view(torch.bfloat16)
        return codes, scales, rope

    def _encode(self, rows: Tensor) -> list[Tensor]:
        """The parts of each of ``rows [N, C + R]``, ``[N, width]``; padding is zero."""
        if self.kind in PLAIN:
            return [rows.to(self.dtype)]
        how = QUANTISED[self.kind]
        parts = [rows.new_zeros(len(rows), size, dtype=torch.uint8) for size in self.part_widths]
        codes, scales, rope = self._sections(parts)
        latent = rows[:, : self.kv_lora_rank].float()
        short = self.groups * self.group - self.kv_lora_rank
        latent = torch.nn.functional.pad(latent, (0, short)).unflatten(1, (self.groups, self.group))
        scale = _round_up((latent.abs().amax(2) / how.largest).clamp_min(how.floor), how)
        latent = (latent / scale[:, :, None]).flatten(1)[:, : self.kv_lora_rank]
        scales.copy_(scale)
        rope.copy_(rows[:, self.kv_lora_rank :])
        if how.bits == 4:
            nibbles = latent.round().add(8).to(torch.uint8)
            half = codes.shape[1]
            codes.copy_(nibbles[:, :half])
            codes[:, : self.kv_lora_rank - half].bitwise_or_(nibbles[:, half:] << 4)
        elif self.kind == "int8":
            codes.view(torch.int8).copy_(latent.round())
        else:
            codes.view(torch.float8_e4m3fn).copy_(latent)
        return parts


def plain_format(pages: Tensor, kv_lora_rank: int) -> CacheFormat:
    """The format of pages ``[num_blocks, P, 1, C + R]`` that hold plain numbers.

    Raises:
        UsageError: if their dtype is none of ``PLAIN``, or the rank none that such rows can have.
    """
    kinds = {dtype: kind for kind, dtype in PLAIN.items()}
    if pages.dim() != 4 or pages.dtype not in kinds:
        raise UsageError(
            f"k_cache is {pages.dtype} of shape {list(pages.shape)}; it should be [num_blocks, P, "
            "1, row] of bfloat16, float16, float32 or float64",
            remedy="Name the cache_format of a quantised cache.",
        )
    row = pages.shape[3]
    if not 1 <= kv_lora_rank <= row:
        raise UsageError(f"kv_lora_rank is {kv_lora_rank}; a cache row of {row} allows 1 to {row}")
    return CacheFormat(kinds[pages.dtype], kv_lora_rank, row - kv_lora_rank)


def slots_of(block_table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Where tokens lie in a paged cache: ``page * block_size + offset``, int64 ``[B, S]``.

    Args:
        block_table: page numbers ``[B, max_blocks]``.
        positions: place of each token in its sequence ``[B, S]``, from 0; negative ones give -1.
        block_size: tokens per page.
    """
    at = positions.long().clamp_min(0)
    slots = block_table.long().gather(1, at // block_size) * block_size + at % block_size
    return slots.masked_fill(positions < 0, -1)


def _take(part: Tensor, slots: Tensor) -> Tensor:
    """Rows of ``part [num_blocks, P, width]``, ``[N, width]``."""
    blocks, block_size, width = part.shape
    page, offset = slots // max(1, block_size), slots % max(1, block_size)
    rows_apart, rest = divmod(part.stride(0), max(1, part.stride(1)))
    if rest or not part.numel() or not part.stride(1):  # 0: one token expanded to all of a page
        return part[page, offset]
    # One row stride reaches every page: copying whole rows is ten times faster than indexing.
    reach = (blocks - 1) * rows_apart + block_size
    rows = part.as_strided((reach, width), (part.stride(1), 1))
    return rows.index_select(0, page * rows_apart + offset)


def _e4m3_as_float16(codes: Tensor) -> Tensor:
    """e4m3 bytes as float16 numbers 256 times too small, exactly.

    Sign, exponent and mantissa move to their places in float16, subnormals included; the exponent's
    bias is 8 short. torch's own conversion takes ten times as long on a CPU. The NaN code reads as
    480: a group with a NaN in it has a scale that is not finite, so it does not pass for a number.
    """
    wide = codes.view(torch.int8).to(torch.int16)
    return wide.bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16)


def _round_up(scale: Tensor, how: _Codes) -> Tensor:
    """Positive float32 numbers, rounded up to the mantissa bits of the scale's dtype.

    NaN becomes infinity, and so makes the whole group NaN when it is read.
    """
    below = (1 << (23 - how.scale_mantissa)) - 1
    bits = scale.masked_fill(scale.isnan(), math.inf).view(torch.int32)
    return ((bits + below) & ~below).view(torch.float32)


def _align(size: int, unit: int) -> int:
    return math.ceil(size / unit) * unit
