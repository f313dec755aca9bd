"""Decode problems for tests: poisoned tensors, the float64 twin, FlashMLA's own tolerances.

Unused cache rows hold NaN and unused table entries hold a page number that no cache has, so a
test that passes has touched neither.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

from mlakit.ops import mla_decode
from mlakit.ops.call import DenseCall, dense_call
from mlakit.ops.choose import implementation

GARBAGE = 2147480000


@dataclass(frozen=True)
class Problem:
    """The arguments of one decode call."""

    q: torch.Tensor
    k_cache: torch.Tensor
    block_table: torch.Tensor
    cache_seqlens: torch.Tensor
    kv_lora_rank: int
    options: dict

    @property
    def args(self) -> tuple:
        return tuple(vars(self).values())[:-1]

    @property
    def call(self) -> DenseCall:
        return dense_call(*self.args, **self.options)

    def run(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """One implementation's result in the shapes of ``mla_decode``."""
        return self.shaped(*implementation(name).decode(self.call))

    def shaped(self, out, lse) -> tuple[torch.Tensor, torch.Tensor]:
        if self.q.dim() == 3:
            return out, lse.T
        return out.unflatten(0, self.q.shape[:2]), lse.unflatten(0, self.q.shape[:2]).mT

    def decode(self) -> tuple[torch.Tensor, torch.Tensor]:
        return mla_decode(*self.args, **self.options)


def problem(
    lengths, heads, *, kv_heads=1, queries=1, rank=512, rope=64, width=None, block_size=64,
    dtype=torch.float32, seed=0, **options,
):  # fmt: skip
    """Random tensors (FlashMLA's tests: normal / 10, clamped to +-1), pages shuffled, rest NaN.

    ``queries`` is S, or a list of each sequence's own number, and then q is packed.
    """
    generator = torch.Generator().manual_seed(seed)
    row, batch = rank + rope, len(lengths)
    used = [-(-length // block_size) for length in lengths]
    num_blocks = sum(used) + 2
    if isinstance(queries, int):
        shape = (batch, queries)
    else:
        shape = (sum(queries),)
        starts = [0, *itertools.accumulate(queries)]
        options["cu_seqlens_q"] = torch.tensor(starts, dtype=torch.int32)
        options.setdefault("max_seqlen_q", max([1, *queries]))
    q = torch.randn(*shape, heads, width or row, generator=generator)
    k_cache = torch.randn(num_blocks, block_size, kv_heads, row, generator=generator)
    q, k_cache = ((tensor / 10).clamp(-1, 1).to(dtype) for tensor in (q, k_cache))
    order = torch.randperm(num_blocks, generator=generator).tolist()
    block_table = torch.full((batch, max(used, default=0) + 2), GARBAGE, dtype=torch.int32)
    unused = torch.ones(num_blocks, block_size, dtype=torch.bool)
    for b, length in enumerate(lengths):
        pages = [order.pop() for _ in range(used[b])]
        block_table[b, : used[b]] = torch.tensor(pages, dtype=torch.int32)
        for page in pages:
            unused[page, : min(block_size, length - block_size * pages.index(page))] = False
    k_cache[unused] = math.nan
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    options.setdefault("softmax_scale", (width or row) ** -0.5)
    return Problem(q, k_cache, block_table, seqlens, rank, options)


def assert_close(got, want, *, absolute, relative, cosine, lse_relative):
    """FlashMLA's own criterion: element-wise, in direction, and infinities in the same places."""
    (out, lse), (true_out, true_lse) = [
        (pair[0].double(), pair[1].double()) for pair in (got, want)
    ]
    assert torch.equal(lse.isinf(), true_lse.isinf())
    assert not out.isnan().any() and not lse.isnan().any()
    error = (out - true_out).abs()
    assert ((error < absolute) | (error < relative * true_out.abs())).all(), error.max()
    norm = (out.square().sum() + true_out.square().sum()).item()
    if norm:
        assert 1 - 2 * (out * true_out).sum().item() / norm < cosine
    finite = true_lse.isfinite()
    error, size = (lse - true_lse)[finite].abs(), true_lse[finite].abs()
    assert ((error < 1e-6) | (error < lse_relative * size)).all(), error.max()


# FlashMLA's tests/test_flash_mla_dense_decoding.py, for 16-bit tensors.
SIXTEEN_BITS = {
    "absolute": 8e-4,
    "relative": 2.01 / 128,
    "cosine": 5e-6,
    "lse_relative": 8.01 / 65536,
}
# float32 rounding, 2^-24, of a score of up to 1024 products: sqrt(1024) * 2^-24 = 2e-6 in the
# exponent, so as much relative to the weights; 5 times that for safety. Values are below 1.
THIRTY_TWO_BITS = {"absolute": 1e-5, "relative": 1e-5, "cosine": 1e-9, "lse_relative": 1e-5}
TOLERANCE = {
    torch.bfloat16: SIXTEEN_BITS,
    torch.float16: SIXTEEN_BITS,
    torch.float32: THIRTY_TWO_BITS,
}
