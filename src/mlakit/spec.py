"""What an attention layer and a model are, as plain data: the one description every room shares.

Shape letters used in all of mlakit: B batch, S query length, T cached length, H query heads,
G key/value heads, D hidden size, d head size, N nope size, R rope size, C latent rank,
V value size, P block (page) size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

AttentionKind = Literal["mha", "mqa", "gqa", "mla"]
MLAForm = Literal["compress", "equal-cache", "article"]
QKNorm = Literal["head", "projection"]

CacheKind = Literal["fp8", "int8", "int4"]

QUANTISED_ROWS: dict[str, tuple[int, int, int]] = {
    "fp8": (8, 128, 4),
    "int8": (8, 128, 2),
    "int4": (4, 64, 2),
}
"""Bits per latent number, numbers that share a scale, and bytes of that scale."""


def cached_row_bytes(rank: int, rope: int, kind: CacheKind | None, itemsize: int) -> int:
    """Bytes of one token's row in the cache of one layer.

    Args:
        rank: C, numbers of the latent.
        rope: R, numbers beside it; 16-bit where the latent is quantised.
        kind: how the latent is held; None for plain numbers.
        itemsize: bytes of a plain number.
    """
    if kind is None:
        return (rank + rope) * itemsize
    bits, group, scale = QUANTISED_ROWS[kind]
    codes = -(-rank * bits // 32) * 4
    return -(-(codes + -(-rank // group) * scale + 2 * rope) // 4) * 4


BLOCK_SIZE = 64
"""Tokens per cache page; FlashMLA's kernels ask for exactly 64."""


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding of one layer.

    Attributes:
        theta: base of the frequencies, theta_j = base^(-2j/dim).
        dim: rotated dimensions of one block; the schedule has dim/2 frequencies.
        rope_type: transformers' name of the scaling rule (``default``, ``llama3``, ``yarn`` ...).
        parameters: the other keys of transformers' ``rope_parameters``, unchanged.
        blocks: how often the schedule is repeated side by side. 1 for ordinary attention; G for
            the merged keys of equal-cache MLA, whose rotated width is ``blocks * dim``.
    """

    theta: float
    dim: int
    rope_type: str = "default"
    parameters: dict[str, Any] = field(default_factory=dict)
    blocks: int = 1

    @property
    def width(self) -> int:
        """Rotated dimensions in all: ``blocks * dim``."""
        return self.blocks * self.dim

    @property
    def attention_factor(self) -> float:
        """What this scaling rule multiplies cos and sin with (1 except for YaRN).

        Source: YaRN, https://arxiv.org/abs/2309.00071, section 3.4; ``mscale`` and
        ``mscale_all_dim`` are DeepSeek-V2's.
        """
        if self.rope_type != "yarn":
            return 1.0
        given = self.parameters.get("attention_factor")
        if given is not None:
            return float(given)
        factor = self.parameters["factor"]
        numerator, denominator = (self.parameters.get(k) for k in ("mscale", "mscale_all_dim"))
        if numerator and denominator:
            return yarn_mscale(factor, numerator) / yarn_mscale(factor, denominator)
        return yarn_mscale(factor)

    def as_rope_parameters(self) -> dict[str, Any]:
        """The same in transformers' ``rope_parameters`` form (one dict, no ``dim``)."""
        return {"rope_theta": self.theta, "rope_type": self.rope_type, **self.parameters}


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's temperature, 0.1 * mscale * ln(factor) + 1, and 1 when nothing is stretched."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True)
class AttentionSpec:
    """One attention layer: enough to count, plan, build and choose a kernel for it.

    Ordinary attention (MHA, GQA, MQA) leaves ``kv_lora_rank`` None. Latent attention sets it; its
    three forms cache per token:

    * ``compress``: ``[c_kv (kv_lora_rank) | k_rope (qk_rope_head_dim)]``, DeepSeek-V2/V3;
    * ``equal-cache``: ``[c_v (G d) | k_rope (G d)]``: ``kv_lora_rank = G d`` feeds values only, the
      scores use the merged rotated keys alone (``qk_nope_head_dim = 0``,
      ``qk_rope_head_dim = G d`` in G blocks);
    * ``article``: ``[c_v (G d) | c_k (G d)]``, ``kv_lora_rank = 2 G d``, keys rotated after the
      up-projection (TransMLA v1): nothing rotated is cached, so it cannot be absorbed.

    Attributes:
        head_dim: size d of a query/key head before conversion (nope + rope for native MLA).
        rope: None for a layer without positions; its ``dim`` is below d where only the first
            dimensions of a head turn.
        qk_norm: an RMSNorm on q and k before the rotation, of each ``head`` or of the whole
            ``projection``. A converted layer then keeps k_proj, v_proj and both norms, and its
            latent is linear in ``[k_norm(k); v]``.
        source_kv_heads: G of the layer that a converted one came from.
        source_kv_lora_rank: C of a layer that was latent before its conversion. It keeps that
            layer's projections to queries and latent, and its latent is linear in theirs.
        source_qk_rope_head_dim: R of that layer.
        query_up: a converted layer has the source's own queries, and a matrix per head makes
            nope and rope rows of them.
        softmax_scale: factor on the scores; never None after a family reader ran.
        cache_format: how a latent is cached: quantised, its rotary part in 16 bits; None for
            numbers of the model's own dtype.
    """

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    softmax_scale: float
    rope: RopeSpec | None = None
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    mla_form: MLAForm | None = None
    logit_softcap: float | None = None
    sliding_window: int | None = None
    qk_norm: QKNorm | None = None
    source_kv_heads: int | None = None
    source_kv_lora_rank: int | None = None
    source_qk_rope_head_dim: int | None = None
    query_up: bool = False
    q_bias: bool = False
    kv_bias: bool = False
    o_bias: bool = False
    cache_format: CacheKind | None = None

    @property
    def kind(self) -> AttentionKind:
        """``mla``, or by its head counts ``mha``, ``mqa`` or ``gqa``."""
        if self.kv_lora_rank is not None:
            return "mla"
        if self.num_key_value_heads == self.num_attention_heads:
            return "mha"
        return "mqa" if self.num_key_value_heads == 1 else "gqa"

    @property
    def indirect(self) -> bool:
        """Whether a converted layer's latent is linear in something else than its input."""
        return bool(self.qk_norm or self.source_kv_lora_rank)

    @property
    def maps_queries(self) -> bool:
        """Whether a converted layer's queries go through a matrix per head, ``q_up_proj``."""
        return self.indirect or self.query_up or self.mla_form == "equal-cache"

    @property
    def absorbed(self) -> AttentionSpec:
        """Latent attention as its queries see it: one head whose key is the cached row.

        Its values are the first C numbers of the key, of which the last R turn (DeepSeek-V2,
        https://arxiv.org/abs/2405.04434, section 2.1.2). Any other layer as it is.
        """
        if self.kv_lora_rank is None:
            return self
        return replace(
            self,
            num_key_value_heads=1,
            head_dim=self.cache_width,
            q_lora_rank=None,
            kv_lora_rank=None,
            qk_nope_head_dim=None,
            qk_rope_head_dim=None,
            v_head_dim=self.kv_lora_rank,
            mla_form=None,
            q_bias=False,
            kv_bias=False,
        )

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a source head that turn; all of them where none does."""
        return self.head_dim if self.rope is None else self.rope.dim

    @property
    def value_dim(self) -> int:
        """Size V of one value head."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    @property
    def cache_width(self) -> int:
        """Numbers cached per token by this layer (all heads)."""
        if self.kv_lora_rank is None:
            return self.num_key_value_heads * (self.head_dim + self.value_dim)
        if self.mla_form == "article":
            return self.kv_lora_rank
        return self.kv_lora_rank + (self.qk_rope_head_dim or 0)

    def cache_row_bytes(self, itemsize: int) -> int:
        """Bytes cached per token by this layer.

        Args:
            itemsize: bytes per number of the model's dtype.
        """
        rank = self.kv_lora_rank
        if rank is None:
            return self.cache_width * itemsize
        return cached_row_bytes(rank, self.cache_width - rank, self.cache_format, itemsize)

    @property
    def query_dim(self) -> int:
        """Size of one projected query head: N + R of DeepSeek's layout, else d."""
        if self.kv_lora_rank is None or self.mla_form != "compress" or self.maps_queries:
            return self.head_dim
        return (self.qk_nope_head_dim or 0) + (self.qk_rope_head_dim or 0)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the layer on disk, named below ``self_attn.``, with its shape."""
        shapes = self._query_shapes()
        if self.kv_lora_rank is None or self.indirect:
            shapes |= self._cache_shapes()
        if self.kv_lora_rank is not None:
            shapes |= self._latent_shapes()
        width = self.num_attention_heads * self.value_dim
        shapes |= _linear("o_proj", self.hidden_size, width, self.o_bias)
        if self.qk_norm:
            whole = self.qk_norm == "projection"
            heads, groups = (self.num_attention_heads, self._groups) if whole else (1, 1)
            shapes["q_norm.weight"] = (heads * self.head_dim,)
            shapes["k_norm.weight"] = (groups * self.head_dim,)
        return shapes

    @property
    def _groups(self) -> int:
        """Key/value heads that are projected, before a conversion or with QK-norm."""
        return self.source_kv_heads or self.num_key_value_heads

    def _query_shapes(self) -> dict[str, tuple[int, ...]]:
        width = self.num_attention_heads * self.query_dim
        if self.q_lora_rank is None:
            return _linear("q_proj", width, self.hidden_size, self.q_bias)
        return {
            **_linear("q_a_proj", self.q_lora_rank, self.hidden_size, self.q_bias),
            "q_a_layernorm.weight": (self.q_lora_rank,),
            **_linear("q_b_proj", width, self.q_lora_rank, False),
        }

    def _cache_shapes(self) -> dict[str, tuple[int, ...]]:
        groups, rank = self._groups, self.source_kv_lora_rank
        if rank is not None:
            width = rank + (self.source_qk_rope_head_dim or 0)
            down = _linear("kv_proj", width, self.hidden_size, self.kv_bias)
            return {**down, "kv_norm.weight": (rank,)}
        return {
            **_linear("k_proj", groups * self.head_dim, self.hidden_size, self.kv_bias),
            **_linear("v_proj", groups * self.value_dim, self.hidden_size, self.kv_bias),
        }

    def _latent_shapes(self) -> dict[str, tuple[int, ...]]:
        heads, rank = self.num_attention_heads, self.kv_lora_rank or 0
        nope, rope = self.qk_nope_head_dim or 0, self.qk_rope_head_dim or 0
        inputs = self._groups * (self.head_dim + self.value_dim)
        if self.source_kv_lora_rank is not None:
            inputs = self.source_kv_lora_rank + (self.source_qk_rope_head_dim or 0)
        down = _linear(
            "kv_a_proj_with_mqa",
            self.cache_width,
            inputs if self.indirect else self.hidden_size,
            self.kv_bias and not self.indirect,
        )
        if self.mla_form == "article":
            up = (heads * self.head_dim, rank // 2)
            return {**down, "v_b_proj.weight": up, "k_b_proj.weight": up}
        shapes = {**down, "kv_a_layernorm.weight": (rank,)}
        if self.maps_queries:
            shapes["q_up_proj.weight"] = (heads, nope + rope, self.head_dim)
        shapes["kv_b_proj.weight"] = (heads * (nope + self.value_dim), rank)
        return shapes


def _linear(name: str, rows: int, columns: int, bias: bool) -> dict[str, tuple[int, ...]]:
    weight: dict[str, tuple[int, ...]] = {f"{name}.weight": (rows, columns)}
    return weight | {f"{name}.bias": (rows,)} if bias else weight


@dataclass(frozen=True)
class FeedForwardSpec:
    """The feed-forward block of one layer: gated (gate, up, down), dense or of experts.

    Attributes:
        intermediate_size: width of the dense block, or of one routed expert.
        bias: the three projections of a dense block carry biases.
        num_experts: routed experts; 0 for a dense block.
        num_experts_per_tok: experts that one token visits.
        shared_intermediate_size: width of the expert that every token visits; 0 for none.
        shared_gate: that expert's output is weighed by a number of its own, D weights.
        router_buffer: the router has DeepSeek-V3's ``e_score_correction_bias``: a tensor on
            disk, but not a trained parameter.
    """

    hidden_size: int
    intermediate_size: int
    bias: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    shared_intermediate_size: int = 0
    shared_gate: bool = False
    router_buffer: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """A whole checkpoint, read from its config alone.

    Attributes:
        model_type: transformers' ``model_type``.
        family: key of the row in ``families.FAMILIES`` that read it.
        layers: one AttentionSpec per decoder layer, in order.
        feed_forwards: one FeedForwardSpec per decoder layer, in order.
        norms_per_layer: norms of width ``hidden_size`` in a decoder layer.
        norm_bias: each of them has a bias too.
        dtype: storage dtype as transformers names it (``float32``, ``bfloat16``, ``float16``).
        config: the raw ``config.json``.
    """

    model_type: str
    family: str
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str
    layers: tuple[AttentionSpec, ...]
    feed_forwards: tuple[FeedForwardSpec, ...]
    norms_per_layer: int
    config: dict[str, Any]
    norm_bias: bool = False

    @property
    def num_hidden_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)
