"""The engine's pages: as many as a number of bytes, or the free memory, holds."""

from __future__ import annotations

from typing import Any

from mlakit.account import cache_bytes as bytes_of
from mlakit.conversion.samples import free_memory
from mlakit.errors import UsageError
from mlakit.nn.hf import attention_specs
from mlakit.nn.page_pool import PagePool
from mlakit.serving.options import SHARE_OF_MEMORY


def make_pool(
    model: Any, cache_bytes: int | None, batch_size: int, length: int, block_size: int
) -> PagePool:
    """The pages that so many bytes hold.

    Args:
        model: a converted model.
        cache_bytes: bytes of all layers' pages; by default enough for ``batch_size`` requests of
            ``length`` tokens, or most of the free memory if that is less.
        batch_size: requests.
        length: tokens of each.
        block_size: tokens per page.

    Raises:
        UsageError: the bytes do not hold a single page.
    """
    specs, itemsize = attention_specs(model), model.dtype.itemsize
    page = bytes_of(specs, 1, block_size, itemsize, block_size)
    if cache_bytes is None:
        cache_bytes = batch_size * -(-length // block_size) * page
        free = free_memory(str(model.device))
        if free is not None:
            cache_bytes = min(cache_bytes, int(SHARE_OF_MEMORY * free))
    if cache_bytes < page:
        raise UsageError(
            f"a cache of {cache_bytes} bytes holds no page of {block_size} tokens, which takes "
            f"{page}",
            remedy="give more bytes, or smaller pages",
        )
    return PagePool(
        specs, cache_bytes // page, dtype=model.dtype, device=model.device, block_size=block_size
    )
