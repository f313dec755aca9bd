"""A converted model in DeepSeek-V3's own shape: the same function, in classes that engines have.

Their latent passes an RMSNorm that ours does not need. With ``eps`` far above the mean square of
what it norms it divides by a constant: the latent's rows are stored ``2^k`` times smaller, the
norm's weight brings them back, and the little that is left of the factor goes into ``kv_b_proj``
(the cached latent keeps its size; only exponents of stored numbers change).

``eps`` has to be 1e-6, which transformers' class has built in. Where the source's own norms have
another, the whole residual stream is scaled by ``sqrt(1e-6 / eps)``:
``RMSNorm(b h; b^2 eps) = RMSNorm(h; eps)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mlakit.engines.shapes import Shape, padded
from mlakit.spec import AttentionSpec

if TYPE_CHECKING:
    import torch

EPS = 1e-6
"""Of DeepSeek's latent norm in transformers, whatever the config says."""

SMALLEST = 2.0**-16
"""The mean square of a stored latent, as a share of eps, is at most this: its norm is constant to
one part in 2^17, which float32 products of a few hundred terms do not tell from rounding."""

UNUSED = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 64,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "num_nextn_predict_layers": 0,
    "num_mtp_modules": 0,
}
"""Of experts that no layer has: engines read these as numbers nevertheless."""


@dataclass(frozen=True)
class Stock:
    """The maths of one export.

    Args:
        config: ``config.json`` of the converted model.
        shape: sizes to export to.
        biased: whether some layer has a bias: then all have, one switch for all in the stock class.
    """

    config: dict[str, Any]
    shape: Shape
    biased: bool = False
    unties: ClassVar[bool] = True

    @property
    def stream(self) -> float:
        """What the residual stream is multiplied with."""
        return math.sqrt(EPS / self.config["rms_norm_eps"])

    @property
    def shrink(self) -> float:
        """What latents are stored times: a power of two."""
        largest = self.config["latent_norm_eps"] * 2.0**-24  # mean square, by the norm's own bound
        return float(2.0 ** math.floor(math.log2(math.sqrt(SMALLEST * EPS / largest))))

    @property
    def gain(self) -> float:
        """The norm's weight: a power of two, so that 16 bits hold it exactly."""
        return float(2.0 ** round(math.log2(math.sqrt(EPS) / self.shrink)))

    @property
    def left(self) -> float:
        """What the cached latent is multiplied with after all."""
        return self.gain * self.shrink / math.sqrt(EPS)

    def attention(
        self, tensors: dict[str, torch.Tensor], layer: AttentionSpec
    ) -> dict[str, torch.Tensor]:
        """A layer's attention in the stock class's layout.

        Args:
            tensors: the layer's own, named below ``self_attn.``.
            layer: its sizes.

        Returns:
            ``q_proj [H (N + R), D]``, ``kv_a_proj_with_mqa [C + R, D]``, ``kv_a_layernorm [C]``,
            ``kv_b_proj [H (N + V), C]``, ``o_proj [D, H V]``, biases of the last and of the
            row; float64, rotary pairs interleaved.
        """
        own = {name: tensor.double() for name, tensor in tensors.items()}
        rank, shape = layer.kv_lora_rank or 0, self.shape
        down, bias = own["kv_a_proj_with_mqa.weight"], own.get("kv_a_proj_with_mqa.bias")
        found = {
            "q_proj.weight": self._queries(own, layer),
            "kv_a_proj_with_mqa.weight": self._row(down, rank),
            "kv_a_layernorm.weight": down.new_full((shape.rank,), self.gain),
            "kv_b_proj.weight": self._ups(own["kv_b_proj.weight"], layer),
            "o_proj.weight": self.stream * self._outputs(own["o_proj.weight"], layer),
        }
        if self.biased:
            output = own.get("o_proj.bias", down.new_zeros(len(own["o_proj.weight"])))
            latent = down.new_zeros(len(down)) if bias is None else bias
            found["o_proj.bias"] = self.stream * output
            found["kv_a_proj_with_mqa.bias"] = self._row(latent[:, None], rank)[:, 0]
        return found

    def _queries(self, own: dict[str, torch.Tensor], layer: AttentionSpec) -> torch.Tensor:
        heads, nope = layer.num_attention_heads, layer.qk_nope_head_dim or 0
        query = own["q_proj.weight"].unflatten(0, (heads, -1))
        if "q_up_proj.weight" in own:
            query = own["q_up_proj.weight"] @ query
        kept, turned = query[:, :nope], query[:, nope:]
        scale = (layer.softmax_scale or 1.0) * math.sqrt(self.shape.nope + self.shape.rope)
        whole = _cat([padded(kept, self.shape.nope), self._interleaved(turned)])
        return (scale * whole).flatten(0, 1)

    def _row(self, down: torch.Tensor, rank: int) -> torch.Tensor:
        """Latent rows, smaller, above rotary ones."""
        latent = padded(self.shrink * down[None, :rank], self.shape.rank)
        return _cat([latent, self._interleaved(down[None, rank:])])[0]

    def _ups(self, up: torch.Tensor, layer: AttentionSpec) -> torch.Tensor:
        nope = layer.qk_nope_head_dim or 0
        heads = up.unflatten(0, (layer.num_attention_heads, -1)) / self.left
        both = (
            padded(heads[:, :nope], self.shape.nope),
            padded(heads[:, nope:], self.shape.value),
        )
        whole = _cat(both).flatten(0, 1)
        return padded(whole, self.shape.rank)

    def _outputs(self, output: torch.Tensor, layer: AttentionSpec) -> torch.Tensor:
        heads = output.mT.unflatten(0, (layer.num_attention_heads, -1))
        return padded(heads, self.shape.value).flatten(0, 1).mT

    def _interleaved(self, rows: torch.Tensor) -> torch.Tensor:
        """From ``[real parts | imaginary parts]`` to pairs; further frequencies get zeros."""
        pairs = rows.unflatten(1, (2, -1)).transpose(1, 2)  # [n, R/2, 2, D]
        step = self.shape.rope // rows.shape[1]
        spread = pairs.new_zeros(len(rows), self.shape.rope // 2, *pairs.shape[2:])
        spread[:, ::step] = pairs
        return spread.flatten(1, 2)

    def other(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """A tensor outside of attention under the names and at the scale of the stock class."""
        if name.endswith("mlp.gate_up_proj.weight"):
            parts = zip(("gate", "up"), tensor.chunk(2), strict=True)
            return {name.replace("gate_up", part): rows for part, rows in parts}
        scaled = name.endswith("mlp.down_proj.weight") or name == "model.embed_tokens.weight"
        return {name: self.stream * tensor.double() if scaled else tensor}

    def exported_config(self) -> dict[str, Any]:
        """``config.json`` of the result."""
        own, shape = self.config, self.shape
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                 "num_attention_heads", "max_position_embeddings", "hidden_act",
                 "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id",
                 "rope_parameters", "dtype")  # fmt: skip
        return UNUSED | {name: own[name] for name in names if name in own} | {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "num_key_value_heads": own["num_attention_heads"],
            "first_k_dense_replace": own["num_hidden_layers"],
            "q_lora_rank": None,
            "kv_lora_rank": shape.rank,
            "qk_rope_head_dim": shape.rope,
            "qk_nope_head_dim": shape.nope,
            "v_head_dim": shape.value,
            "rope_interleave": True,
            "attention_bias": self.biased,
            "attention_dropout": 0.0,
            "rms_norm_eps": EPS,
            "tie_word_embeddings": False,
            "use_cache": True,
        }  # fmt: skip

    def files(self) -> dict[str, str]:
        """Texts to write beside the weights: none, the class is in the engine."""
        return {}


def _cat(parts: list[torch.Tensor] | tuple[torch.Tensor, ...]) -> torch.Tensor:
    import torch

    return torch.cat(list(parts), 1)
