"""A converted model in vLLM: Llama's decoder around vLLM's own latent attention.

vLLM's `MLAAttention` takes the cached row as an argument, so no norm stands on the latent here:
biases, norms on queries and keys, and frequencies of every layer's own cost nothing. Tensor
parallelism shards heads and the feed-forward block; the latent is on every rank, as it is for any
latent attention there.

Imported by vLLM only (see ``vllm_plugin``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.activation import get_act_and_mul_fn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    extract_layer_index,
    is_pp_missing_parameter,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from mlakit.engines.fitting import Fitting, layer_frequencies
from mlakit.engines.shapes import Shape
from mlakit.engines.vllm_attention import LatentAttention
from mlakit.errors import MlakitError
from mlakit.families import FAMILIES, read_model


class FeedForward(nn.Module):
    """Llama's gated block."""

    def __init__(self, config: Any, quant: Any, prefix: str) -> None:
        super().__init__()
        hidden, wide = config.hidden_size, config.intermediate_size
        bias = getattr(config, "mlp_bias", False)
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden, [wide] * 2, bias=bias, quant_config=quant, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            wide, hidden, bias=bias, quant_config=quant, prefix=f"{prefix}.down_proj"
        )
        self.act_fn = get_act_and_mul_fn(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, D]``."""
        return self.down_proj(self.act_fn(self.gate_up_proj(x)[0]))[0]


class DecoderLayer(nn.Module):
    """Llama's decoder layer with latent attention."""

    def __init__(self, vllm_config: Any, attention: LatentAttention, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.self_attn = attention
        self.mlp = FeedForward(config, vllm_config.quant_config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The stream as what was added last ``[T, D]`` and everything before."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions, hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": 0, "positions": 0, "intermediate_tensors": 0, "inputs_embeds": 0,
    }
)  # fmt: skip
class LatentModel(nn.Module):
    """The decoder."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        layers = read_model(config.stored).layers
        shape = fitted_shape(config)
        frequencies, factor = layer_frequencies(config.stored, shape.rope)

        def layer(prefix: str) -> DecoderLayer:
            index, name = extract_layer_index(prefix), f"{prefix}.self_attn"
            attention = LatentAttention(
                vllm_config,
                layers[index],
                shape,
                frequencies[index],
                factor,
                config.rms_norm_eps,
                name,
            )
            return DecoderLayer(vllm_config, attention, prefix)

        group = get_pp_group()
        self.embed_tokens: Any = PPMissingLayer()
        if group.is_first_rank or (config.tie_word_embeddings and group.is_last_rank):
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config
            )
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers, layer, prefix=f"{prefix}.layers"
        )
        self.norm: nn.Module = PPMissingLayer()
        if group.is_last_rank:
            self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        """Hidden states of T tokens, or what the next stage of a pipeline goes on with."""
        if get_pp_group().is_first_rank:
            hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            residual = None
        else:
            if intermediate_tensors is None:
                raise MlakitError("a later pipeline stage was given nothing to go on with")
            hidden_states = intermediate_tensors["hidden_states"]
            residual = intermediate_tensors["residual"]
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden_states, residual = layer(positions, hidden_states, residual)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states, "residual": residual})
        return self.norm(hidden_states, residual)[0]


class LatentForCausalLM(nn.Module, SupportsPP):
    """A converted model of a family with Llama's decoder layer."""

    packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}  # noqa: RUF012

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        self.model: Any = LatentModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head: Any = PPMissingLayer()
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Token ids ``[T]`` to ``[T, D]``."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        """As the decoder's."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """``[T, D]`` to logits."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Reads the folder's tensors; attention as soon as a layer's are complete."""
        layers = read_model(self.config.stored).layers
        family = FAMILIES[self.config.model_type]
        wanted = {
            family.attention_prefix(index): (layer, set(layer.tensor_shapes()))
            for index, layer in enumerate(layers)
        }
        waiting: dict[str, dict[str, Tensor]] = defaultdict(dict)
        loaded: set[str] = set()
        for name, tensor in weights:
            prefix, found, rest = name.partition("self_attn.")
            prefix += found
            if prefix not in wanted:
                loaded |= self.load(name, tensor)
                continue
            waiting[prefix][rest] = tensor
            layer, names = wanted[prefix]
            if names == set(waiting[prefix]):
                fitted = Fitting(layer, fitted_shape(self.config))
                for rest, value in fitted.attention(waiting.pop(prefix)).items():
                    if rest != "kv_a_layernorm.weight":  # the identity
                        loaded |= self.load(prefix + rest, value)
        for prefix, tensors in waiting.items():
            difference = ", ".join(sorted(wanted[prefix][1] ^ set(tensors)))
            raise MlakitError(f"{prefix} lacks or has in excess: {difference}")
        return loaded

    def load(self, name: str, tensor: Tensor) -> set[str]:
        """Copies a tensor, or this rank's part, to where it belongs."""
        if is_pp_missing_parameter(name, self) or (
            name == "lm_head.weight" and self.config.tie_word_embeddings
        ):
            return set()
        shards: list[tuple[int | None, Tensor]] = [(None, tensor)]
        if "gate_up_proj" in name:
            shards = list(enumerate(tensor.chunk(2)))
        for shard, part in enumerate(("gate_proj", "up_proj")):
            if f".{part}." in name:
                name, shards = name.replace(part, "gate_up_proj"), [(shard, tensor)]
        parameter = self.get_parameter(name)
        loader = getattr(parameter, "weight_loader", default_weight_loader)
        for index, rows in shards:
            rows = rows.to(parameter.dtype) if rows.dtype == torch.float64 else rows
            loader(parameter, rows) if index is None else loader(parameter, rows, index)
        return {name}


def fitted_shape(config: Any) -> Shape:
    """The sizes that ``fit`` gave a config."""
    return Shape(
        config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim
    )
