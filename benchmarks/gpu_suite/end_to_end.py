"""A GQA model against the same model with latent attention: tokens per second and cache bytes.

    python -m benchmarks.gpu_suite.end_to_end --device cuda --seconds 100
    python -m benchmarks.gpu_suite.end_to_end --device cpu --seconds 900 --output FILE.json

Real layer shapes, a few layers, random weights, 512 + 64 latent columns: speed and bytes, and
nothing about quality. The source is transformers' own Llama with torch's attention over a cache
that is written in place and read without a mask, which is the fastest it can do; transformers'
usual cache copies all keys in every step. Both run eagerly, in the same loop. Time to first token
is a whole prompt of one sequence, up to 8,192 tokens. On a CPU two layers run at a small batch, and
the largest batch is counted for a GPU's 80 GiB, not run. The vocabulary is small, so that the
head does not weigh on a few layers; the largest batch is the one that would fit with all layers
and the real vocabulary.
"""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu_suite.lines import say
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, CacheLayerMixin

from mlakit.benching.clock import Clock
from mlakit.benching.environment import environment
from mlakit.checkpoint import write_json_atomic
from mlakit.nn.cache import LatentCache
from mlakit.nn.configs import MLALlamaConfig
from mlakit.nn.hf import cache_nbytes, new_cache
from mlakit.nn.models import MLALlamaForCausalLM

RANK, ROPE, HEAD = 512, 64, 128
SMALL_VOCABULARY = 1024
MEMORY_SHARE = 0.9
LONGEST_PROMPT = 8192
NOMINAL_MEMORY = 80 * 2**30
CONTEXTS = (8192, 32768, 1024, 4096, 16384)
"""The most telling first."""


@dataclass(frozen=True)
class Scale:
    """How much of the work a device can do in the time.

    Attributes:
        layers: that run.
        steps: that are timed.
        batch: of the comparison at one size.
        run_largest: whether the largest batch runs, or is only counted.
    """

    layers: int
    steps: int
    batch: int
    run_largest: bool


SCALES = {
    "quick": Scale(2, 2, 2, True),
    "cuda": Scale(4, 12, 16, True),
    "cpu": Scale(2, 5, 4, False),
}


@dataclass(frozen=True)
class ModelShape:
    """One layer's sizes and how many layers and tokens the whole model has."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int


SHAPES = (
    ModelShape("Llama-2-7B", 4096, 11008, 32, 32, 32, 32000),
    ModelShape("Llama-3-8B", 4096, 14336, 32, 8, 32, 128256),
    ModelShape("Qwen2.5-7B", 3584, 18944, 28, 4, 28, 152064),
)
QUICK = (ModelShape("tiny", 64, 128, 4, 2, 8, 1024),)


class InPlaceLayer(CacheLayerMixin):
    """Keys and values ``[B, G, T, d]`` with room for what comes; a step returns views of them."""

    is_sliding = False
    is_compileable = False

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()
        self.keys, self.values, self.length = keys, values, length
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The tensors exist from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes the new tokens behind the old ones."""
        start, self.length = self.length, self.length + key_states.shape[2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the mask, and the first one's number."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.length

    def get_max_length(self) -> int:
        """Tokens there is room for."""
        return self.keys.shape[2]

    def get_max_cache_shape(self) -> int:
        """The same, by its name before transformers 5.23."""
        return self.keys.shape[2]


def build(shape: ModelShape, layers: int, latent: bool, device: str, longest: int) -> Any:
    """A model of random weights in bfloat16."""
    sizes = {
        "vocab_size": SMALL_VOCABULARY, "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate, "num_hidden_layers": layers,
        "num_attention_heads": shape.heads, "max_position_embeddings": longest,
    }  # fmt: skip
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        try:
            if latent:
                config = MLALlamaConfig(**sizes, kv_lora_rank=RANK, qk_rope_head_dim=ROPE,
                                        qk_nope_head_dim=HEAD, v_head_dim=HEAD)  # fmt: skip
                return MLALlamaForCausalLM(config).eval()
            config = LlamaConfig(
                **sizes, num_key_value_heads=shape.kv_heads, head_dim=HEAD,
                attn_implementation="sdpa",
            )  # fmt: skip
            return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)


def filled_cache(model: Any, shape: ModelShape, batch: int, context: int, room: int) -> Cache:
    """A cache that holds ``context`` random tokens of each sequence."""
    layers, device = model.config.num_hidden_layers, model.device
    if isinstance(model, MLALlamaForCausalLM):
        cache = new_cache(model, batch, context + room)
        assert isinstance(cache, LatentCache)
        cache.lengths, cache.columns = [context] * batch, context
        cache.cache_seqlens = torch.full_like(cache.cache_seqlens, context)
        for layer in cache.layers:
            layer.pages.normal_(std=0.1)
            layer.columns = context
        return cache
    size = (batch, shape.kv_heads, context + room, HEAD)
    several = []
    for _ in range(layers):
        keys, values = (torch.empty(size, dtype=model.dtype, device=device) for _ in range(2))
        several.append(InPlaceLayer(keys.normal_(std=0.1), values.normal_(std=0.1), context))
    return Cache(layers=several)


@torch.inference_mode()
def time_steps(
    model: Any, shape: ModelShape, batch: int, context: int, steps: int, clock: Clock
) -> dict[str, Any]:
    """Median seconds of a decoding step of every sequence."""
    cache = filled_cache(model, shape, batch, context, steps + 2)
    ids = torch.randint(0, SMALL_VOCABULARY, (batch, 1), device=model.device)

    def step() -> None:
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    nbytes = cache_nbytes(cache)
    timing = clock.in_turn({"step": step}, steps)["step"]
    return {
        "batch": batch,
        "milliseconds_per_step": 1e3 * timing.median,
        "tokens_per_s": batch / timing.median,
        "cache_bytes": nbytes,
        "cache_bytes_per_token_and_layer": cache_row_bytes(shape, latent=_is_latent(model)),
    }


def _is_latent(model: Any) -> bool:
    return isinstance(model, MLALlamaForCausalLM)


def cache_row_bytes(shape: ModelShape, latent: bool) -> int:
    """Bytes of one token in one layer, 16-bit."""
    return 2 * (RANK + ROPE if latent else 2 * shape.kv_heads * HEAD)


def largest_batch(model: Any, shape: ModelShape, context: int, memory: float) -> int:
    """Sequences that fit beside the weights of all layers and the real vocabulary."""
    layer = sum(p.numel() for p in model.model.layers.parameters()) / len(model.model.layers)
    weights = 2 * (layer * shape.layers + 2 * shape.vocabulary * shape.hidden)
    each = cache_row_bytes(shape, _is_latent(model)) * shape.layers * context
    return max(0, int((MEMORY_SHARE * memory - weights) / each))


@torch.inference_mode()
def first_token(model: Any, context: int, clock: Clock) -> float:
    """Seconds to read a prompt of one sequence and choose its first token."""
    ids = torch.randint(0, SMALL_VOCABULARY, (1, context), device=model.device)

    def read() -> None:
        cache = new_cache(model, 1, context)
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax()

    return clock.in_turn({"read": read}, 1)["read"].median


def measure(
    shape: ModelShape, context: int, scale: Scale, device: str, memory: float, clock: Clock
) -> dict[str, Any]:
    """One shape at one context, source then latent."""
    row: dict[str, Any] = {"shape": asdict(shape), "context": context, "layers_run": scale.layers}
    for name, latent in (("source", False), ("latent", True)):
        torch.manual_seed(0)
        model = build(shape, scale.layers, latent, device, context + scale.steps + 64)
        most = largest_batch(model, shape, context, memory)
        row[name] = found = {"largest_batch": most}
        sizes = {"at_fixed_batch": scale.batch}
        if scale.run_largest:
            sizes["at_largest_batch"] = min(most, 4) if shape in QUICK else most
        for key, batch in sizes.items():
            if batch < 1:
                continue
            try:
                found[key] = time_steps(model, shape, batch, context, scale.steps, clock)
            except torch.OutOfMemoryError:
                found[key] = {"batch": batch, "reason": "out of memory"}
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
        if context <= LONGEST_PROMPT:
            found["seconds_to_first_token"] = first_token(model, context, clock)
        del model
    ours, theirs = row["latent"], row["source"]
    row["cache_share"] = cache_row_bytes(shape, True) / cache_row_bytes(shape, False)
    for key in ("at_fixed_batch", "at_largest_batch"):
        both = [side.get(key, {}).get("tokens_per_s") for side in (ours, theirs)]
        if all(both):
            row[f"speedup_{key}"] = both[0] / both[1]
    return row


def main() -> None:
    """Shape by shape, context by context, until the time is up; a JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, help="also keep all of it in this file")
    arguments = parser.parse_args()
    device, quick = arguments.device, arguments.quick
    clock, start = Clock(torch.device(device)), time.perf_counter()
    memory = float(NOMINAL_MEMORY if not quick else 2**29)
    if device == "cuda":
        memory = float(torch.cuda.get_device_properties(0).total_memory)
    scale = SCALES["quick" if quick else device]
    record: dict[str, Any] = {"environment": environment(), "memory": memory, "rows": []}
    for context in (64,) if quick else CONTEXTS:
        for shape in QUICK if quick else SHAPES:
            if time.perf_counter() - start > arguments.seconds:
                say(skipped=f"{shape.name} at {context} tokens", reason="time used up")
                continue
            row = measure(shape, context, scale, device, memory, clock)
            say(row=row)
            if arguments.output is not None:
                record["rows"].append(row)
                write_json_atomic(arguments.output, record)
    say(finished=True)


if __name__ == "__main__":
    main()
