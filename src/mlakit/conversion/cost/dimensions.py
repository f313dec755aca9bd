"""The numbers that memory and time of a conversion are made of, read off its plan. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlakit.conversion.amounts import HELD_OUT
from mlakit.conversion.cost.machine import cpu_multiplies_bfloat16
from mlakit.families import FAMILIES
from mlakit.spec import ModelSpec

if TYPE_CHECKING:
    from mlakit.conversion.plan import ConversionPlan


@dataclass(frozen=True)
class Dimensions:
    """Sizes of one layer and of the calibration; D, H, G, d, R, C, V and T as everywhere.

    Attributes:
        layers: how many.
        query: rows of the queries, ``H d``.
        rope: R of the largest layer that may be written.
        ropes: every R that is looked at.
        width: of keys and values together, ``2 G d``.
        source: matrix entries of the source's attention.
        shared: of them those of queries, keys and values.
        target: of the converted attention.
        block: of the feed-forward block.
        active: of them those that a token meets.
        inner: entries of its widest activation, per token.
        stored: matrices stay bfloat16 as they are stored, and are pages of their own file.
        tokens: of calibration.
        held_out: of them.
        vocabulary: V.
    """

    layers: int
    hidden: int
    heads: int
    groups: int
    head: int
    rope: int
    ropes: tuple[int, ...]
    rank: int
    query: int
    width: int
    source: int
    shared: int
    target: int
    block: int
    active: int
    inner: int
    stored: bool
    window: int
    tokens: int
    held_out: int
    vocabulary: int

    @property
    def widest(self) -> int:
        """The largest R that is looked at."""
        return max(self.ropes, default=self.rope)


def dimensions(plan: ConversionPlan, model: ModelSpec, device: str) -> Dimensions:
    """Reads them off; the widest layer stands for all."""
    family, source, seen = FAMILIES[model.family], plan.source_layer, plan.source_layer.absorbed
    target = max(plan.layers, key=lambda layer: layer.kv_lora_rank or 0)
    kept = [t for t in plan.tensors if t.name.startswith(family.layer(0))]
    prefix = family.attention_prefix(0)
    block = sum(math.prod(t.shape) for t in kept if not t.name.startswith(prefix))
    feed = max(model.feed_forwards, key=lambda part: part.intermediate_size)
    routed = 3 * feed.hidden_size * feed.intermediate_size * feed.num_experts
    visited = max(feed.num_experts_per_tok, 1) if feed.num_experts else 1
    attention = _entries(source)
    tokens = plan.calibration.tokens if plan.calibration else 0
    window = plan.calibration.window if plan.calibration else 1
    windows = tokens // window
    bfloat16 = any(t.copied and t.dtype == "BF16" and len(t.shape) == 2 for t in kept)
    return Dimensions(
        layers=len(plan.layers),
        hidden=source.hidden_size,
        heads=source.num_attention_heads,
        groups=seen.num_key_value_heads,
        head=seen.head_dim,
        rope=target.qk_rope_head_dim or 0,
        ropes=plan.rope_dims,
        rank=target.kv_lora_rank or 0,
        query=source.num_attention_heads * seen.head_dim,
        width=2 * seen.num_key_value_heads * seen.head_dim,
        source=attention,
        shared=attention - source.hidden_size * source.num_attention_heads * source.value_dim,
        target=_entries(target),
        block=block,
        active=block - (routed - routed * visited // feed.num_experts if routed else 0),
        inner=feed.intermediate_size * visited + feed.shared_intermediate_size,
        stored=bfloat16 and (device.startswith("cuda") or cpu_multiplies_bfloat16()),
        window=window,
        tokens=tokens,
        held_out=max(1, windows // HELD_OUT) * window,
        vocabulary=model.vocab_size,
    )


def _entries(spec: object) -> int:
    shapes = spec.tensor_shapes().values()  # type: ignore[attr-defined]
    return sum(math.prod(shape) for shape in shapes)
