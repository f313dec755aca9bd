"""What is measured: a shape, its FLOP and bytes, and tensors of that shape.

FLOP and bytes are counted as FlashMLA's benchmark counts them, so that figures compare: causal
masks are not discounted, and every cache row, query and output crosses memory once.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from mlakit.ops import CacheFormat
from mlakit.ops.cache_format import PLAIN

GARBAGE = 2147480000
"""What FlashMLA's tests put in table entries that no sequence uses."""

FILL_ROWS = 2**18
"""Cache rows made at a time."""


@dataclass(frozen=True)
class Shape:
    """One decode call.

    Attributes:
        heads: query heads H; there is one latent kv head.
        length: cached tokens of a sequence, with ``varlen`` on average before clipping.
        batch: sequences B.
        queries: new tokens per sequence S; causal if there are several.
        varlen: lengths are drawn from N(length, length / 2), at least S, as FlashMLA draws them.
        dtype: of queries, outputs and plain pages: ``bfloat16``, ``float16`` or ``float32``.
        page_size: tokens per page.
        kv_lora_rank: value columns C.
        qk_rope_head_dim: columns R beside them.
        rope_scores: scores over the R columns only (the equal-cache mode), else over C + R.
        cache_format: ``fp8``, ``model1``, ``int8``, ``int4``; empty for plain numbers.
        seed: of lengths and numbers.
    """

    heads: int
    length: int
    batch: int
    queries: int = 1
    varlen: bool = False
    dtype: str = "bfloat16"
    page_size: int = 64
    kv_lora_rank: int = 512
    qk_rope_head_dim: int = 64
    rope_scores: bool = False
    cache_format: str = ""
    seed: int = 0

    @property
    def row(self) -> int:
        """Columns of a cache row, C + R."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def width(self) -> int:
        """Columns that a query meets, W."""
        return self.qk_rope_head_dim if self.rope_scores else self.row

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return getattr(torch, self.dtype)

    @property
    def stored(self) -> CacheFormat:
        """How a page holds its tokens."""
        plain = {dtype: kind for kind, dtype in PLAIN.items()}[self.torch_dtype]
        return CacheFormat(self.cache_format or plain, self.kv_lora_rank, self.qk_rope_head_dim)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, the same in every run."""
        if not self.varlen:
            return [self.length] * self.batch
        draw = random.Random(self.seed)
        return [
            max(self.queries, round(draw.gauss(self.length, self.length / 2)))
            for _ in range(self.batch)
        ]

    @property
    def flops(self) -> int:
        """``2 S H sum(T) (W + C)``."""
        columns = self.width + self.kv_lora_rank
        return 2 * self.queries * self.heads * sum(self.lengths) * columns

    @property
    def nbytes(self) -> int:
        """Queries, cache rows as they are stored, and outputs, each once."""
        each = self.batch * self.queries * self.heads * (self.width + self.kv_lora_rank)
        return each * self.torch_dtype.itemsize + sum(self.lengths) * self.stored.bytes_per_token

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.nbytes

    @property
    def label(self) -> str:
        """In a few characters, e.g. ``h128 s2 L4096 varlen``."""
        ragged = " varlen" if self.varlen else ""
        return f"h{self.heads} s{self.queries} L{self.length}{ragged}"


@dataclass(frozen=True)
class Problem:
    """The tensors of a shape, as ``mla_decode`` takes them.

    Attributes:
        shape: what they are of.
        q: ``[B, S, H, W]``.
        pages: ``[num_blocks, P, 1, C + R]``, or pages of ``cache_format``.
        block_table: int32 ``[B, max_blocks]``, pages in random order.
        cache_seqlens: int32 ``[B]``.
        cache_format: of quantised pages, else None.
    """

    shape: Shape
    q: Tensor
    pages: Tensor
    block_table: Tensor
    cache_seqlens: Tensor
    cache_format: CacheFormat | None

    @property
    def softmax_scale(self) -> float:
        """FlashMLA's default, ``W ** -0.5``."""
        return self.shape.width**-0.5

    @property
    def causal(self) -> bool:
        """FlashMLA turns it off for a single query, where it changes nothing."""
        return self.shape.queries > 1


def make_problem(shape: Shape, device: torch.device, *, poison: bool = False) -> Problem:
    """Random tensors of a shape: N(0, 1) / 10, clamped to 1, pages shuffled.

    Args:
        shape: what is wanted.
        device: where it lies.
        poison: rows that no sequence uses are NaN, and table entries past a sequence's last page
            are garbage; nothing may touch either. Quantised pages get bytes of 255.
    """
    generator = torch.Generator(device=device).manual_seed(shape.seed)
    lengths, size = shape.lengths, shape.page_size
    used = [math.ceil(length / size) for length in lengths]
    blocks, widest = max(1, sum(used)), max(1, *used)
    order = torch.randperm(blocks, generator=generator, device=device).cpu()
    table = torch.full((shape.batch, widest), GARBAGE if poison else 0, dtype=torch.int32)
    offset, written, place = torch.arange(size), [], 0
    for b, (count, length) in enumerate(zip(used, lengths)):
        mine = order[place : place + count]
        table[b, :count] = mine
        slots = (mine[:, None] * size + offset).flatten()
        written.append(slots[:length] if poison else slots)
        place += count
    stored = shape.stored
    quantised = stored if shape.cache_format else None
    pages = stored.allocate(blocks, size, device)
    if poison:
        pages.fill_(255 if quantised else math.nan)
    for slots in torch.cat(written).to(device).split(FILL_ROWS):
        rows = _numbers((len(slots), stored.width), shape, generator, device)
        if quantised:
            stored.append(pages, slots, rows)
        else:
            pages.view(-1, stored.width)[slots] = rows
    q = _numbers((shape.batch, shape.queries, shape.heads, shape.width), shape, generator, device)
    return Problem(
        shape,
        q,
        pages,
        table.to(device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        quantised,
    )


def _numbers(
    size: tuple[int, ...], shape: Shape, generator: torch.Generator, device: torch.device
) -> Tensor:
    values = torch.randn(size, generator=generator, device=device, dtype=shape.torch_dtype)
    return values.div_(10).clamp_(-1, 1)
