"""What may disappoint about a conversion, said before it begins. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlakit.conversion.allocate import SEARCH_ROUNDS
from mlakit.spec import ModelSpec

if TYPE_CHECKING:
    from mlakit.conversion.plan import ConversionPlan


def cautions(plan: ConversionPlan, model: ModelSpec, device: str) -> tuple[str, ...]:
    """One sentence each."""
    source, target = plan.source_layer, plan.target
    found: list[str] = []
    if not device.startswith("cpu"):
        found.append(
            "time and memory are guesses for this kind of device: they were measured on processors"
        )
    full = source.cache_width
    if plan.dtype != "float32" and plan.goal.equal_cache:
        found.append(
            f"exact up to the rounding of {plan.dtype} weights; --dtype float32 shows it exactly"
        )
    if source.kind == "mha" and not plan.goal.equal_cache:
        found.append("the source is plain multi-head attention: its own cache is that of MHA")
    if not plan.goal.equal_cache:
        rank, rope = target.kv_lora_rank or 0, target.qk_rope_head_dim or 0
        searched, fresh = plan.goal.max_kl is not None, source.kv_lora_rank is None
        if rank + rope == full and fresh and not searched and plan.goal.cache_bits == 16:
            found.append(
                "full rank saves no cache and still drops rotations; --equal-cache keeps the same"
                " bytes and is exact"
            )
        if fresh and not plan.open and rank > source.hidden_size + 1:
            found.append(
                f"rank {rank} is above the hidden size {source.hidden_size}: the latent cannot"
                " hold more than its input"
            )
        if searched:
            found.append(
                f"the search for {plan.goal.max_kl:g} nats per token converts up to {SEARCH_ROUNDS}"
                " times; what it needs is given for one"
            )
        if rank % 16 and not plan.open:
            found.append(f"rank {rank} is no multiple of 16; multiples of 16 decode fastest")
        window = plan.calibration.window if plan.calibration else 0
        if window * 2 <= model.max_position_embeddings:
            found.append(
                f"calibrated on windows of {window} tokens; the context is"
                f" {model.max_position_embeddings:,}, and losses grow with distance beyond them:"
                " a longer --calib-window, with more text, keeps them small"
            )
        if full <= 512 and source.kv_lora_rank is None:
            found.append(
                f"the source caches only {full} numbers per token and layer: a small model has"
                " little to gain"
            )
    if any(layer.sliding_window for layer in model.layers):
        found.append("sliding-window layers: latents older than the window stay in the cache")
    return tuple(found)
