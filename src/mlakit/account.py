"""What a model costs: parameters, cache bytes, FLOPs and bytes moved per decoded token.

Everything here is arithmetic on specs. FLOPs count multiplications and additions of matrix
products (2 per weight and token); norms, rotations and softmax are left out. Bytes count weights
and cache, each read once per step, as a decode step on any device at least must.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mlakit.errors import UsageError
from mlakit.spec import AttentionSpec, FeedForwardSpec, ModelSpec

ITEMSIZE = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1, "uint8": 1,
}  # fmt: skip
"""Bytes per element of each dtype, by transformers' name."""

UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", 1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}

NO_LIMIT = 2**50
"""Tokens beyond which a context counts as unlimited: every layer's cache is bounded."""


@dataclass(frozen=True)
class Parameters:
    """Trained parameters by component; a tied output matrix is counted once, in ``embedding``.

    Attributes:
        inactive: those of the routed experts that a single token does not visit.
    """

    embedding: int
    attention: int
    feed_forward: int
    norms: int
    output: int
    inactive: int

    @property
    def total(self) -> int:
        """All parameters, as ``sum(p.numel() for p in model.parameters())``."""
        return self.embedding + self.attention + self.feed_forward + self.norms + self.output

    @property
    def active(self) -> int:
        """Parameters that one token passes through; less than ``total`` with experts."""
        return self.total - self.inactive


@dataclass(frozen=True)
class DecodeCost:
    """What one decoded token costs.

    Attributes:
        flops: of matrix products.
        weight_bytes: of weights read; shared by the rows of a batch.
        cache_bytes: of cache: T rows read, one written, in every layer.
    """

    flops: float
    weight_bytes: float
    cache_bytes: float

    @property
    def nbytes(self) -> float:
        """All bytes moved."""
        return self.weight_bytes + self.cache_bytes

    @property
    def intensity(self) -> float:
        """FLOPs per byte moved: the x axis of a roofline."""
        return self.flops / self.nbytes

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The least time a device with these two roofs needs.

        Source: Williams, Waterman and Patterson, Roofline, CACM 52(4), 2009.
        """
        return max(self.flops / flops_per_second, self.nbytes / bytes_per_second)

    def bound(
        self, flops_per_second: float, bytes_per_second: float
    ) -> Literal["compute", "memory"]:
        """Which of the two roofs decides."""
        ridge = flops_per_second / bytes_per_second
        return "compute" if self.intensity > ridge else "memory"


def parameters(spec: ModelSpec) -> Parameters:
    """Exact parameter counts of a model."""
    table = spec.vocab_size * spec.hidden_size
    return Parameters(
        embedding=table,
        attention=sum(attention_parameters(layer) for layer in spec.layers),
        feed_forward=sum(_feed_forward_parameters(block) for block in spec.feed_forwards),
        norms=(spec.norms_per_layer * len(spec.layers) + 1)
        * spec.hidden_size
        * (1 + spec.norm_bias),
        output=0 if spec.tie_word_embeddings else table,
        inactive=sum(
            (block.num_experts - block.num_experts_per_tok) * _expert_weights(block)
            for block in spec.feed_forwards
            if block.num_experts
        ),
    )


def attention_parameters(spec: AttentionSpec) -> int:
    """Parameters of one attention layer, biases and inner norms included."""
    return sum(math.prod(shape) for shape in spec.tensor_shapes().values())


def cache_bytes_per_token(layers: Sequence[AttentionSpec], itemsize: int) -> int:
    """Bytes that one more token adds, all layers together, while no window is full.

    Args:
        layers: the attention layers.
        itemsize: bytes per cached number that is not quantised.
    """
    return sum(layer.cache_row_bytes(itemsize) for layer in layers)


def cache_bytes(
    layers: Sequence[AttentionSpec],
    batch: int,
    length: int,
    itemsize: int,
    block_size: int | None = None,
) -> int:
    """Bytes of a whole cache.

    A layer with a sliding window holds at most ``sliding_window`` tokens (transformers keeps one
    fewer between steps: the newest joins when it is needed). With ``block_size`` the cache is
    paged as ``LatentCache`` allocates it: every row takes whole pages, and no page is dropped
    when it leaves a window.

    Args:
        layers: the attention layers.
        batch: sequences B.
        length: tokens T of each sequence.
        itemsize: bytes per cached number.
        block_size: tokens per page P; None for a cache without pages.
    """
    if block_size is not None:
        pages = -(-length // block_size)
        return batch * pages * block_size * cache_bytes_per_token(layers, itemsize)
    rows = (visible_tokens(layer, length) * layer.cache_row_bytes(itemsize) for layer in layers)
    return batch * sum(rows)


def visible_tokens(spec: AttentionSpec, length: int) -> int:
    """Tokens that the newest of ``length`` tokens sees, itself included."""
    return length if spec.sliding_window is None else min(length, spec.sliding_window)


def attention_cost(spec: AttentionSpec, context: int, itemsize: int) -> DecodeCost:
    """Scores and weighted sum of one decoded token in one layer, without the projections.

    Latent attention is counted in its absorbed form: scores run over the cached row (C + R, or R
    alone for equal-cache) instead of d, so a token costs more FLOPs than in MHA; what falls is
    the bytes. The article's form cannot be absorbed and expands every cached row again.

    Args:
        spec: the layer.
        context: tokens T in the cache, the new one included.
        itemsize: bytes per cached number.

    Source: DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1.2 (absorption).
    """
    tokens = visible_tokens(spec, context)
    heads, rank, rope = spec.num_attention_heads, spec.kv_lora_rank, spec.qk_rope_head_dim or 0
    if rank is None:
        per_token = 2 * heads * (spec.head_dim + spec.value_dim)
    elif spec.mla_form == "article":
        expand = (spec.head_dim + spec.value_dim) * rank // 2
        per_token = 2 * heads * (expand + spec.head_dim + spec.value_dim)
    else:
        scores = rope if spec.mla_form == "equal-cache" else rank + rope
        per_token = 2 * heads * (scores + rank)
    row = spec.cache_row_bytes(itemsize)
    return DecodeCost(per_token * tokens, 0.0, (tokens + 1) * row)


def decode_cost(
    spec: ModelSpec, context: int, batch: int, weight_itemsize: float, cache_itemsize: int
) -> DecodeCost:
    """What one token of one sequence costs when ``batch`` sequences are decoded together.

    Weights are read once per step and shared by the batch. With experts, the step reads those
    that some row visits: E (1 - (1 - k/E)^B) of E on average, if rows choose independently.

    Args:
        spec: the model.
        context: tokens T in each sequence's cache, the new one included.
        batch: sequences B.
        weight_itemsize: bytes per parameter.
        cache_itemsize: bytes per cached number.
    """
    table = spec.vocab_size * spec.hidden_size
    cores = [attention_cost(layer, context, cache_itemsize) for layer in spec.layers]
    flops = sum(core.flops for core in cores) + 2 * (_projections(spec) + table)
    counted = parameters(spec)
    read: float = counted.attention + counted.norms + table
    for block in spec.feed_forwards:
        read += _feed_forward_weights(block, _experts_visited(block, batch))
    weights = (read / batch + spec.hidden_size) * weight_itemsize
    return DecodeCost(flops, weights, sum(core.cache_bytes for core in cores))


def prefill_flops(spec: ModelSpec, length: int) -> int:
    """FLOPs of reading a prompt of ``length`` tokens: projections linear, attention quadratic.

    Latent attention is counted expanded (keys and values of every head), as prefill runs it. The
    output matrix is applied to the last token only.
    """
    total = 2 * length * (_projections(spec) + _expansions(spec))
    total += 2 * spec.vocab_size * spec.hidden_size
    for layer in spec.layers:
        window = visible_tokens(layer, length)
        pairs = window * (window + 1) // 2 + (length - window) * window
        nope, rope = layer.qk_nope_head_dim or 0, layer.qk_rope_head_dim or 0
        latent = layer.kv_lora_rank is not None and layer.mla_form != "article"
        width = (nope + rope if latent else layer.head_dim) + layer.value_dim
        total += 2 * layer.num_attention_heads * width * pairs
    return total


def longest_context(
    layers: Sequence[AttentionSpec],
    memory: int,
    weight_bytes: float,
    batch: int,
    itemsize: int,
    block_size: int | None = None,
) -> int | None:
    """Most tokens per sequence for which weights and cache fit in ``memory`` bytes.

    The cache is counted as in ``cache_bytes``.

    Returns:
        0 if the weights alone do not fit; None if any length fits (every layer has a window).
    """

    def fits(length: int) -> bool:
        return weight_bytes + cache_bytes(layers, batch, length, itemsize, block_size) <= memory

    if fits(NO_LIMIT):
        return None
    low, high = 0, NO_LIMIT
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def as_mha(spec: AttentionSpec) -> AttentionSpec:
    """The layer with keys and values of its own for every query head."""
    return _plain(spec, spec.num_attention_heads)


def as_mqa(spec: AttentionSpec) -> AttentionSpec:
    """The layer with a single key and value head."""
    return _plain(spec, 1)


def as_mla(spec: AttentionSpec, kv_lora_rank: int, qk_rope_head_dim: int) -> AttentionSpec:
    """The layer as DeepSeek-shaped latent attention: N = d (its own N if latent), V as it is.

    Raises:
        UsageError: a rank below 1, or rotary dimensions that are no pairs.
    """
    if kv_lora_rank < 1 or qk_rope_head_dim < 2 or qk_rope_head_dim % 2:
        raise UsageError(
            f"kv_lora_rank {kv_lora_rank} and qk_rope_head_dim {qk_rope_head_dim} make no layer",
            remedy="the rank is at least 1, the rotary size even and at least 2",
        )
    native = spec.kv_lora_rank is not None and spec.qk_nope_head_dim
    return replace(
        _plain(spec, spec.num_attention_heads),
        rope=spec.rope and replace(spec.rope, dim=qk_rope_head_dim, blocks=1),
        q_lora_rank=spec.q_lora_rank,
        kv_lora_rank=kv_lora_rank,
        qk_nope_head_dim=spec.qk_nope_head_dim if native else spec.head_dim,
        qk_rope_head_dim=qk_rope_head_dim,
        v_head_dim=spec.value_dim,
        mla_form="compress",
        source_kv_heads=spec.source_kv_heads or spec.num_key_value_heads,
    )


def as_equal_cache(spec: AttentionSpec) -> AttentionSpec:
    """An MHA, GQA or MQA layer as latent attention with the same cache: C = R = G d, N = 0."""
    width = spec.num_key_value_heads * spec.head_dim
    return replace(
        spec,
        num_key_value_heads=spec.num_attention_heads,
        rope=spec.rope and replace(spec.rope, blocks=spec.num_key_value_heads),
        kv_lora_rank=width,
        qk_nope_head_dim=0,
        qk_rope_head_dim=width,
        v_head_dim=spec.head_dim,
        mla_form="equal-cache",
        source_kv_heads=spec.num_key_value_heads,
    )


def parse_bytes(text: str) -> int:
    """Bytes from ``24GiB`` (powers of 1024), ``80GB`` (powers of 1000) or a plain number.

    Raises:
        UsageError: anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = {name.lower(): name for name in UNITS}.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise UsageError(
            f"{text!r} is not a size in bytes",
            remedy="write a number and a unit: 24GiB, 80GB, 512MiB",
        )
    return int(float(match[1]) * UNITS[unit])


def _plain(spec: AttentionSpec, groups: int) -> AttentionSpec:
    return replace(
        spec,
        num_key_value_heads=groups,
        rope=spec.rope and replace(spec.rope, dim=spec.head_dim, blocks=1),
        q_lora_rank=None,
        kv_lora_rank=None,
        qk_nope_head_dim=None,
        qk_rope_head_dim=None,
        mla_form=None,
        source_kv_heads=None,
        source_kv_lora_rank=None,
        source_qk_rope_head_dim=None,
    )


def _feed_forward_parameters(spec: FeedForwardSpec) -> int:
    bias = 2 * spec.intermediate_size + spec.hidden_size if spec.bias else 0
    return int(_feed_forward_weights(spec, spec.num_experts)) + bias


def _feed_forward_weights(spec: FeedForwardSpec, experts: float) -> float:
    """Weights of a block of which ``experts`` routed experts are used, biases left out."""
    if not spec.num_experts:
        return _expert_weights(spec)
    shared = spec.hidden_size * (3 * spec.shared_intermediate_size + spec.shared_gate)
    return spec.num_experts * spec.hidden_size + shared + experts * _expert_weights(spec)


def _expert_weights(spec: FeedForwardSpec) -> int:
    return 3 * spec.hidden_size * spec.intermediate_size


def _experts_visited(spec: FeedForwardSpec, batch: int) -> float:
    """Experts that some of ``batch`` tokens visit, on average; 0 for a dense block."""
    if not spec.num_experts:
        return 0.0
    return spec.num_experts * (1 - (1 - spec.num_experts_per_tok / spec.num_experts) ** batch)


def _projections(spec: ModelSpec) -> int:
    """Weights of all matrix products one token goes through once, the output matrix excepted."""
    total = 0
    for layer, block in zip(spec.layers, spec.feed_forwards):
        total += sum(math.prod(s) for s in layer.tensor_shapes().values() if len(s) > 1)
        if layer.mla_form == "article":
            total -= _article_up(layer)
        total += int(_feed_forward_weights(block, block.num_experts_per_tok))
    return total


def _expansions(spec: ModelSpec) -> int:
    """Weights that decoding applies to every cached token again, but prefill to each only once."""
    return sum(_article_up(layer) for layer in spec.layers if layer.mla_form == "article")


def _article_up(layer: AttentionSpec) -> int:
    """Weights of ``k_b_proj`` and ``v_b_proj`` of the article's form."""
    width = layer.head_dim + layer.value_dim
    return layer.num_attention_heads * width * (layer.kv_lora_rank or 0) // 2
