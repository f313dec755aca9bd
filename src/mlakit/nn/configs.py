"""Config classes of converted models: the family's own fields and the latent ones."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import transformers
from huggingface_hub.dataclasses import strict

from mlakit.families import FAMILIES
from mlakit.spec import QUANTISED_ROWS, MLAForm, QKNorm

FORMAT_VERSION = 1


@dataclass(kw_only=True, repr=False)
class LatentConfig:
    """What latent attention adds to a family's config; the defaults are DeepSeek-V3's sizes.

    Attributes:
        mla_form: ``compress``, ``equal-cache`` or ``article`` (see AttentionSpec).
        kv_lora_rank: C; of the layer with the largest where they differ.
        kv_lora_ranks: C of each layer where they differ; else None.
        qk_rope_head_dim: R.
        qk_nope_head_dim: N.
        v_head_dim: V.
        q_lora_rank: rank of the queries of a source that was latent already; else None.
        rope_blocks: the rotary schedule has R / rope_blocks dims and is repeated this often.
        rope_inv_freq: the R/2 rotary frequencies of each layer where they are its own; None for
            the schedule of ``rope_parameters``.
        softmax_scale: factor on the scores, the source's own.
        qk_norm: q and k are normed before the rotation, each ``head`` or the whole
            ``projection``; the latent is then made of ``[k_norm(k_proj x) | v_proj x]``.
        source_kv_heads: G of the source; with QK-norm k_proj and v_proj still have that many heads.
        source_head_dim: d of the source.
        source_kv_lora_rank: C of a source that was latent already. Its projections to queries and
            to the row it cached stay, and the new latent is made of ``[kv_norm(c) | k_rope]``.
        source_qk_rope_head_dim: R of that source.
        query_up: queries are the source's own, and a matrix per head makes N + R numbers of them.
        q_bias: q_proj has a bias.
        kv_a_bias: kv_a_proj_with_mqa has a bias; with QK-norm k_proj and v_proj instead.
        o_bias: o_proj has a bias.
        latent_norm_eps: epsilon of kv_a_layernorm, large: the norm is the identity.
        head_dim: numbers cached per token by the widest layer (engines read it); set from the
            sizes above.
        cache_format: how the cache holds latents: ``fp8``, ``int8`` or ``int4``, the rotary part in
            16 bits; None for the model's own dtype.
        mlakit: where the weights come from.
    """

    if TYPE_CHECKING:  # the family's fields that are read here
        model_type: ClassVar[str]
        vocab_size: int
        hidden_size: int
        rms_norm_eps: float
        num_attention_heads: int
        num_key_value_heads: Any
        num_hidden_layers: int
        attention_dropout: Any
        rope_parameters: Any
        _attn_implementation: str

    mla_form: MLAForm = "compress"
    kv_lora_rank: int = 512
    kv_lora_ranks: list[int] | None = None
    qk_rope_head_dim: int = 64
    qk_nope_head_dim: int = 128
    v_head_dim: int = 128
    q_lora_rank: int | None = None
    rope_blocks: int = 1
    rope_inv_freq: list[list[float]] | None = None
    softmax_scale: float = 192**-0.5
    qk_norm: QKNorm | None = None
    source_kv_heads: int | None = None
    source_head_dim: int | None = None
    source_kv_lora_rank: int | None = None
    source_qk_rope_head_dim: int | None = None
    query_up: bool = False
    q_bias: bool = False
    kv_a_bias: bool = False
    o_bias: bool = False
    latent_norm_eps: float = 4.0**14
    head_dim: int = 576
    cache_format: str | None = None
    mlakit: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Derives what the sizes imply, after the family has set its own defaults."""
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.head_dim = self.kv_lora_rank
        if self.mla_form != "article":
            self.head_dim += self.qk_rope_head_dim
        self.num_key_value_heads = self.num_attention_heads

    def validate_architecture(self) -> None:
        """Refuses sizes that no form can have."""
        if self.mla_form not in ("compress", "equal-cache", "article"):
            raise ValueError(f"mla_form is {self.mla_form!r}: no such form of latent attention")
        if self.cache_format not in (None, *QUANTISED_ROWS):
            known = ", ".join(QUANTISED_ROWS)
            raise ValueError(f"cache_format is {self.cache_format!r}; known are {known}")
        latent = self.source_kv_lora_rank is not None
        if self.q_lora_rank is not None and not latent:
            raise ValueError(f"q_lora_rank is {self.q_lora_rank}: low-rank queries are unknown")
        if latent and (self.mla_form != "compress" or not self.source_qk_rope_head_dim):
            raise ValueError("source_kv_lora_rank calls for compress and source_qk_rope_head_dim")
        if self.qk_rope_head_dim % (2 * self.rope_blocks):
            raise ValueError(
                f"qk_rope_head_dim {self.qk_rope_head_dim} is not {self.rope_blocks} "
                "(rope_blocks) blocks of pairs"
            )
        ranks = self.kv_lora_ranks
        if ranks is not None and (
            self.mla_form != "compress"
            or len(ranks) != self.num_hidden_layers
            or min(ranks) < 1
            or max(ranks) != self.kv_lora_rank
        ):
            raise ValueError(
                f"kv_lora_ranks must give {self.num_hidden_layers} layers of form compress a rank"
                f" each, the largest of them kv_lora_rank {self.kv_lora_rank}"
            )
        if self.rope_inv_freq is not None:
            wanted = [self.qk_rope_head_dim // 2] * self.num_hidden_layers
            if [len(layer) for layer in self.rope_inv_freq] != wanted or self.rope_blocks != 1:
                raise ValueError(
                    f"rope_inv_freq must give {self.num_hidden_layers} layers"
                    f" {self.qk_rope_head_dim // 2} frequencies each, in one block"
                )
        if self.indirect and not (self.source_kv_heads and self.source_head_dim):
            raise ValueError(
                "qk_norm and source_kv_lora_rank call for source_kv_heads and source_head_dim"
            )
        if self.query_up and (self.mla_form != "compress" or not self.source_head_dim):
            raise ValueError("query_up calls for the form compress and source_head_dim")
        if self.mla_form == "equal-cache" and self.qk_nope_head_dim:
            raise ValueError("the equal-cache form has qk_nope_head_dim 0")
        if self.mla_form == "article" and self.kv_lora_rank % 2:
            raise ValueError(f"kv_lora_rank {self.kv_lora_rank} is odd: two halves are cached")

    def rope_schedule(self, layer_type: str | None = None) -> LatentConfig:
        """A copy whose heads are one rotary block wide: what transformers' rope functions read."""
        schedule = copy.copy(self)
        schedule.head_dim = self.qk_rope_head_dim // self.rope_blocks
        if layer_type is not None:
            schedule.rope_parameters = self.rope_parameters[layer_type]
        return schedule

    def validate_rope(self) -> None:
        """transformers' own checks, of the dims that turn."""
        super(LatentConfig, self.rope_schedule()).validate_rope()  # type: ignore[misc]

    @property
    def indirect(self) -> bool:
        """Whether the latent is linear in something else than the layer's input."""
        return bool(self.qk_norm or self.source_kv_lora_rank)

    @property
    def maps_queries(self) -> bool:
        """Whether queries go through a matrix per head, ``q_up_proj``."""
        return self.indirect or self.query_up or self.mla_form == "equal-cache"

    @property
    def query_dim(self) -> int:
        """Size of one projected query head."""
        if (self.indirect or self.query_up) and self.source_head_dim:
            return self.source_head_dim
        if self.mla_form == "compress":
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.qk_rope_head_dim // self.rope_blocks

    def layer_rank(self, layer_idx: int) -> int:
        """Latent rank C of this layer."""
        return self.kv_lora_rank if self.kv_lora_ranks is None else self.kv_lora_ranks[layer_idx]

    def layer_window(self, layer_idx: int) -> int | None:
        """Tokens a query of this layer sees, itself included; None for all."""
        types = getattr(self, "layer_types", None)
        if types is not None and types[layer_idx] != "sliding_attention":
            return None
        return getattr(self, "sliding_window", None)

    def layer_rope(self, layer_idx: int) -> tuple[bool, str | None]:
        """Whether a layer rotates, and the layer type whose schedule it has where types differ."""
        listed = getattr(self, "no_rope_layers", None)
        rotated = listed is None or bool(listed[layer_idx])
        types = getattr(self, "layer_types", None)
        if types is None or types[layer_idx] not in (self.rope_parameters or {}):
            return rotated, None
        return rotated, types[layer_idx]


def _latent(family: str) -> type[LatentConfig]:
    """The config class of a family's converted models."""
    classes = FAMILIES[family].classes
    source: Any = next(
        found
        for name in (f"{classes}TextConfig", f"{classes}Config")
        if (found := getattr(transformers, name, None)) and found.model_type == family
    )
    plan = {k: v for k, v in (source.base_model_tp_plan or {}).items() if ".self_attn." not in k}
    fields = {
        "model_type": f"mla_{family}",
        "base_model_tp_plan": plan,
        "__module__": __name__,
        "__doc__": f"A {source.__name__.removesuffix('Config')} whose attention is latent.",
    }
    return strict(type(f"MLA{classes}Config", (LatentConfig, source), fields))


CONVERTED = tuple(name for name, row in FAMILIES.items() if not row.obstacle)
"""Families that have a config class and model classes here: ``MLALlamaConfig`` and so on."""

CONFIGS = {family: _latent(family) for family in CONVERTED}


def __getattr__(name: str) -> type[LatentConfig]:
    """The config classes by name, as pickle and ``from mlakit.nn.configs import`` ask for them."""
    for config in CONFIGS.values():
        if config.__name__ == name:
            return config
    raise AttributeError(f"{__name__} has no {name}")
