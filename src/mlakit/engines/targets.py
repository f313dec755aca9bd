"""What each engine can express: the sizes, biases and rotations that its latent attention takes.

A converted model runs in mlakit's own class whatever its sizes. Elsewhere kernels are built for a
few shapes and classes lack tensors, so a conversion *for* an engine picks among what it has.
Facts are those of transformers 5.17 to 5.23, vLLM 0.33, SGLang 0.5.23 and the TensorRT-LLM and
llama.cpp of the time; ``evidence`` says whether they were run or read in the source.

Heads of d dimensions may be padded with zeros to the engine's ``nope`` and ``v`` sizes: exact, and
not a byte more in the cache. Ranks and rotary widths are never padded: that would cache zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from mlakit.errors import UnsupportedModelError
from mlakit.spec import AttentionSpec, ModelSpec, RopeSpec

DEEPSEEK_DECODERS = ("llama", "mistral", "qwen2", "phi3")
"""Families whose decoder layers, attention apart, are DeepSeek's dense ones: two RMSNorms and a
gated SiLU block without biases or multipliers."""

VLLM_HEADS = ((64, 64, 128), (128, 64, 128), (192, 64, 256), (256, 0, 256))
VLLM_WIDTHS = (320, 512, 576)

VLLM_CPU_WIDTHS = (576,)
"""The one that vLLM's kernel for CPUs has."""

OWN_CODE_DECODERS = (*DEEPSEEK_DECODERS, "granite", "gemma", "glm", "glm4", "smollm3", "stablelm")
"""Dense families without norms on keys: their decoders run as transformers has them."""

PLUGIN_DECODERS = ("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3")
"""Families whose decoder layer, attention apart, mlakit's class in vLLM has: Llama's."""


@dataclass(frozen=True)
class Target:
    """One way to run a converted model.

    Attributes:
        name: as ``--for`` takes it.
        runs: the class that computes the attention.
        evidence: ``ran`` in a test, or ``read`` in the engine's source.
        widths: cached numbers per token, C + R, that its kernels take; None for any.
        heads: (nope, rope, v) sizes that its kernels take; None for any.
        rope_types: rotary schedules it computes; None for all.
        q_bias: queries may have a bias; likewise ``latent_bias`` of what is cached and ``o_bias``.
        frequencies: each layer may have rotary frequencies of its own.
        layer_ranks: each layer may have a rank of its own.
        query_up: nope and rope queries may be made of the source's own by a matrix per head.
        qk_norm: norms on queries and keys.
        softcap: soft-capped scores.
        window: sliding windows.
        decoders: families whose decoder layers it has; None for all that convert.
        dtypes: that its latent norm is the identity in.
        note: what to watch; empty for nothing.
    """

    name: str
    runs: str
    evidence: Literal["ran", "read"]
    widths: tuple[int, ...] | None = None
    heads: tuple[tuple[int, int, int], ...] | None = None
    rope_types: tuple[str, ...] | None = None
    q_bias: bool = False
    latent_bias: bool = False
    o_bias: bool = False
    frequencies: bool = False
    layer_ranks: bool = False
    query_up: bool = False
    qk_norm: bool = False
    softcap: bool = False
    window: bool = False
    decoders: tuple[str, ...] | None = DEEPSEEK_DECODERS
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    note: str = ""

    @property
    def parts_off(self) -> tuple[str, ...]:
        """Parts of the method ``mlakit`` whose results it cannot hold."""
        needed = {"means": self.o_bias, "frequencies": self.frequencies}
        return tuple(part for part, there in needed.items() if not there)

    def sizes(self, source: AttentionSpec) -> tuple[tuple[int, int], ...] | None:
        """Every (rank, rope) that it takes for a source layer, ascending by the cache; None: any.

        Ranks that hold more than the source caches are left out.
        """
        if self.widths is None or self.heads is None:
            return None
        dim, keys = source.head_dim, source.num_key_value_heads * source.head_dim
        ropes = {
            rope
            for nope, rope, value in self.heads
            if nope >= dim and value >= dim and 0 < rope <= keys
        }
        found = [(width - rope, rope) for width in self.widths for rope in ropes]
        return tuple(sorted((c, r) for c, r in found if 0 < c <= source.cache_width - r))

    def ranks(self, source: AttentionSpec, target: AttentionSpec) -> tuple[int, ...] | None:
        """Every rank that it takes beside a target layer's rotary width; None for any."""
        sizes = self.sizes(source)
        if sizes is None:
            return None
        return tuple(rank for rank, rope in sizes if rope == target.qk_rope_head_dim)

    def rope(self, rope: RopeSpec) -> RopeSpec | None:
        """The schedule that stands for a source's in this engine; None where there is none.

        llama3's scaling becomes the plain schedule, whose base is then chosen on held-out text: its
        fast frequencies are untouched, and those are what a few rotary dimensions are spent on.
        """
        if self.rope_types is None:
            return rope
        if rope.attention_factor != 1.0:
            return None  # YaRN's factors are spelled in as many ways as there are engines
        if rope.rope_type in self.rope_types:
            return rope
        if rope.rope_type == "llama3":
            kept = {k: v for k, v in rope.parameters.items() if k == "partial_rotary_factor"}
            return replace(rope, rope_type="default", parameters=kept)
        return None

    def obstacles(self, model: ModelSpec) -> list[str]:
        """Why it cannot run a conversion of this model, whatever the sizes; empty if it can."""
        layers = model.layers
        found = {
            f"its decoder layers are not those of {model.family}": (
                self.decoders is not None and model.family not in self.decoders
            ),
            "it has no sliding windows": not self.window and _any(layers, "sliding_window"),
            "it does not soft-cap scores": not self.softcap and _any(layers, "logit_softcap"),
            "it has no norms on queries and keys": not self.qk_norm and _any(layers, "qk_norm"),
            "its latent is not made of another": self.name != "mlakit"
            and _any(layers, "kv_lora_rank"),
            "its queries have no bias": not self.q_bias and _any(layers, "q_bias"),
            "what it caches has no bias": not self.latent_bias and _any(layers, "kv_bias"),
            "its output projection has no bias": not self.o_bias and _any(layers, "o_bias"),
        }
        reasons = [reason for reason, there in found.items() if there]
        for kind in sorted({s.rope.rope_type for s in layers if s.rope and not self.rope(s.rope)}):
            reasons.append(f"it has no rope_type {kind!r}")
        widest = max(layer.head_dim for layer in layers)
        if self.heads is not None and widest > max(n for n, r, v in self.heads if r):
            reasons.append(f"its kernels take no heads of {widest} dimensions")
        return reasons


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "mlakit",
            "mlakit's own classes, in transformers",
            "ran",
            q_bias=True,
            latent_bias=True,
            o_bias=True,
            frequencies=True,
            layer_ranks=True,
            query_up=True,
            qk_norm=True,
            softcap=True,
            window=True,
            decoders=None,
            dtypes=("float32", "bfloat16", "float16"),
        ),
        Target(
            "transformers",
            "its DeepSeek-V3 class, without mlakit",
            "ran",
            latent_bias=True,
            o_bias=True,
            note="caches the latent since 5.15; no continuous batching",
        ),
        Target(
            "transformers-code",
            "mlakit's code in the folder, in transformers, without mlakit",
            "ran",
            q_bias=True,
            latent_bias=True,
            o_bias=True,
            frequencies=True,
            decoders=OWN_CODE_DECODERS,
            dtypes=("float32", "bfloat16", "float16"),
            note="loads with trust_remote_code",
        ),
        Target(
            "vllm",
            "its DeepSeek class, NVIDIA GPUs",
            "read",
            widths=VLLM_WIDTHS,
            heads=VLLM_HEADS,
            rope_types=("default", "yarn"),
            note="rank 448 needs --attention-backend TRITON_MLA on Blackwell, and with an fp8 cache"
            " ranks 256 and 448 need it on Hopper; it drops biases silently, so they are refused",
        ),
        Target(
            "vllm-transformers",
            "mlakit's code in the folder, in vLLM's Transformers backend, without mlakit",
            "ran",
            widths=VLLM_WIDTHS,
            heads=VLLM_HEADS,
            q_bias=True,
            latent_bias=True,
            o_bias=True,
            frequencies=True,
            decoders=OWN_CODE_DECODERS,
            note="rank 448 as for vllm",
        ),
        Target(
            "vllm-plugin",
            "mlakit's own class in vLLM, where mlakit is installed beside it",
            "ran",
            widths=VLLM_WIDTHS,
            heads=VLLM_HEADS,
            q_bias=True,
            latent_bias=True,
            o_bias=True,
            frequencies=True,
            qk_norm=True,
            decoders=PLUGIN_DECODERS,
            dtypes=("float32", "bfloat16", "float16"),
            note="rank 448 as for vllm",
        ),
        Target(
            "sglang",
            "its DeepSeek class",
            "read",
            rope_types=("default", "yarn"),
            note="kernels are tuned for rank 512 and rope 64; other sizes have no gate",
        ),
        Target(
            "tensorrt-llm",
            "its DeepSeek-V3 class",
            "read",
            widths=(576,),
            heads=((128, 64, 128),),
            rope_types=("default", "yarn"),
        ),
        Target(
            "llama.cpp",
            "its deepseek2 graph",
            "read",
            rope_types=("default", "yarn"),
            note="kv_a_proj_with_mqa has to stay in 16 or 32 bits in the GGUF",
        ),
    )
}
"""Every target by name."""


def require_expressible(engine: str, model: ModelSpec, method: str) -> None:
    """Refuses a model that an engine cannot run, by this method or however it is converted.

    Raises:
        UnsupportedModelError: every reason, and the targets that can.
    """
    reasons = _reasons(engine, model, method)
    if not reasons:
        return
    able = [name for name in TARGETS if not _reasons(name, model, method)]
    able.sort(key=lambda name: not name.startswith(engine))
    raise UnsupportedModelError(
        f"--for {engine}: {TARGETS[engine].runs}: {'; '.join(reasons)}",
        remedy=f"the nearest are {' and '.join(f'--for {name}' for name in able[:2])}"
        if len(able) > 1
        else f"use --for {able[0]}",
    )


def _reasons(engine: str, model: ModelSpec, method: str) -> list[str]:
    """Obstacles, and rotations that only the method ``mlakit`` can carry over."""
    target = TARGETS[engine]
    reasons = target.obstacles(model)
    for layer in model.layers[:1]:
        if method != "mlakit" and layer.rope and target.rope(layer.rope) not in (None, layer.rope):
            reasons.append(
                f"it has no rope_type {layer.rope.rope_type!r}, which --method {method} keeps"
            )
    return reasons


def adaptations(engine: str, model: ModelSpec) -> list[str]:
    """What of the source or of the method is given up for an engine, one sentence each."""
    target, source = TARGETS[engine], model.layers[0]
    found = []
    if not target.frequencies:
        found.append("one rope_theta for all layers, chosen on held-out text: no frequencies free")
    if not target.o_bias:
        found.append("means of the values stay in the latent: o_proj has no bias")
    for kind in sorted({s.rope.rope_type for s in model.layers if s.rope}):
        if target.rope_types is not None and kind not in target.rope_types:
            found.append(f"rope_type {kind!r} becomes the plain schedule")
    if target.heads is not None:
        nope, value = padded_heads(target, source.head_dim)
        if (nope, value) != (source.head_dim, source.head_dim):
            found.append(
                f"heads of {source.head_dim} dimensions run padded with zeros to {nope} (keys) and"
                f" {value} (values): exact, and nothing more is cached"
            )
    if target.note:
        found.append(target.note)
    return [f"for {engine}: {sentence}" for sentence in found]


def padded_heads(target: Target, head_dim: int) -> tuple[int, int]:
    """The smallest (nope, v) of a target that holds heads of this size."""
    return min(
        (nope, value)
        for nope, rope, value in target.heads or ((head_dim, 1, head_dim),)
        if rope and nope >= head_dim and value >= head_dim
    )


def table() -> str:
    """The targets as a Markdown table."""
    heads: tuple[str, ...] = (
        "--for",
        "runs in",
        "rank + rope",
        "(nope, rope, v)",
        "rope types",
        "biases",
    )
    heads += ("frequencies, ranks per layer", "QK-norm, soft cap, window", "checked")
    lines = [heads, ("---",) * len(heads)]
    for t in TARGETS.values():
        biases = {"q": t.q_bias, "latent": t.latent_bias, "o": t.o_bias}
        lines.append(
            (
                f"`{t.name}`",
                t.runs,
                "any" if t.widths is None else ", ".join(map(str, t.widths)),
                "any" if t.heads is None else ", ".join(str(h) for h in t.heads),
                "all" if t.rope_types is None else ", ".join(t.rope_types),
                ", ".join(name for name, there in biases.items() if there) or "none",
                _yes(t.frequencies, t.layer_ranks),
                _yes(t.qk_norm, t.softcap, t.window),
                t.evidence,
            )
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _any(layers: tuple[AttentionSpec, ...], feature: str) -> bool:
    return any(getattr(layer, feature) for layer in layers)


def _yes(*there: bool) -> str:
    return ", ".join("yes" if each else "no" for each in there)
