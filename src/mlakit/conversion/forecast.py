"""What a conversion will cost and what may disappoint, guessed from its plan. No torch here."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlakit.conversion.rotary_sizes import freqfold_candidates
from mlakit.families import FAMILIES
from mlakit.spec import ModelSpec

if TYPE_CHECKING:
    from mlakit.conversion.plan import ConversionPlan

WINDOW = 512
"""Tokens per calibration window, or the source's context if that is shorter."""

BATCH_TOKENS = 2048
"""Tokens that go through a layer together."""

HELD_OUT = 8
"""One window in this many is held out, to choose what statistics cannot say."""

STEP_TOKENS = 2048
"""Tokens of one gradient step of a refinement."""

SENSITIVITY_TOKENS = 8192
"""Calibration tokens whose gradients are looked at, one pass up and one down."""

CHECKS = 20
"""How often a refinement looks at the held-out error; the best state found is kept."""

CPU_FLOPS = 2e10
CUDA_FLOPS = 2e13
DISK_BYTES_PER_SECOND = 5e8
"""Assumed speeds (per CPU core; any GPU; any disk) behind the estimate of the time."""

START_SECONDS = 5.0
"""Importing torch and transformers takes this long before the work begins."""


@dataclass(frozen=True)
class Estimate:
    """What the run will need: peak memory and disk in bytes, time in seconds."""

    memory_bytes: int
    disk_bytes: int
    seconds: float


def forecast_cost(plan: ConversionPlan, model: ModelSpec, device: str) -> Estimate:
    """Peak memory of one layer's work, the result and work files on disk, and a rough time."""
    family, source = FAMILIES[model.family], plan.source_layer
    hidden = source.hidden_size
    prefix = family.layer(0)
    layer_size = sum(math.prod(t.shape) for t in plan.tensors if t.name.startswith(prefix))
    attention = sum(
        math.prod(shape)
        for spec in (source, plan.target)
        for shape in spec.tensor_shapes().values()
    )
    view, heads = source.absorbed, source.num_attention_heads
    keys = view.num_key_value_heads * view.head_dim
    memory = 4 * layer_size + 16 * attention + 8 * (2 * keys) ** 2 * 4
    last = sum(tensor.nbytes for tensor in plan.tensors if tensor.shard == plan.shards)
    disk = plan.nbytes
    operations = 10.0 * (2 * keys) ** 3 * len(plan.layers)
    if plan.calibration is not None:
        tokens = plan.calibration.tokens
        inner = max(block.intermediate_size for block in model.feed_forwards)
        memory += BATCH_TOKENS * 4 * (8 * hidden + 3 * inner) + 3 * 8 * (hidden + 1) ** 2
        memory += source.num_attention_heads * BATCH_TOKENS * plan.calibration.window * 4
        disk += 2 * tokens * hidden * 4 + 8 * keys**2 * len(plan.layers)
        passes = 2.0
        if plan.goal.method == "transmla" and plan.goal.freqfold == "auto":
            folds = freqfold_candidates(source.rotary_dim, plan.target.qk_rope_head_dim or 2)
            passes += len(folds) / HELD_OUT
        if plan.goal.method == "mlakit":
            passes = (1 if plan.goal.has("frequencies") else 2) + 2 / HELD_OUT
            memory += 8 * (3 * plan.calibration.window**2 + 4 * view.head_dim**2) * heads
            memory += 2 * 4 * tokens // HELD_OUT * hidden
            disk += 8 * 2 * keys * (2 * keys + hidden) * len(plan.layers)
        if plan.goal.has("downstream") or (plan.goal.steps and plan.goal.weighs_predictions):
            sensed = min(tokens, SENSITIVITY_TOKENS)
            passes += 4 * sensed / tokens
            disk += 4 * hidden * ((len(plan.layers) + 2) * sensed + len(plan.layers) * hidden)
        each = 2.0 * layer_size + 4.0 * hidden**2
        if plan.goal.steps:
            passes += 2
            disk += 3 * tokens * hidden * 4
            memory += 16 * attention
            fitting = 3 * plan.goal.steps * STEP_TOKENS + CHECKS * tokens / HELD_OUT
            operations += 2.0 * attention * fitting * len(plan.layers)
        operations += passes * tokens * each * len(plan.layers)
    else:
        passes = 1
    speed = CUDA_FLOPS if device.startswith("cuda") else CPU_FLOPS * (os.cpu_count() or 1)
    reading = (passes + 1) * plan.nbytes / DISK_BYTES_PER_SECOND
    seconds = START_SECONDS + operations / speed + reading
    return Estimate(int(max(memory, last)), int(disk), round(seconds, 1))


def forecast_warnings(plan: ConversionPlan, model: ModelSpec) -> tuple[str, ...]:
    """What may disappoint, one sentence each."""
    source, target = plan.source_layer, plan.target
    found: list[str] = []
    full = source.cache_width
    if plan.dtype != "float32" and plan.goal.equal_cache:
        found.append(
            f"exact up to the rounding of {plan.dtype} weights; --dtype float32 shows it exactly"
        )
    if source.kind == "mha" and not plan.goal.equal_cache:
        found.append("the source is plain multi-head attention: its own cache is that of MHA")
    if not plan.goal.equal_cache:
        rank, rope = target.kv_lora_rank or 0, target.qk_rope_head_dim or 0
        if rank + rope == full and source.kv_lora_rank is None and plan.goal.max_kl is None:
            found.append(
                "full rank saves no cache and still drops most of the rotation;"
                " --equal-cache keeps the same bytes and is exact"
            )
        if source.kv_lora_rank is None and rank > source.hidden_size + 1:
            found.append(
                f"rank {rank} is above the hidden size {source.hidden_size}: the latent cannot"
                " hold more than its input"
            )
        if rank % 16 and plan.goal.max_kl is None:
            found.append(f"rank {rank} is no multiple of 16; multiples of 16 decode fastest")
        if full <= 512 and source.kv_lora_rank is None:
            found.append(
                f"the source caches only {full} numbers per token and layer: a small model has"
                " little to gain"
            )
    if any(layer.sliding_window for layer in model.layers):
        found.append("sliding-window layers: latents older than the window stay in the cache")
    return tuple(found)
