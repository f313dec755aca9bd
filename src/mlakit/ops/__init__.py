"""Attention over a latent cache: tensors in, tensors out.

This room imports torch alone and is useful on its own. ``mla_decode`` is the operator, over plain
or quantised pages (``CacheFormat``), and ``mla_sparse_decode`` its form for selected rows;
``get_mla_metadata``, ``flash_mla_with_kvcache`` and ``flash_mla_sparse_fwd`` are FlashMLA's names
for them.
"""

from __future__ import annotations

from mlakit.ops.cache_format import CacheFormat
from mlakit.ops.decode import mla_decode
from mlakit.ops.flash_mla import TileSchedule, flash_mla_with_kvcache, get_mla_metadata
from mlakit.ops.sparse import flash_mla_sparse_fwd, mla_sparse_decode

__all__ = [
    "CacheFormat",
    "TileSchedule",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
    "mla_decode",
    "mla_sparse_decode",
]
