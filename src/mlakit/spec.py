"""What an attention layer and a model are, as plain data: the one description every room shares.

Shape letters used in all of mlakit: B batch, S query length, T cached length, H query heads,
G key/value heads, D hidden size, d head size, N nope size, R rope size, C latent rank,
V value size, P block (page) size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

AttentionKind = Literal["mha", "mqa", "gqa", "mla"]
MLAForm = Literal["compress", "equal-cache", "article"]

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

    def as_rope_parameters(self) -> dict[str, Any]:
        """The same in transformers' ``rope_parameters`` form (one dict, no ``dim``)."""
        return {"rope_theta": self.theta, "rope_type": self.rope_type, **self.parameters}


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
        qk_norm: per-head RMSNorm on q and k before the rotation.
        softmax_scale: factor on the scores; never None after a family reader ran.
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
    qk_norm: bool = False
    q_bias: bool = False
    kv_bias: bool = False
    o_bias: bool = False

    @property
    def kind(self) -> AttentionKind:
        """``mla``, or by its head counts ``mha``, ``mqa`` or ``gqa``."""
        if self.kv_lora_rank is not None:
            return "mla"
        if self.num_key_value_heads == self.num_attention_heads:
            return "mha"
        return "mqa" if self.num_key_value_heads == 1 else "gqa"

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


@dataclass(frozen=True)
class ModelSpec:
    """A whole checkpoint, read from its config alone.

    Attributes:
        model_type: transformers' ``model_type``.
        family: key of the row in ``families.FAMILIES`` that read it.
        layers: one AttentionSpec per decoder layer, in order.
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
    config: dict[str, Any]

    @property
    def num_hidden_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)
