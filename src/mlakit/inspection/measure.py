"""``inspect``: what a checkpoint costs now, and as MHA, MQA and latent attention.

Reads config.json and safetensors headers only, and never imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlakit import account
from mlakit.checkpoint import Checkpoint, open_checkpoint
from mlakit.errors import UnsupportedModelError, UsageError
from mlakit.families import convertible, read_model, tensor_shapes
from mlakit.spec import BLOCK_SIZE, AttentionSpec, ModelSpec

ENGINE_SIZES = ((512, 64), (448, 64), (256, 64))
"""(kv_lora_rank, qk_rope_head_dim) that stock engines have GPU kernels for."""

KEPT_SHARES = (2, 4, 8)
"""The other sizes shown: a half, a quarter and an eighth of the model's own cache."""

SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class LayerGroup:
    """Layers that are alike.

    Attributes:
        layers: their indices.
        attention: kind and sizes in words.
        feed_forward: the same of the feed-forward block.
        kind: mha, gqa, mqa or mla.
        attention_parameters: of one layer.
        cache_width: numbers that one layer caches per token.
        cache_bytes_per_token: of one layer.
        sliding_window: tokens that a layer looks back on; None for all.
    """

    layers: tuple[int, ...]
    attention: str
    feed_forward: str
    kind: str
    attention_parameters: int
    cache_width: int
    cache_bytes_per_token: int
    sliding_window: int | None


@dataclass(frozen=True)
class Variant:
    """The model with one kind of attention in all layers.

    Attributes:
        name: ``now``, ``source`` (what a converted model came from), ``mha``, ``mqa`` or ``mla``.
        attention: kind and sizes in words.
        mla_form: of latent attention, else None; likewise the next two.
        kv_lora_rank: C.
        qk_rope_head_dim: R.
        cache_bytes_per_token: all layers together, while no window is full.
        share_of_own: of the model's own bytes per token.
        share_of_mha: of the bytes of multi-head attention with as many heads.
        cache_bytes: at the context and batch asked for. Keys and values as transformers holds
            them: a layer with a window keeps only that much. Latents as ``LatentCache`` holds
            them: whole pages, nothing dropped.
        longest_context: tokens per sequence that fit in memory beside the weights; None for any.
        flops_per_token: of one decoded token at that context.
        bytes_moved_per_token: weights (a batch shares them) and cache, at that context.
        layer: the one that caches most, whole.
    """

    name: str
    attention: str
    mla_form: str | None
    kv_lora_rank: int | None
    qk_rope_head_dim: int | None
    cache_bytes_per_token: int
    share_of_own: float
    share_of_mha: float
    cache_bytes: int
    longest_context: int | None
    flops_per_token: float
    bytes_moved_per_token: float
    layer: AttentionSpec


@dataclass(frozen=True)
class Inspection:
    """Everything ``mlakit inspect`` prints.

    Attributes:
        source: folder or hub id.
        weight_bytes: of the tensors in the headers, or counted from the config if there are none.
        weights_present: whether there are headers at all.
        context: tokens per sequence that the costs are given for.
        memory: bytes that weights and cache may take together.
        conversion: ``yes``, or why ``convert`` would refuse.
        notes: what the numbers leave out, and where config and headers disagree.
    """

    source: str
    model_type: str
    dtype: str
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    parameters: dict[str, int]
    weight_bytes: int
    weights_present: bool
    layers: tuple[LayerGroup, ...]
    context: int
    batch: int
    memory: int
    variants: tuple[Variant, ...]
    conversion: str
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def inspect(
    model: str | Path,
    *,
    context: int | None = None,
    batch: int = 1,
    memory: int | str = "24GiB",
    kv_lora_rank: int | None = None,
    qk_rope_head_dim: int | None = None,
) -> Inspection:
    """Describes a checkpoint from its config and headers.

    Args:
        model: folder (its config.json is enough) or hub id.
        context: tokens per sequence; the model's longest if not given.
        batch: sequences decoded together.
        memory: of the device, e.g. ``24GiB``.
        kv_lora_rank: show this size of latent attention too.
        qk_rope_head_dim: its rotary size; the model's head size if not given.

    Raises:
        UnsupportedModelError: the model is of no family that mlakit knows.
        MlakitError: files are missing or damaged.
    """
    checkpoint = open_checkpoint(model, weights=False)
    spec = _with_stored_dtype(read_model(checkpoint.config), checkpoint)
    context = spec.max_position_embeddings if context is None else context
    if context < 1 or batch < 1:
        raise UsageError(f"context {context} and batch {batch} must be at least 1")
    limit = account.parse_bytes(memory) if isinstance(memory, str) else memory
    counted = account.parameters(spec)
    weight_bytes = checkpoint.nbytes_total or counted.total * account.ITEMSIZE[spec.dtype]
    asked = None
    if kv_lora_rank is not None:
        asked = (kv_lora_rank, qk_rope_head_dim or spec.layers[0].head_dim)
    step = _Step(spec, context, batch, limit, weight_bytes)
    return Inspection(
        source=str(model),
        model_type=spec.model_type,
        dtype=spec.dtype,
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
        max_position_embeddings=spec.max_position_embeddings,
        parameters={**asdict(counted), "total": counted.total, "active": counted.active},
        weight_bytes=weight_bytes,
        weights_present=bool(checkpoint.names),
        layers=_groups(spec),
        context=context,
        batch=batch,
        memory=limit,
        variants=tuple(step.variant(name, layers) for name, layers in _candidates(spec, asked)),
        conversion=_conversion(spec, checkpoint),
        notes=tuple(_notes(spec, checkpoint, context, batch)),
    )


@dataclass(frozen=True)
class _Step:
    """The circumstances that every variant is judged under."""

    spec: ModelSpec
    context: int
    batch: int
    memory: int
    weight_bytes: int

    def variant(self, name: str, layers: Sequence[AttentionSpec]) -> Variant:
        itemsize = account.ITEMSIZE[self.spec.dtype]
        own, mha, here = (
            account.cache_bytes_per_token(these, itemsize)
            for these in (self.spec.layers, [account.as_mha(x) for x in self.spec.layers], layers)
        )
        changed = replace(self.spec, layers=tuple(layers))
        per_parameter = self.weight_bytes / account.parameters(self.spec).total
        weights = per_parameter * account.parameters(changed).total
        pages = BLOCK_SIZE if layers[0].kind == "mla" else None
        cost = account.decode_cost(changed, self.context, self.batch, per_parameter, itemsize)
        return Variant(
            name=name,
            attention=_span(layers),
            mla_form=layers[0].mla_form,
            kv_lora_rank=max((layer.kv_lora_rank or 0 for layer in layers), default=0) or None,
            qk_rope_head_dim=layers[0].qk_rope_head_dim,
            cache_bytes_per_token=here,
            share_of_own=here / own,
            share_of_mha=here / mha,
            cache_bytes=account.cache_bytes(layers, self.batch, self.context, itemsize, pages),
            longest_context=account.longest_context(
                layers, self.memory, weights, self.batch, itemsize, pages
            ),
            flops_per_token=cost.flops,
            bytes_moved_per_token=cost.nbytes,
            layer=max(layers, key=lambda layer: layer.cache_width),
        )


def describe_attention(spec: AttentionSpec) -> str:
    """One layer in a few words, e.g. ``gqa 32/8 x 128, window 4,096``."""
    words = [_sizes(spec)]
    if spec.sliding_window is not None:
        words.append(f"window {spec.sliding_window:,}")
    if spec.qk_norm:
        words.append("qk-norm")
    if spec.logit_softcap:
        words.append(f"softcap {spec.logit_softcap:g}")
    return ", ".join(words)


def _span(layers: Sequence[AttentionSpec]) -> str:
    """The sizes of all layers; of ranks that differ the smallest and the largest."""
    ranks = sorted({layer.kv_lora_rank or 0 for layer in layers})
    if len(ranks) == 1 or not ranks[0]:
        return _sizes(layers[0])
    return f"mla {ranks[0]} to {ranks[-1]}+{layers[0].qk_rope_head_dim}"


def _sizes(spec: AttentionSpec) -> str:
    heads, groups = spec.num_attention_heads, spec.num_key_value_heads
    if spec.kv_lora_rank is None:
        counts = f"{heads}" if spec.kind == "mha" else f"{heads}/{groups}"
        return f"{spec.kind} {counts} x {spec.head_dim}"
    if spec.mla_form == "article":
        return f"mla {spec.kv_lora_rank}, article's form"
    equal = ", equal-cache" if spec.mla_form == "equal-cache" else ""
    return f"mla {spec.kv_lora_rank}+{spec.qk_rope_head_dim}{equal}"


def _with_stored_dtype(spec: ModelSpec, checkpoint: Checkpoint) -> ModelSpec:
    """The dtype of the config, or of most weights where the config names none."""
    if spec.config.get("dtype") or spec.config.get("torch_dtype"):
        if spec.dtype not in account.ITEMSIZE:
            raise UnsupportedModelError(f"config.json has dtype {spec.dtype!r}, unknown to mlakit")
        return spec
    sizes: dict[str, int] = {}
    for name in checkpoint.names:
        dtype = checkpoint.dtype(name)
        sizes[dtype] = sizes.get(dtype, 0) + checkpoint.nbytes(name)
    most = max(sizes, key=lambda dtype: sizes[dtype], default="F32")
    return replace(spec, dtype=SAFETENSORS_DTYPES.get(most, spec.dtype))


def _groups(spec: ModelSpec) -> tuple[LayerGroup, ...]:
    pairs = list(zip(spec.layers, spec.feed_forwards))
    itemsize = account.ITEMSIZE[spec.dtype]
    groups = []
    for first, (layer, block) in enumerate(pairs):
        if (layer, block) in pairs[:first]:
            continue
        experts = f"{block.num_experts_per_tok} of {block.num_experts} experts x "
        shared = f" + {block.shared_intermediate_size:,}" if block.shared_intermediate_size else ""
        groups.append(
            LayerGroup(
                layers=tuple(i for i, pair in enumerate(pairs) if pair == (layer, block)),
                attention=describe_attention(layer),
                feed_forward=f"{experts if block.num_experts else ''}"
                f"{block.intermediate_size:,}{shared}",
                kind=layer.kind,
                attention_parameters=account.attention_parameters(layer),
                cache_width=layer.cache_width,
                cache_bytes_per_token=layer.cache_row_bytes(itemsize),
                sliding_window=layer.sliding_window,
            )
        )
    return tuple(groups)


def _candidates(
    spec: ModelSpec, asked: tuple[int, int] | None
) -> list[tuple[str, list[AttentionSpec]]]:
    """The variants to show: now, its source, MHA, MQA, then latent attention, widest first."""
    layers = list(spec.layers)
    found = [("now", layers)]
    origin = (spec.config.get("mlakit") or {}).get("source_attention")
    if origin:
        plain = [account.as_mha(layer) for layer in layers]
        size = {"num_key_value_heads": origin["num_key_value_heads"]}
        size |= {"head_dim": origin["head_dim"], "v_head_dim": origin["head_dim"]}
        found.append(("source", [replace(layer, **size) for layer in plain]))
    if layers[0].kind != "mha":
        found.append(("mha", [account.as_mha(layer) for layer in layers]))
    if layers[0].kind != "mqa":
        found.append(("mqa", [account.as_mqa(layer) for layer in layers]))
    if layers[0].kind != "mla":
        found.append(("mla", [account.as_equal_cache(layer) for layer in layers]))
    for rank, rope in sorted(_latent_sizes(layers[0], asked), key=lambda s: (-sum(s), s)):
        found.append(("mla", [account.as_mla(layer, rank, rope) for layer in layers]))
    return found


def _latent_sizes(layer: AttentionSpec, asked: tuple[int, int] | None) -> set[tuple[int, int]]:
    own, head = layer.cache_width, layer.head_dim
    sizes = {size for size in ENGINE_SIZES if sum(size) < own}
    if layer.kind != "mla":
        sizes |= {(own // share - head, head) for share in KEPT_SHARES if own // share > head}
    return sizes | ({asked} if asked else set())


def _conversion(spec: ModelSpec, checkpoint: Checkpoint) -> str:
    try:
        convertible(checkpoint.config, checkpoint.shapes or tensor_shapes(spec))
    except UnsupportedModelError as error:
        return error.message.removeprefix("Cannot convert: ")
    return "yes"


def _notes(spec: ModelSpec, checkpoint: Checkpoint, context: int, batch: int) -> list[str]:
    notes = []
    if checkpoint.names:
        notes += _disagreements(tensor_shapes(spec), checkpoint)
    else:
        notes.append("no weights here: every number is counted from config.json")
    if any(layer.sliding_window for layer in spec.layers):
        itemsize = account.ITEMSIZE[spec.dtype]
        whole = account.cache_bytes(spec.layers, batch, context, itemsize, block_size=1)
        notes.append(
            "keys and values of layers with a window are kept that far only, as in transformers;"
            f" an engine that keeps all needs {format_bytes(whole)} now; latent pages keep all"
        )
    if context > spec.max_position_embeddings:
        notes.append(f"the model was made for {spec.max_position_embeddings:,} tokens at most")
    return notes


def _disagreements(expected: dict[str, tuple[int, ...]], checkpoint: Checkpoint) -> list[str]:
    """Where the headers hold other tensors than the config describes."""
    missing = [name for name in expected if name not in checkpoint.shapes]
    extra = [name for name in checkpoint.names if name not in expected]
    other = [
        f"{name} is {list(checkpoint.shapes[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in checkpoint.shapes and checkpoint.shapes[name] != shape
    ]
    notes = []
    if other:
        notes.append(f"WARNING: {len(other)} tensors contradict config.json: {other[0]}")
    if missing:
        notes.append(f"WARNING: {len(missing)} tensors are missing, the first {missing[0]}")
    if extra:
        count = sum(math.prod(checkpoint.shapes[name]) for name in extra)
        notes.append(
            f"{len(extra)} more tensors ({count:,} numbers) that the parameter counts leave out,"
            f" the first {extra[0]}"
        )
    return notes


def format_bytes(count: float) -> str:
    """Bytes in powers of 1024 with three digits, e.g. ``1.25 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.3g} TiB"
