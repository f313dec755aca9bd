"""What a conversion shall reach, or a refusal of wishes that contradict each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlakit.engines.targets import TARGETS
from mlakit.errors import UsageError
from mlakit.spec import CacheKind

EqualCacheForm = Literal["absorbed", "article"]
Ranks = Literal["auto", "even", "measured"]

METHODS = ("mlakit", "transmla")

PARTS = {
    "unitary": "complex mixing of key heads; without: real, as TransMLA's",
    "metric": "rank by the error of the layer's output; without: balanced PCA",
    "downstream": "errors of the output weighed by what they do to the model's predictions",
    "tokens": "tokens weighted by the attention they get",
    "means": "means of keys and values left out of the rank; needs a bias on o_proj",
    "phase": "a dropped rotation replaced by its mean phase",
    "frequencies": "each layer chooses its rotary frequencies; needs mlakit's own classes",
    "theta": "else one rope_theta for the whole model, chosen on held-out calibration text",
}
"""What the method ``mlakit`` is made of; each part can be left out alone."""

CACHE_BITS: dict[int, CacheKind | None] = {16: None, 8: "int8", 4: "int4"}
"""How latents are cached, by bits per number; 16 for the model's own dtype."""

AUTO_STEPS = 200
"""Gradient steps per layer where nobody says how many: most of what more would give."""


@dataclass(frozen=True)
class Goal:
    """What a conversion shall reach.

    Attributes:
        equal_cache: keep the cache's bytes and convert exactly; else compress.
        form: ``absorbed`` or, as the article writes it, ``article``; for ``equal_cache``.
        cache_ratio: share of the source's own cache to keep, between 0 and 1.
        kv_lora_rank: C, instead of a ratio.
        qk_rope_head_dim: R, the rotary dimensions kept. If None calibration chooses it where it
            can (``rotary_sizes.open_sizes``); elsewhere it is the source's head size.
        method: how to compress; ``mlakit`` or, as published, ``transmla``.
        freqfold: frequencies folded together by ``transmla``, or ``auto``.
        without: names of PARTS that the method ``mlakit`` does without, sorted.
        refine_steps: gradient steps per layer after the algebra; ``auto`` for AUTO_STEPS with the
            method ``mlakit`` and none elsewhere.
        engine: what the result shall run in, of ``engines.targets.TARGETS``.
        max_kl: instead of a size: the smallest whose predictions diverge from the source's by at
            most so many nats per token, on held-out calibration text.
        ranks: ``even``, one rank for all layers, or ``measured``, for each layer its own at the
            same cache in all; ``auto`` measures where nobody named a rank and the engine allows.
        cache_bits: of the cached latents, a key of CACHE_BITS; with ``auto`` calibration chooses
            them together with rank and rotary width.
    """

    equal_cache: bool = False
    form: EqualCacheForm = "absorbed"
    cache_ratio: float | None = None
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    method: str = "mlakit"
    freqfold: int | Literal["auto"] = "auto"
    without: tuple[str, ...] = ()
    refine_steps: int | Literal["auto"] = "auto"
    engine: str = "mlakit"
    max_kl: float | None = None
    ranks: Ranks = "auto"
    cache_bits: int | Literal["auto"] = 16

    @property
    def cache_formats(self) -> tuple[CacheKind | None, ...]:
        """How latents may be cached."""
        if self.cache_bits == "auto":
            return tuple(CACHE_BITS.values())
        return (CACHE_BITS[self.cache_bits],)

    @property
    def layer_ranks(self) -> bool:
        """Whether each layer gets a rank of its own."""
        if not self.has("downstream") or not TARGETS[self.engine].layer_ranks:
            return False
        return self.ranks == "measured" or (self.ranks == "auto" and self.kv_lora_rank is None)

    @property
    def steps(self) -> int:
        """Gradient steps per layer."""
        if self.refine_steps == "auto":
            return AUTO_STEPS if self.method == "mlakit" and not self.equal_cache else 0
        return self.refine_steps

    def has(self, part: str) -> bool:
        """Whether this is the method ``mlakit`` with this one of PARTS, and the engine holds it."""
        compress = not self.equal_cache and self.method == "mlakit"
        if part == "downstream" and "metric" in self.without:
            return False
        return compress and part not in (*self.without, *TARGETS[self.engine].parts_off)

    @property
    def weighs_predictions(self) -> bool:
        """Whether refinement, after any method, counts errors by what they do to predictions."""
        return not {"downstream", "metric"} & set(self.without)

    def __post_init__(self) -> None:
        if self.form not in ("absorbed", "article"):
            raise UsageError(f"There is no form {self.form!r}", remedy="use absorbed or article")
        if self.method not in METHODS:
            raise UsageError(
                f"There is no method {self.method!r}", remedy=f"use {' or '.join(METHODS)}"
            )
        for part in self.without:
            if part not in PARTS:
                raise UsageError(
                    f"--without {part!r}: there is no such part",
                    remedy=f"known: {', '.join(PARTS)}",
                )
        if self.engine not in TARGETS:
            raise UsageError(
                f"--for {self.engine}: there is no such engine",
                remedy=f"known: {', '.join(TARGETS)}",
            )
        if self.without and (self.method != "mlakit" or self.equal_cache):
            raise UsageError("--without belongs to --method mlakit", remedy="leave it out")
        self._check_measured()
        self._check_bits()
        sizes = (self.cache_ratio, self.kv_lora_rank, self.qk_rope_head_dim, self.max_kl)
        if self.equal_cache:
            if self.engine != "mlakit":
                raise UsageError(
                    f"--for {self.engine}: only mlakit's own classes rotate as --equal-cache needs",
                    remedy="leave out --for, or compress: --cache-ratio 0.5",
                )
            if any(size is not None for size in sizes) or self.freqfold != "auto":
                raise UsageError(
                    "--equal-cache fixes every size itself",
                    remedy="leave out --cache-ratio, --kv-lora-rank, --qk-rope-head-dim, --max-kl"
                    " and --freqfold, or leave out --equal-cache to compress",
                )
            if self.steps:
                raise UsageError(
                    "--equal-cache is exact: there is nothing to refine",
                    remedy="leave out --refine-steps",
                )
            return
        if self.steps < 0:
            raise UsageError(f"--refine-steps {self.steps} is below 0", remedy="0 is none")
        if self.method != "transmla" and self.freqfold != "auto":
            raise UsageError(
                "--freqfold belongs to --method transmla", remedy="leave it out, or name the method"
            )
        if self.form != "absorbed":
            raise UsageError("--form belongs to --equal-cache", remedy="add --equal-cache")
        if [self.cache_ratio, self.kv_lora_rank, self.max_kl].count(None) != 2:
            raise UsageError(
                "Say how much cache to keep, once",
                remedy="give one of --equal-cache, --cache-ratio 0.5, --kv-lora-rank 512 or"
                " --max-kl 0.05",
            )

    def _check_bits(self) -> None:
        """Refuses cached bits that are unknown, or that nothing here can hold or choose."""
        bits = self.cache_bits
        if bits == 16:
            return
        if bits != "auto" and bits not in CACHE_BITS:
            known = ", ".join(map(str, CACHE_BITS))
            raise UsageError(f"--cache-bits {bits}: it is none of {known}", remedy="or use auto")
        if self.equal_cache:
            raise UsageError(
                "--equal-cache keeps the cache's bytes",
                remedy="leave out --cache-bits; --cache-format quantises any latents at load",
            )
        if self.engine != "mlakit":
            raise UsageError(
                f"--for {self.engine}: it has quantised caches of its own",
                remedy="leave out --cache-bits, and choose its cache's dtype when it serves",
            )
        if bits == "auto" and (self.kv_lora_rank is not None or not self.has("downstream")):
            raise UsageError(
                "--cache-bits auto weighs rank against bits by what they do to the predictions",
                remedy="give --cache-ratio or --max-kl, and leave out --kv-lora-rank, --method"
                " transmla, --without downstream and --without metric",
            )

    def _check_measured(self) -> None:
        """Refuses what needs the downstream metric where it is left out."""
        if self.ranks not in ("auto", "even", "measured"):
            raise UsageError(
                f"There is no way {self.ranks!r} to divide ranks",
                remedy="use auto, even or measured",
            )
        if self.max_kl is not None and self.max_kl <= 0:
            raise UsageError(
                f"--max-kl {self.max_kl:g} is not above 0",
                remedy="--equal-cache loses nothing; else give nats per token, such as 0.05",
            )
        wanted = "--ranks measured" if self.ranks == "measured" else "--max-kl"
        if self.max_kl is None and self.ranks != "measured":
            return
        if not self.has("downstream"):
            raise UsageError(
                f"{wanted} needs to know what each layer's errors do to the predictions",
                remedy="leave out --equal-cache, --method transmla, --without downstream and"
                " --without metric",
            )
        if self.ranks == "measured" and not TARGETS[self.engine].layer_ranks:
            raise UsageError(
                f"--for {self.engine}: it takes one rank for all layers",
                remedy="use --ranks even, or --for mlakit",
            )
