"""What a conversion will do, before it does it: every tensor, byte and warning. No torch here."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mlakit import __version__
from mlakit.checkpoint import Checkpoint, write_json_atomic
from mlakit.checkpoint.reading import PLAN_NAME
from mlakit.conversion.amounts import CALIBRATION_TOKENS
from mlakit.conversion.budget import engine_choice, narrowed, target_layer
from mlakit.conversion.cautions import cautions
from mlakit.conversion.cost import Estimate, forecast_cost
from mlakit.conversion.domains import Calibration, plan_texts, text_warnings, with_samples
from mlakit.conversion.goal import Goal
from mlakit.conversion.rotary_sizes import open_sizes
from mlakit.data import BUILTIN, SourceLike, named_sources
from mlakit.engines.targets import TARGETS, adaptations, require_expressible
from mlakit.errors import MlakitError, UnsupportedModelError, UsageError
from mlakit.families import FAMILIES, beyond_last_layer, convertible, with_ranks
from mlakit.spec import AttentionSpec, CacheKind, ModelSpec

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, the steps done and the steps in all."""

FORMAT_VERSION = 1
WORK_NAME = ".work"

DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2), "float16": ("F16", 2)}
"""Output dtypes: safetensors' name and bytes."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the result; ``copied`` ones have the source's bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    shard: int
    copied: bool


@dataclass(frozen=True)
class ConversionPlan:
    """A conversion in full; the same inputs give the same plan and the same hash.

    Attributes:
        source: name or path that was given.
        fingerprint: of the source checkpoint.
        model_type: of the source.
        goal: what was asked for.
        calibration: None where no data is needed (equal cache).
        dtype: of the result; copied tensors keep theirs unless a dtype was asked for.
        source_layer: the attention of every source layer.
        layers: the target layers.
        tensors: every tensor of the result.
        source_nbytes: of all tensors of the source.
        source_cache_bytes: per token, all layers, in the dtype of the result.
        mha_cache_bytes: the same with one key/value head per query head.
        cache_bytes: the same of the result.
        measured: what calibration found; filled in as the run goes.
    """

    source: str
    fingerprint: str
    model_type: str
    goal: Goal
    calibration: Calibration | None
    dtype: str
    source_layer: AttentionSpec
    layers: tuple[AttentionSpec, ...]
    tensors: tuple[PlannedTensor, ...]
    source_nbytes: int
    source_cache_bytes: int
    mha_cache_bytes: int
    cache_bytes: int
    estimate: Estimate
    warnings: tuple[str, ...]
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """One name for what is done: ``equal-cache``, ``article`` or the compress method."""
        if not self.goal.equal_cache:
            return self.goal.method
        return "article" if self.goal.form == "article" else "equal-cache"

    @property
    def target(self) -> AttentionSpec:
        """The target layer with the largest rank; all other sizes are the same in all layers."""
        return max(self.layers, key=lambda layer: layer.kv_lora_rank or 0)

    @property
    def ranks(self) -> list[int]:
        """The rank of each target layer."""
        return [layer.kv_lora_rank or 0 for layer in self.layers]

    @property
    def rope_dims(self) -> tuple[int, ...]:
        """The rotary widths that calibration looks at, ascending; one where that is settled."""
        return open_sizes(self.source_layer, self.goal) or (self.target.qk_rope_head_dim or 0,)

    @property
    def open(self) -> bool:
        """Whether calibration has still to decide on a size: what is planned is the largest."""
        undecided = self.goal.max_kl is not None or len(self.rope_dims) > 1
        undecided = undecided or self.goal.cache_bits == "auto"
        return undecided and "held_out_kl" not in self.measured

    @property
    def most_cached(self) -> int:
        """Bytes per token that the result caches at most."""
        if self.open and self.goal.cache_ratio is not None:
            return math.floor(self.goal.cache_ratio * self.source_cache_bytes)
        return self.cache_bytes

    @property
    def cache_ratio(self) -> float:
        """Share of the source's own cache bytes that is kept."""
        return self.cache_bytes / self.source_cache_bytes

    @property
    def mha_ratio(self) -> float:
        """The result's cache bytes against those of one key/value head per query head."""
        return self.cache_bytes / self.mha_cache_bytes

    @property
    def shards(self) -> int:
        """Weight files of the result: one per layer and one for the rest."""
        return len(self.layers) + 1

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the result."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def hash(self) -> str:
        """SHA-256 of everything that the result depends on."""
        calibration = None if self.calibration is None else asdict(self.calibration)
        if calibration is not None:
            for domain in (*calibration["domains"], *calibration["checks"]):
                del domain["name"], domain["source"]
        content = [
            FORMAT_VERSION,
            __version__,
            self.fingerprint,
            asdict(self.goal),
            calibration,
            self.dtype,
            [(tensor.name, tensor.dtype, tensor.copied) for tensor in self.tensors],
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def as_dict(self, status: Literal["planned", "running", "complete"]) -> dict[str, Any]:
        """The content of ``plan.json``."""
        return {
            "status": status,
            "hash": self.hash,
            "mlakit_version": __version__,
            "cache_ratio": self.cache_ratio,
            "mha_ratio": self.mha_ratio,
            **asdict(self),
        }

    def write(self, folder: Path, status: Literal["running", "complete"]) -> None:
        """Writes ``plan.json``, atomically."""
        content = self.as_dict(status)
        del content["estimate"]["seconds"]  # says how busy the machine was, not what is made
        write_json_atomic(folder / PLAN_NAME, content)


def make_plan(
    checkpoint: Checkpoint,
    goal: Goal,
    *,
    calibration: SourceLike | Sequence[SourceLike] | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    calibration_window: int | None = None,
    check: SourceLike | Sequence[SourceLike] | None = None,
    seed: int = 0,
    dtype: str | None = None,
    device: str = "cpu",
) -> ConversionPlan:
    """Plans a conversion from headers and the calibration texts; reads no weights.

    Raises:
        UnsupportedModelError: the checkpoint cannot be converted; says why.
        UsageError: the goal cannot be met.
        MlakitError: the calibration text cannot be read.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"There is no dtype {dtype!r}", remedy=f"use {', '.join(DTYPES)}")
    reads = calibration is not None or check or calibration_window is not None
    if goal.equal_cache and (reads or calibration_tokens != CALIBRATION_TOKENS):
        raise UsageError(
            "--equal-cache is exact: it needs no text",
            remedy="leave out --calib, --calib-tokens, --calib-window and --check",
        )
    model = convertible(checkpoint.config, checkpoint.shapes)
    if goal.form == "article" and not FAMILIES[model.family].article:
        raise UnsupportedModelError(
            f"Cannot convert: model_type {model.family!r}: its class in transformers does not hand"
            " on the positions of cached keys, which the article's form rotates again",
            remedy="use --form absorbed, which is as exact",
        )
    require_expressible(goal.engine, model, goal.method)
    _check_method(model, goal)
    # The source's cache too is counted in the result's dtype: a ratio compares what is cached.
    itemsize = _itemsize(checkpoint, model, dtype)
    layers = tuple(target_layer(layer, goal, itemsize) for layer in model.layers)
    texts = None
    if not goal.equal_cache:
        sources = named_sources(BUILTIN if calibration is None else calibration)
        checks = named_sources(check or ())
        named_sources([*sources, *checks])  # no name twice
        texts = plan_texts(model, sources, checks, calibration_tokens, seed, calibration_window)
    tensors = _tensors(checkpoint, model, layers, goal, dtype)
    source = model.layers[0]
    plan = ConversionPlan(
        source=_name(checkpoint.source),
        fingerprint=checkpoint.fingerprint,
        model_type=model.model_type,
        goal=goal,
        calibration=texts,
        dtype=dtype or _attention_dtype(checkpoint, model),
        source_layer=source,
        layers=layers,
        tensors=tensors,
        source_nbytes=sum(checkpoint.nbytes(name) for name in checkpoint.names),
        source_cache_bytes=itemsize * sum(layer.cache_width for layer in model.layers),
        mha_cache_bytes=itemsize
        * sum(
            layer.num_attention_heads * (layer.head_dim + layer.value_dim) for layer in model.layers
        ),
        cache_bytes=sum(layer.cache_row_bytes(itemsize) for layer in layers),
        estimate=Estimate(0, 0, 0.0),
        warnings=(),
    )
    estimate, found = forecast_cost(plan, model, device), _engine_warnings(plan, model)
    if texts is not None:
        estimate = with_samples(estimate, texts, checkpoint, model, device)
        found += text_warnings(texts)
    found += [*cautions(plan, model, device), *_left_out(checkpoint, model)]
    return replace(plan, estimate=estimate, warnings=tuple(found))


def _left_out(checkpoint: Checkpoint, model: ModelSpec) -> list[str]:
    if not any(beyond_last_layer(model, name) for name in checkpoint.names):
        return []
    return ["layers that predict further tokens (num_nextn_predict_layers) are left out"]


def resized(
    plan: ConversionPlan, ranks: Sequence[int], rope_dim: int, cache_format: CacheKind | None
) -> ConversionPlan:
    """The plan with the sizes that calibration decided on; its hash stays, it names the goal."""
    family, itemsizes = FAMILIES[plan.model_type], dict(DTYPES.values())
    layers = tuple(
        layer
        if layer.qk_rope_head_dim == rope_dim
        else replace(
            layer, qk_rope_head_dim=rope_dim, rope=layer.rope and narrowed(layer.rope, rope_dim)
        )
        for layer in with_ranks(plan.layers, ranks)
    )
    layers = tuple(replace(layer, cache_format=cache_format) for layer in layers)
    shapes = {
        family.attention_prefix(index) + name: shape
        for index, layer in enumerate(layers)
        for name, shape in layer.tensor_shapes().items()
    }
    tensors = tuple(
        tensor
        if tensor.copied or tensor.name not in shapes
        else replace(
            tensor,
            shape=shapes[tensor.name],
            nbytes=math.prod(shapes[tensor.name]) * itemsizes[tensor.dtype],
        )
        for tensor in plan.tensors
    )
    cache_bytes = sum(layer.cache_row_bytes(DTYPES[plan.dtype][1]) for layer in layers)
    return replace(plan, layers=layers, tensors=tensors, cache_bytes=cache_bytes)


def _engine_warnings(plan: ConversionPlan, model: ModelSpec) -> list[str]:
    """What was picked or given up for the engine that the result shall run in."""
    engine = plan.goal.engine
    found = [engine_choice(plan.source_layer, plan.target, plan.goal), *adaptations(engine, model)]
    if plan.dtype not in TARGETS[engine].dtypes:
        found.append(
            f"for {engine}: its latent norm cannot be made the identity in {plan.dtype}; use"
            " --dtype bfloat16"
        )
    return [sentence for sentence in found if sentence]


def _check_method(model: ModelSpec, goal: Goal) -> None:
    factors = {layer.rope.attention_factor for layer in model.layers if layer.rope} - {1.0}
    if factors and not goal.equal_cache and goal.method == "transmla":
        raise UsageError(
            f"--method transmla: YaRN multiplies what turns with {factors.pop():.4g}, which the"
            " published method loses where it drops a rotation",
            remedy="use --method mlakit, which keeps it",
        )


def _name(source: str | Path) -> str:
    """A hub id or dataset name as it is; of a path only the last part."""
    path = Path(source)
    return path.resolve().name if path.exists() else str(source)


def _attention_dtype(checkpoint: Checkpoint, model: ModelSpec) -> str:
    """The dtype that the source's attention is stored in, as transformers names it."""
    family = FAMILIES[model.family]
    name = family.attention_prefix(0) + next(iter(family.layout.stored_shapes(model.layers[0])))
    stored = checkpoint.dtype(name)
    for dtype, (spelling, _) in DTYPES.items():
        if spelling == stored:
            return dtype
    raise MlakitError(
        f"{name} is stored as {stored}",
        remedy=f"save the source in {', '.join(DTYPES)} first",
    )


def _itemsize(checkpoint: Checkpoint, model: ModelSpec, dtype: str | None) -> int:
    return DTYPES[dtype or _attention_dtype(checkpoint, model)][1]


def _tensors(
    checkpoint: Checkpoint,
    model: ModelSpec,
    layers: tuple[AttentionSpec, ...],
    goal: Goal,
    dtype: str | None,
) -> tuple[PlannedTensor, ...]:
    """Every tensor of the result; a layer's in its shard, the rest and the norms in the last."""
    family, last = FAMILIES[model.family], len(layers) + 1
    spelling, itemsize = DTYPES[dtype or _attention_dtype(checkpoint, model)]
    planned: dict[str, PlannedTensor] = {}

    def plan_new(name: str, shape: tuple[int, ...], shard: int) -> None:
        nbytes = math.prod(shape) * itemsize
        planned[name] = PlannedTensor(name, shape, spelling, nbytes, shard, copied=False)

    def plan_copy(name: str, shard: int) -> None:
        shape = checkpoint.shape(name)
        if dtype is not None and checkpoint.dtype(name) != spelling:
            plan_new(name, shape, shard)
        else:
            stored, nbytes = checkpoint.dtype(name), checkpoint.nbytes(name)
            planned[name] = PlannedTensor(name, shape, stored, nbytes, shard, copied=True)

    taken: set[str] = set()
    for index, layer in enumerate(layers):
        attention = family.attention_prefix(index)
        source = family.layout.stored_shapes(model.layers[index])
        unchanged = family.layout.unchanged(model.layers[index])
        kept = kept_tensors(layer, goal) & unchanged
        for name, shape in layer.tensor_shapes().items():
            shard = last if name == "kv_a_layernorm.weight" else index + 1
            if name in kept:
                plan_copy(attention + name, shard)
            else:
                plan_new(attention + name, shape, shard)
        taken |= {attention + name for name in source}
        for name in checkpoint.names:
            if name.startswith(family.layer(index)) and not name.startswith(attention):
                plan_copy(name, index + 1)
                taken.add(name)
    for name in checkpoint.names:
        if name not in taken and "rotary_emb" not in name and not beyond_last_layer(model, name):
            plan_copy(name, last)
    return tuple(planned.values())


def kept_tensors(layer: AttentionSpec, goal: Goal) -> frozenset[str]:
    """The source's attention tensors that a target layer keeps as they are."""
    if goal.steps:
        return frozenset({"q_proj.weight", "q_proj.bias"} if layer.query_up else ())
    kept = {"o_proj.weight"} if goal.has("means") else {"o_proj.weight", "o_proj.bias"}
    if layer.mla_form != "compress" or layer.maps_queries:
        kept |= {"q_proj.weight", "q_proj.bias", "q_a_proj.weight", "q_a_proj.bias"}
        kept |= {"q_a_layernorm.weight", "q_b_proj.weight"}
    if layer.qk_norm:
        kept |= {"k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"}
        kept |= {"q_norm.weight", "k_norm.weight"}
    return frozenset(kept)
