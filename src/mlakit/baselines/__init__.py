"""The other ways to shrink a cache, one file per family, on three hooks.

A cache layer that packs a prefix (``prefix.PrefixLayer``), the queries of every attention call
(``prefix.SeenQueries``), and changed weights (``weights.copied``).
"""

from __future__ import annotations

from mlakit.baselines import (
    bits,
    heads,
    layers,
    lazy,
    levels,
    linear,
    low_rank,
    reads,
    recurrent,
    sharing,
    slicing,
    tokens,
    weight_size,
)
from mlakit.baselines.method import Bench, Method, Setting, Variant, require_plain
from mlakit.baselines.prefix import Prefix, read_prefix

__all__ = [
    "METHODS",
    "Bench",
    "Method",
    "Prefix",
    "Setting",
    "Variant",
    "read_prefix",
    "require_plain",
]

METHODS: tuple[Method, ...] = (
    *bits.METHODS,
    *levels.METHODS,
    *tokens.METHODS,
    *lazy.METHODS,
    *heads.METHODS,
    *low_rank.METHODS,
    *layers.METHODS,
    *sharing.METHODS,
    *linear.METHODS,
    *recurrent.METHODS,
    *reads.METHODS,
    *weight_size.METHODS,
    *slicing.METHODS,
)
"""Every method of this room, in the order that tables have."""
