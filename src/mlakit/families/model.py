"""A whole checkpoint from its config, the tensors it must hold, and whether it can be converted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlakit.errors import UnsupportedModelError
from mlakit.families.readers import Config, rope_of, size
from mlakit.families.rows import FAMILIES, Family
from mlakit.spec import AttentionSpec, FeedForwardSpec, ModelSpec, RopeSpec

Shapes = dict[str, tuple[int, ...]]

DENSE = ("gate_proj", "up_proj", "down_proj")

STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary schedules that do not change with the length of the text: those can be converted."""


def read_model(config: Config) -> ModelSpec:
    """Describes a checkpoint from its ``config.json``.

    Args:
        config: the parsed file; any of the families of ``FAMILIES``.

    Returns:
        ModelSpec with one AttentionSpec and one FeedForwardSpec per layer.

    Raises:
        UnsupportedModelError: unknown ``model_type``, or a key that is missing or makes no sense.
    """
    name = config.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise UnsupportedModelError(
            "config.json has no model_type"
            if name is None
            else f"config.json has model_type {name!r}, a family mlakit does not know",
            remedy=_known(config),
        )
    filled = {**family.defaults, **config}
    count = size(filled, "num_hidden_layers")
    types = _layer_types(filled, family, count)
    by_type = {kind: _attention(filled, family, *kind) for kind in dict.fromkeys(types)}
    layers = with_ranks([by_type[kind] for kind in types], filled.get("kv_lora_ranks"))
    dtype = filled.get("dtype") or filled.get("torch_dtype")
    return ModelSpec(
        model_type=family.name,
        family=family.name,
        hidden_size=size(filled, "hidden_size"),
        vocab_size=size(filled, "vocab_size"),
        max_position_embeddings=size(filled, "max_position_embeddings"),
        tie_word_embeddings=bool(filled.get("tie_word_embeddings", False)),
        dtype=dtype.removeprefix("torch.") if isinstance(dtype, str) else "float32",
        layers=layers,
        feed_forwards=tuple(family.feed_forward(filled, layer) for layer in range(count)),
        norms_per_layer=len(family.norms),
        norm_bias=family.norm_bias,
        config=dict(config),
    )


def with_ranks(
    layers: Sequence[AttentionSpec], ranks: Sequence[int] | None
) -> tuple[AttentionSpec, ...]:
    """Latent layers at a rank each; as they are where there are no ranks."""
    if ranks is None:
        return tuple(layers)
    if len(ranks) != len(layers):
        raise UnsupportedModelError(
            f"config.json has kv_lora_ranks of {len(ranks)} layers and {len(layers)} layers"
        )
    return tuple(
        replace(layer, kv_lora_rank=rank) for layer, rank in zip(layers, ranks, strict=True)
    )


def tensor_shapes(spec: ModelSpec, *, fused_experts: bool = False) -> Shapes:
    """Name and shape of every tensor that a checkpoint of this model holds.

    Args:
        spec: the model.
        fused_experts: the experts of a layer lie in two tensors, as in transformers' modules,
            and not in three of each expert's own.
    """
    family = FAMILIES[spec.family]
    hidden = (spec.hidden_size,)
    shapes: Shapes = {family.embedding: (spec.vocab_size, spec.hidden_size)}
    for index, (attention, feed_forward) in enumerate(zip(spec.layers, spec.feed_forwards)):
        prefix, stored = family.attention_prefix(index), family.layout.stored_shapes(attention)
        shapes |= {prefix + name: shape for name, shape in stored.items()}
        prefix = family.layer(index)
        for norm in family.norms:
            shapes |= {f"{prefix}{norm}.{kind}": hidden for kind in family.norm_tensors}
        shapes |= _feed_forward_shapes(family, prefix, feed_forward, fused_experts)
    shapes |= {f"{family.final_norm}.{kind}": hidden for kind in family.norm_tensors}
    if not spec.tie_word_embeddings:
        shapes[family.output] = (spec.vocab_size, spec.hidden_size)
    return shapes


def _known(config: Config) -> str:
    inner = config.get("text_config")
    kind = inner.get("model_type") if isinstance(inner, Mapping) else None
    if kind in FAMILIES:
        return f"it reads more than text; its text model alone, of model_type {kind}, can be read"
    return f"known families: {', '.join(FAMILIES)}"


def rope_parameters(layers: Sequence[AttentionSpec], family: Family) -> dict[str, Any]:
    """transformers' ``rope_parameters`` of a model: one dict, or one for each layer type."""
    ropes = [layer.rope for layer in layers]
    if not family.rope_by_type:
        return next(rope.as_rope_parameters() for rope in ropes if rope is not None)
    kinds = ["sliding_attention" if layer.sliding_window else "full_attention" for layer in layers]
    return {kind: rope.as_rope_parameters() for kind, rope in zip(kinds, ropes) if rope is not None}


def convertible(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    """The model's description, if mlakit can convert the checkpoint.

    Args:
        config: the parsed ``config.json``.
        shapes: every tensor of the checkpoint with its shape (``Checkpoint.shapes``).

    Raises:
        UnsupportedModelError: names the config key or the tensor that stands in the way, and why.
    """
    spec = read_model(config)
    family = FAMILIES[spec.family]
    if family.obstacle:
        raise _refusal(f"model_type {spec.family!r}", family.obstacle)
    if config.get("quantization_config"):
        raise _refusal("quantization_config", "the weights are quantised", "convert the original")
    for key, reason in family.refused.items():
        if config.get(key):
            raise _refusal(key, reason)
    _check_rope(spec)
    if spec.family == "mistral" and len({layer.sliding_window for layer in spec.layers}) > 1:
        raise _refusal("layer_types", "transformers' mistral gives every layer the same window")
    _check_tensors(spec, shapes)
    return spec


def _check_rope(spec: ModelSpec) -> None:
    family = FAMILIES[spec.family]
    config = {**family.defaults, **spec.config}
    ropes = [layer.rope for i, layer in enumerate(spec.layers) if family.rotated(config, i)]
    if not ropes or None in ropes:
        raise _refusal("rope_parameters", "layers with no rotary embeddings")
    if not family.rope_by_type and any(rope != ropes[0] for rope in ropes):
        raise _refusal("rope_parameters", "layers with different rotary embeddings")
    for rope in ropes:
        if rope is not None:
            _check_schedule(rope, spec.layers[0], family)
    for layer in spec.layers:
        if layer.absorbed.head_dim % 2:
            raise _refusal("head_dim", f"{layer.absorbed.head_dim} dimensions are no pairs")


def _check_schedule(rope: RopeSpec, layer: AttentionSpec, family: Family) -> None:
    head_dim = layer.qk_rope_head_dim or layer.head_dim
    if rope.rope_type not in STATIC_ROPE:
        raise _refusal(
            f"rope_type {rope.rope_type!r}",
            "its frequencies change with the length of the text, so they cannot be folded into"
            " weights",
            f"set it to one of {', '.join(STATIC_ROPE)} if you do not need longer texts",
        )
    if rope.dim < head_dim and not family.partial_rotary:
        raise _refusal(
            "partial_rotary_factor",
            f"only {rope.dim} of {head_dim} dimensions of a head are rotated, which transformers'"
            f" {family.name} does not do",
        )


def _check_tensors(spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]]) -> None:
    fused = any(name.endswith(".experts.gate_up_proj") for name in shapes)
    expected = tensor_shapes(spec, fused_experts=fused)
    for name, shape in expected.items():
        if name not in shapes:
            raise UnsupportedModelError(
                f"The checkpoint has no tensor {name}, which config.json calls for"
                f" with shape {list(shape)}",
                remedy="check that config.json belongs to these weights",
            )
        if tuple(shapes[name]) != shape:
            raise UnsupportedModelError(
                f"{name} has shape {list(shapes[name])} in the checkpoint,"
                f" but config.json means {list(shape)}",
                remedy="check that config.json belongs to these weights",
            )
    for name in shapes:
        if name in expected or "rotary_emb" in name or beyond_last_layer(spec, name):
            continue
        if ".self_attn." in name:
            raise UnsupportedModelError(
                f"{name} is in the checkpoint, but {spec.family} attention as config.json"
                " describes it has no such tensor, so it would be lost",
                remedy="check that config.json belongs to these weights",
            )


def beyond_last_layer(spec: ModelSpec, name: str) -> bool:
    """Whether a tensor is of the layers that predict further tokens, which no class here reads."""
    if not spec.config.get("num_nextn_predict_layers"):
        return False
    parts = name.split(".")
    return (
        parts[:2] == ["model", "layers"]
        and parts[2].isdigit()
        and int(parts[2]) >= spec.num_hidden_layers
    )


def _refusal(key: str, reason: str, remedy: str = "") -> UnsupportedModelError:
    remedy = remedy or "mlakit inspect and eval work on it as it is"
    return UnsupportedModelError(f"Cannot convert: {key}: {reason}", remedy=remedy)


def _layer_types(config: Config, family: Family, count: int) -> list[tuple[str, bool]]:
    """Of each layer whether it has a window, as transformers names it, and a rotation."""
    given = config.get("layer_types")
    if given is None:
        given = [
            "sliding_attention" if family.windowed(config, layer) else "full_attention"
            for layer in range(count)
        ]
    if len(given) != count:
        raise UnsupportedModelError(
            f"config.json names {len(given)} layer_types for num_hidden_layers {count}"
        )
    for kind in given:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(f"config.json has layer_types {kind!r}, unknown to mlakit")
    return [(kind, family.rotated(config, layer)) for layer, kind in enumerate(given)]


def _attention(config: Config, family: Family, layer_type: str, rotated: bool) -> AttentionSpec:
    sliding = layer_type == "sliding_attention" and config.get("use_sliding_window", True)
    window = size(config, "sliding_window") if sliding and config.get("sliding_window") else None
    return family.attention(config, rope_of(config, layer_type) if rotated else None, window)


def _feed_forward_shapes(
    family: Family, prefix: str, spec: FeedForwardSpec, fused_experts: bool
) -> Shapes:
    width, hidden = spec.intermediate_size, spec.hidden_size
    if not spec.num_experts:
        if family.fused_gate:
            fused = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}
            return {f"{prefix}mlp.{name}.weight": shape for name, shape in fused.items()}
        return _gated(f"{prefix}mlp.", DENSE, spec, width)
    block = f"{prefix}mlp." if fused_experts else f"{prefix}{family.expert_block}."
    shapes: Shapes = {f"{block}gate.weight": (spec.num_experts, hidden)}
    if spec.router_buffer:
        shapes[f"{block}gate.e_score_correction_bias"] = (spec.num_experts,)
    if fused_experts:
        shapes[f"{block}experts.gate_up_proj"] = (spec.num_experts, 2 * width, hidden)
        shapes[f"{block}experts.down_proj"] = (spec.num_experts, hidden, width)
    else:
        for expert in range(spec.num_experts):
            shapes |= _gated(f"{block}experts.{expert}.", family.expert_projections, spec, width)
    if spec.shared_intermediate_size:
        shared = f"{block}{family.shared_expert}"
        shapes |= _gated(f"{shared}.", DENSE, spec, spec.shared_intermediate_size)
        if spec.shared_gate:
            shapes[f"{shared}_gate.weight"] = (1, hidden)
    return shapes


def _gated(prefix: str, names: tuple[str, str, str], spec: FeedForwardSpec, width: int) -> Shapes:
    sizes = ((width, spec.hidden_size), (width, spec.hidden_size), (spec.hidden_size, width))
    shapes: Shapes = {f"{prefix}{name}.weight": size for name, size in zip(names, sizes)}
    if spec.bias:
        shapes |= {f"{prefix}{name}.bias": size[:1] for name, size in zip(names, sizes)}
    return shapes
