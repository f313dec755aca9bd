"""Reading cache rows inside a kernel: where a token lies, and its columns in any cache format.

A row has two sections, the latent and the rope part. In plain pages both are numbers in q's dtype
side by side; in quantised ones the latent is codes with a scale per group, the rope part bfloat16
(``cache_format`` says what lies where). What is read is rounded once, to q's dtype, as FlashMLA
does: code times scale is exact in bfloat16 for e4m3 and a power of two, not for the integers.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True)
class Layout:
    """What a kernel has built in about a cache.

    Attributes:
        kind: ``plain``, or a kind of ``cache_format.QUANTISED``.
        page: tokens per page.
        row: columns of a row, C + R.
        latent: columns of its first section, C; in plain pages those of the value.
        token_stride: elements (bytes of quantised pages) from one token to the next; built in, it
            saves the registers of as many addresses as a thread loads rows.
        unit: all strides are multiples of so many elements, and are passed divided by it, so that
            the compiler knows how loads are aligned.
        group: latent columns per scale.
        scale_at: byte of a token's first scale; with ``scale_stride``, of a page's first one.
        scale_stride: bytes from one token's scales to the next's at a page's end; 0 where every
            token has its own beside it.
        rope_at: byte of a token's rope part.
    """

    kind: str
    page: int
    row: int
    latent: int
    token_stride: int
    unit: int
    group: int = 0
    scale_at: int = 0
    scale_stride: int = 0
    rope_at: int = 0


@triton.jit
def look_up(
    table,
    block,
    stop,
    room,
    TOKENS: tl.constexpr,
    LAYOUT: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """What the table says of a block: its page, its tokens' pages if it spans some, or slots.

    Nothing is read at ``stop`` and after. Slots outside of the cache, and those not read, are -1.
    """
    if SLOTS:
        place = block * TOKENS + tl.arange(0, TOKENS)
        found = tl.load(table + place, mask=place < stop, other=-1)
        found = tl.where(found < room, found, -1)
    elif LAYOUT.page % TOKENS == 0:
        place = block * TOKENS
        found = tl.load(table + place // LAYOUT.page, mask=place < stop, other=0)
    else:
        place = block * TOKENS + tl.arange(0, TOKENS)
        found = tl.load(table + place // LAYOUT.page, mask=place < stop, other=0)
    return found


@triton.jit
def locate(
    cache,
    found,
    block,
    page_stride,
    TOKENS: tl.constexpr,
    LAYOUT: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Pointers to the pages of a block's tokens, one or ``[TOKENS, 1]``, and places in them."""
    lane = tl.arange(0, TOKENS)[:, None]
    if SLOTS:
        slot = tl.maximum(found, 0)[:, None]
        page, inner = slot // LAYOUT.page, slot % LAYOUT.page
    elif LAYOUT.page % TOKENS == 0:
        page, inner = found, block * TOKENS % LAYOUT.page + lane
    else:
        page, inner = found[:, None], (block * TOKENS + lane) % LAYOUT.page
    if LAYOUT.page * LAYOUT.token_stride >= 2**31:
        inner = inner.to(tl.int64)
    return cache + page.to(tl.int64) * page_stride * LAYOUT.unit, inner


@triton.jit
def latent(
    pages,
    inner,
    stored,
    start,
    COLUMNS: tl.constexpr,
    LAYOUT: tl.constexpr,
    dtype: tl.constexpr,
):
    """Columns from ``start`` on of the latent section, ``[TOKENS, COLUMNS]``; 0 beyond it.

    ``start`` is a multiple of COLUMNS. Tokens that are not ``stored [TOKENS, 1]`` are not read.
    """
    column = start + tl.arange(0, COLUMNS)[None, :]
    keep = stored & (column < LAYOUT.latent)
    rows = pages + inner * LAYOUT.token_stride
    if LAYOUT.kind == "plain":
        value = tl.load(rows + column, mask=keep, other=0.0)
    else:
        half: tl.constexpr = (LAYOUT.latent + 1) // 2
        place = column % half if LAYOUT.kind == "int4" else column
        # The select changes nothing, but Triton does not load ahead what only goes through
        # arithmetic without another tensor.
        zero: tl.constexpr = 0x88 if LAYOUT.kind == "int4" else 0
        codes = tl.where(stored, tl.load(rows + place, mask=keep, other=zero), zero)
        if LAYOUT.kind == "int4":
            value = _small_float((codes >> ((column >= half) * 4).to(tl.uint8)) & 15) - 8.0
        elif LAYOUT.kind == "int8":
            value = _small_float(codes ^ 128) - 128.0
        else:
            # Sign, exponent and mantissa of e4m3 move to their places in float16, whose exponent
            # has a bias 8 larger: a number 256 times too small, exactly, on any GPU.
            bits = (codes.to(tl.int8, bitcast=True).to(tl.int16) << 7) & -0x4001
            value = bits.to(tl.float16, bitcast=True).to(tl.float32)
        # One load a group where groups are aligned, and one a column where they are not.
        aligned: tl.constexpr = LAYOUT.group & (LAYOUT.group - 1) == 0
        groups: tl.constexpr = max(1, COLUMNS // LAYOUT.group) if aligned else COLUMNS
        shape: tl.constexpr = [stored.shape[0], COLUMNS]
        split: tl.constexpr = [stored.shape[0], groups, COLUMNS // groups]
        if aligned:
            group = start // LAYOUT.group + tl.arange(0, groups)[None, :]
        else:
            group = column // LAYOUT.group
        scale = _scale(pages, rows, inner, group, stored, LAYOUT)
        value *= tl.reshape(tl.broadcast_to(scale[:, :, None], split), shape)
    return value.to(dtype)


@triton.jit
def _scale(pages, rows, inner, group, stored, LAYOUT: tl.constexpr):
    """Scales of groups ``[1, n]``, float32 ``[TOKENS, n]``."""
    keep = stored & (group * LAYOUT.group < LAYOUT.latent)
    if LAYOUT.kind == "model1":  # e8m0: a float32's exponent (2^-127, its code 0, reads as 0)
        at = pages + LAYOUT.scale_at + inner * LAYOUT.scale_stride + group
        codes = tl.load(at, mask=keep, other=0).to(tl.int32)
        scale = (codes << 23).to(tl.float32, bitcast=True) * 256.0
    elif LAYOUT.kind == "fp8":
        at = (rows + LAYOUT.scale_at).to(tl.pointer_type(tl.float32)) + group
        scale = tl.load(at, mask=keep, other=0.0) * 256.0
    else:
        at = (rows + LAYOUT.scale_at).to(tl.pointer_type(tl.bfloat16)) + group
        scale = tl.load(at, mask=keep, other=0.0).to(tl.float32)
    return scale


@triton.jit
def _small_float(codes):
    """Bytes as float32: into the mantissa of 2^23, cheaper than a conversion."""
    return (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def rope(
    pages,
    inner,
    stored,
    start,
    COLUMNS: tl.constexpr,
    LAYOUT: tl.constexpr,
    dtype: tl.constexpr,
):
    """Columns from ``start`` on of the rope section, ``[TOKENS, COLUMNS]``; 0 around it."""
    column = start + tl.arange(0, COLUMNS)[None, :]
    keep = stored & (column >= 0) & (column < LAYOUT.row - LAYOUT.latent)
    if LAYOUT.kind == "plain":
        rows = pages + inner * LAYOUT.token_stride + LAYOUT.latent
    else:
        rows = pages.to(tl.pointer_type(tl.bfloat16)) + LAYOUT.rope_at // 2
        rows += inner * (LAYOUT.token_stride // 2)
    return tl.load(rows + column, mask=keep, other=0.0).to(dtype)
