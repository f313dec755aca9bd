"""Latent attention as rows of a comparison: what ``mlakit convert`` makes, alone and quantised."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from mlakit.baselines import Bench, Method, Setting, Variant
from mlakit.baselines.method import Settings, by_share
from mlakit.baselines.tokens import RULES
from mlakit.comparison.latent_prefix import evict_latents, latents_of_source
from mlakit.conversion.apply import convert
from mlakit.conversion.goal import AUTO_STEPS
from mlakit.conversion.rotary_sizes import rope_choices
from mlakit.nn.hf import load
from mlakit.spec import CacheKind, ModelSpec

PAPER = "TransMLA, arXiv 2502.07864"
OURS = "mlakit convert (docs/conversion.md)"
EVICTION = (
    "One score for all heads, as they share the latent: attention of all queries, half of what is "
    "kept is the newest; the prefix is thinned once"
)


def _equal(spec: ModelSpec, budgets: Sequence[float]) -> list[Setting]:
    return [Setting("100 %", 1.0)]


def _ranks(spec: ModelSpec, budgets: Sequence[float]) -> list[Setting]:
    """The same conversions as by share; what they cache is smaller still."""
    return [Setting(f"rank of {item.label}", item.value) for item in by_share(spec, budgets)]


def _halved(spec: ModelSpec, budgets: Sequence[float]) -> list[Setting]:
    """The same conversions, and half of the tokens."""
    return [
        Setting(f"rank of {item.label}, half the tokens", item.value)
        for item in by_share(spec, budgets)
    ]


def _published(spec: ModelSpec, share: float) -> dict[str, Any]:
    """Sizes for the published method: as many rotary dimensions as take half of the cache."""
    layer = spec.layers[0]
    width = int(share * layer.cache_width + 1e-9)
    fitting = [size for size in rope_choices(layer, "transmla") if 2 * size <= width]
    rope = fitting[-1] if fitting else rope_choices(layer, "transmla")[0]
    return {"method": "transmla", "cache_ratio": share, "qk_rope_head_dim": rope}


def _build(
    options: dict[str, Any],
    cache_format: CacheKind | None,
    bench: Bench,
    share: float,
) -> Variant:
    """Converts into the workspace, or takes what an earlier run left there, and loads it."""
    goal = dict(options)
    if share >= 1:
        goal = {"equal_cache": True}
    elif goal.pop("published", False):
        goal |= _published(bench.spec, share)
    else:
        goal["cache_ratio"] = share
    name = json.dumps(goal, sort_keys=True)
    folder = bench.workspace / "".join(c if c.isalnum() or c == "." else "_" for c in name)
    model = bench.source.model
    plan = convert(
        bench.path,
        folder,
        calibration=None if share >= 1 else bench.calibration,
        seed=bench.seed,
        dtype=bench.source.dtype,
        device=str(model.device),
        **goal,
    )
    loaded = load(folder, dtype=model.dtype, device=model.device, cache_format=cache_format)
    read = plan.calibration.tokens if plan.calibration else 0
    return Variant(loaded, calibration_tokens=read, trained_tokens=read if plan.goal.steps else 0)


def _evicting(cache_format: CacheKind | None, bench: Bench, share: float) -> Variant:
    """A conversion at a share of the cache that keeps half of the tokens."""
    variant = _build({"refine_steps": 0}, cache_format, bench, share)
    return _with_tokens(variant, 0.5)


def _equal_evicting(bench: Bench, share: float) -> Variant:
    """The equal cache with a share of its tokens."""
    return _with_tokens(_build({}, None, bench, 1.0), share)


def _with_tokens(variant: Variant, share: float) -> Variant:
    compress = partial(evict_latents, RULES["h2o"], share)
    return replace(variant, compress=compress, needs_queries=True)


def _on_exact(bench: Bench, share: float) -> Variant:
    """A conversion that reads latents made from the source's own hidden states."""
    variant = _build({"refine_steps": 0}, None, bench, share)
    return replace(variant, compress=partial(latents_of_source, bench.source.model))


def _method(
    name: str,
    title: str,
    source: str,
    differs: str,
    settings: Settings,
    options: dict[str, Any],
    cache_format: CacheKind | None = None,
    slow: bool = False,
) -> Method:
    build = partial(_build, options, cache_format)
    return Method(name, title, "latent", source, differs, settings, build, slow)


METHODS = (
    _method(
        "mla-equal",
        "MLA, equal cache",
        PAPER,
        "Theorem 1 in the form that absorbs; nothing was trained after it.",
        _equal,
        {},
    ),
    _method(
        "mla",
        "MLA, closed form",
        OURS,
        "The product's own conversion without its gradient steps; not healed.",
        by_share,
        {"refine_steps": 0},
    ),
    _method(
        "mla-refined",
        "MLA, refined",
        OURS,
        f"The product's default: {AUTO_STEPS} gradient steps a layer towards the source's outputs; "
        "not healed.",
        by_share,
        {},
        slow=True,
    ),
    _method(
        "mla-published",
        "MLA, published",
        PAPER,
        "The published algebra at the same bytes, without the training that the paper adds.",
        by_share,
        {"published": True},
    ),
    _method(
        "mla-int4",
        "MLA, closed form + int4",
        OURS,
        "Latents in 4 bits, the rotary part in 16; rank and bits are not chosen jointly.",
        _ranks,
        {"refine_steps": 0},
        "int4",
    ),
    _method(
        "mla-bits",
        "MLA, rank and bits",
        OURS,
        "Rank, rotary width and bits of the latents chosen together for these bytes, by prediction;"
        " not refined, not healed.",
        by_share,
        {"refine_steps": 0, "cache_bits": "auto"},
    ),
    Method(
        "mla-exact-prefix",
        "MLA, closed form, exact prefix",
        "latent",
        OURS,
        "Latents of the prefix are made from the source's own hidden states, as rows that change "
        "the cache alone have it; a served conversion reads its own. What follows is computed with "
        "latents.",
        by_share,
        _on_exact,
    ),
    Method(
        "mla-equal-evict",
        "MLA, equal cache + eviction",
        "latent",
        f"{OURS}, H2O",
        f"{EVICTION}; the conversion itself loses nothing, so this is eviction alone.",
        by_share,
        _equal_evicting,
    ),
    Method(
        "mla-evict",
        "MLA, closed form + eviction",
        "latent",
        f"{OURS}, H2O",
        f"{EVICTION}.",
        _halved,
        partial(_evicting, None),
    ),
    Method(
        "mla-int4-evict",
        "MLA, closed form + int4 + eviction",
        "latent",
        f"{OURS}, H2O",
        f"{EVICTION}, and the latents are in 4 bits.",
        _halved,
        partial(_evicting, "int4"),
    ),
)
