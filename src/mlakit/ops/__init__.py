"""Attention over a latent cache: tensors in, tensors out.

This room imports torch alone and is useful on its own. ``mla_decode`` is the operator;
``get_mla_metadata`` and ``flash_mla_with_kvcache`` are FlashMLA's names for it.
"""

from __future__ import annotations

from mlakit.ops.decode import mla_decode
from mlakit.ops.flash_mla import TileSchedule, flash_mla_with_kvcache, get_mla_metadata

__all__ = ["TileSchedule", "flash_mla_with_kvcache", "get_mla_metadata", "mla_decode"]
