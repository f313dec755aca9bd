"""Fewer reads: the cache stays whole, a query reads the pages that may matter to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import Cache

from mlakit.baselines.method import Bench, Method, Setting, Variant
from mlakit.baselines.prefix import ATTENTION, Prefix, PrefixLayer
from mlakit.spec import ModelSpec

PAGE = 16
"""Tokens per page, as published."""


class PagedLayer(PrefixLayer):
    """An exact prefix with the least and largest key of each page, by channel."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """Bounds of a prefix ``[1, G, P, d]``, of its whole pages."""
        super().__init__(keys, values, seen=0, held=0)
        pages = keys[..., : keys.shape[2] // PAGE * PAGE, :].unflatten(2, (-1, PAGE))
        self.low, self.high = pages.amin(3), pages.amax(3)


def page_bounds(queries: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The most that a query's product with a key of each page can be, ``[1, H, S, pages]``.

    Args:
        queries: ``[1, H, S, d]``.
        low: least key of each page by channel ``[1, G, pages, d]``.
        high: the largest.
    """
    repeats = queries.shape[1] // low.shape[1]
    low, high = (x.repeat_interleave(repeats, 1).float().mT for x in (low, high))
    return queries.float().clamp_min(0) @ high + queries.float().clamp_max(0) @ low


class TopPages(TorchFunctionMode):
    """Lets every query of a call attend to its best pages, and to all tokens after the pages."""

    def __init__(self, cache: Cache, share: float) -> None:
        super().__init__()
        self.cache: Any = cache
        self.share = share
        self.call = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Adds to the mask of attention what is not read."""
        kwargs = dict(kwargs or {})
        if func is not ATTENTION:
            return func(*args, **kwargs)
        layer = self.cache.layers[self.call % len(self.cache.layers)]
        self.call += 1
        queries, keys = args[0], args[1]
        keep = pages_kept(self.share, layer.low.shape[2])
        bounds = page_bounds(queries, layer.low, layer.high)
        chosen = torch.zeros_like(bounds, dtype=torch.bool)
        chosen.scatter_(-1, bounds.topk(keep, dim=-1).indices, True)
        tokens = chosen.repeat_interleave(PAGE, -1)
        rest = keys.shape[2] - tokens.shape[-1]
        read = torch.nn.functional.pad(tokens, (0, rest), value=True)
        mask, causal = kwargs.get("attn_mask"), kwargs.pop("is_causal", False)
        steps, length = queries.shape[2], keys.shape[2]
        if causal or mask is None:
            ahead = torch.ones(steps, length, dtype=torch.bool, device=keys.device)
            read = read & ahead.tril(length - steps)
        elif mask.dtype == torch.bool:
            read = read & mask
        else:
            read = read & (mask >= 0)
        kwargs["attn_mask"] = read
        return func(*args, **kwargs)


def pages_kept(share: float, pages: int) -> int:
    """Pages that a query reads."""
    return max(1, int(share * pages + 1e-9)) if pages else 0


def paged(prefix: Prefix) -> Cache:
    """A cache of PagedLayers."""
    return prefix.each(lambda _, keys, values: PagedLayer(keys, values))


def read_share(share: float) -> float:
    """Of the bytes held, bounds included, those that a query reads: all bounds, some pages."""
    bounds = 1 / PAGE  # two keys for every PAGE keys and values
    return (bounds + share) / (bounds + 1)


def _settings(spec: ModelSpec, budgets: Sequence[float]) -> list[Setting]:
    return [Setting(f"reads {100 * share:g} %", share) for share in budgets if share < 1]


def _quest(bench: Bench, share: float) -> Variant:
    return Variant(
        bench.source.model,
        paged,
        reading=lambda cache: TopPages(cache, share),
        read_share=read_share(share),
    )


METHODS = (
    Method(
        "top-pages",
        "page top-k",
        "reads",
        "Quest, arXiv 2406.10774",
        "All layers are sparse, the first two included; pages are chosen for the prefix, later "
        "tokens are always read, and no kernel skips what is not.",
        _settings,
        _quest,
    ),
)
