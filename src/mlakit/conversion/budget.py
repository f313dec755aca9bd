"""From what the user asked for to the sizes of the target layers, or a refusal that helps.

No torch here: plans are made from configs and headers alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mlakit.conversion.rotary_sizes import check_freqfold, check_rope_dim, open_sizes, rope_choices
from mlakit.engines.targets import TARGETS
from mlakit.errors import UsageError
from mlakit.spec import AttentionSpec, RopeSpec

Sizes = Sequence[tuple[int, int]]

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

    def _check_measured(self) -> None:
        """Refuses what needs the downstream metric where it is left out."""
        if self.ranks not in ("auto", "even", "measured"):
            raise UsageError(
                f"There is no way {self.ranks!r} to divide ranks", remedy="use even or measured"
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


def target_layer(source: AttentionSpec, goal: Goal) -> AttentionSpec:
    """The latent layer that a source layer becomes; the largest where calibration chooses.

    Raises:
        UsageError: the goal cannot be met; names the nearest two that can.
    """
    rope = source.rope
    if source.kv_lora_rank is not None:
        _check_latent(source, goal)
    groups, dim, nope = source.num_key_value_heads, source.head_dim, source.qk_nope_head_dim
    latent = replace(
        source,
        num_key_value_heads=source.num_attention_heads,
        source_kv_heads=groups,
        source_kv_lora_rank=source.kv_lora_rank,
        source_qk_rope_head_dim=source.qk_rope_head_dim,
        v_head_dim=source.value_dim,
    )
    if goal.equal_cache and goal.form == "article":
        return replace(
            latent,
            mla_form="article",
            kv_lora_rank=2 * groups * dim,
            qk_nope_head_dim=0,
            qk_rope_head_dim=dim,
        )
    if goal.equal_cache:
        return replace(
            latent,
            mla_form="equal-cache",
            kv_lora_rank=groups * dim,
            qk_nope_head_dim=0,
            qk_rope_head_dim=groups * dim,
            rope=rope and replace(rope, blocks=groups),
        )
    if widths := open_sizes(source, goal):
        query_up = TARGETS[goal.engine].query_up and not source.qk_norm
        goals = [replace(goal, qk_rope_head_dim=width) for width in widths]
        found = [replace(target_layer(source, each), query_up=query_up) for each in goals]
        return max(found, key=lambda layer: sum(map(math.prod, layer.tensor_shapes().values())))
    turning, rope_dim = source.rotary_dim, goal.qk_rope_head_dim
    choices = rope_choices(source, goal.method)
    sizes = TARGETS[goal.engine].sizes(source)
    if sizes is not None:
        choices = _engine_ropes(choices, sizes, source, goal)
    if rope_dim is None:
        rope_dim = turning if turning in choices or sizes is None else choices[-1]
    check_rope_dim(rope or RopeSpec(1.0, turning), rope_dim, choices)
    if goal.method == "transmla":
        check_freqfold(turning, rope_dim, goal.freqfold)
    if sizes is None:
        rank = _rank(source, choices, rope_dim, goal)
    else:
        rank = _engine_rank(source, choices, rope_dim, sizes, goal)
    return replace(
        latent,
        mla_form="compress",
        kv_lora_rank=rank,
        qk_nope_head_dim=nope if nope and rope_dim == turning else dim,
        qk_rope_head_dim=rope_dim,
        rope=rope and narrowed(TARGETS[goal.engine].rope(rope) or rope, rope_dim),
        o_bias=source.o_bias or goal.has("means"),
    )


def _check_latent(source: AttentionSpec, goal: Goal) -> None:
    """Refuses what is not for a source whose attention is latent already."""
    if goal.equal_cache:
        raise UsageError(
            "--equal-cache: the source's attention is latent already, so it would stay as it is",
            remedy="--cache-ratio 0.5 keeps half of what it caches",
        )
    if goal.method != "mlakit":
        raise UsageError(
            f"--method {goal.method} is for key and value heads; the source caches a latent",
            remedy="use --method mlakit",
        )


def narrowed(rope: RopeSpec, dim: int) -> RopeSpec:
    """The schedule of ``dim`` dimensions that all turn."""
    parameters = dict(rope.parameters)
    if "partial_rotary_factor" in parameters:
        parameters["partial_rotary_factor"] = 1.0
    return replace(rope, dim=dim, parameters=parameters)


def _engine_ropes(choices: list[int], sizes: Sizes, source: AttentionSpec, goal: Goal) -> list[int]:
    """The rotary widths among ``choices`` that the engine's kernels take."""
    wanted = goal.qk_rope_head_dim
    taken = sorted({rope for _, rope in sizes} & set(choices))
    if taken and (wanted is None or wanted in taken):
        return taken
    full = source.cache_width
    if not sizes:
        widths = TARGETS[goal.engine].widths or ()
        raise UsageError(
            f"--for {goal.engine}: its kernels cache {_words(widths)} numbers per token and layer,"
            f" and this model has only {full}: nothing would be gained",
            remedy="the nearest are --for mlakit, which takes any size, and the source as it is",
        )
    known = sorted({rope for _, rope in sizes})
    raise UsageError(
        f"--for {goal.engine}: its kernels take {_words(known)} rotary dimensions"
        + (f", not {wanted}" if taken else f", which --method {goal.method} cannot keep here"),
        remedy=f"the nearest are --for {goal.engine} --qk-rope-head-dim {known[-1]}"
        + ("" if taken else " --method mlakit")
        + " and --for mlakit",
    )


def _engine_rank(
    source: AttentionSpec, choices: list[int], rope_dim: int, sizes: Sizes, goal: Goal
) -> int:
    """The rank asked for, or the largest at or below the ratio that the engine's kernels take."""
    full, ratio = source.cache_width, goal.cache_ratio
    taken = [rank for rank, rope in sizes if rope == rope_dim]
    if goal.max_kl is not None:
        return taken[-1]  # what is looked for lies at or below
    if ratio is not None and not 0 < ratio <= 1:
        return _rank(source, choices, rope_dim, goal)  # refuses
    wanted = goal.kv_lora_rank
    if wanted is None:
        wanted = math.floor((ratio or 0.0) * full + 1e-9) - rope_dim
    below = [rank for rank in taken if rank <= wanted]
    if below and (ratio is not None or wanted in taken):
        return below[-1]
    above = [rank for rank in taken if rank > wanted]
    offers = [
        f"--kv-lora-rank {rank}"
        if ratio is None
        else f"--cache-ratio {_ratio(rank + rope_dim, full)}"
        for rank in (*below[-1:], *above[: 2 - len(below[-1:])])
    ]
    asked = f"--kv-lora-rank {wanted}" if ratio is None else f"--cache-ratio {ratio:g}"
    raise UsageError(
        f"--for {goal.engine}: {asked}: beside {rope_dim} rotary dimensions its kernels take"
        f" {_words(taken)} as a rank",
        remedy=f"the nearest are {' and '.join([*offers, '--for mlakit'][:2])}",
    )


def engine_choice(source: AttentionSpec, target: AttentionSpec, goal: Goal) -> str | None:
    """The sizes that were picked for an engine, where they are not those asked for."""
    wanted = math.floor((goal.cache_ratio or 0.0) * source.cache_width + 1e-9)
    if TARGETS[goal.engine].sizes(source) is None or wanted <= target.cache_width:
        return None
    return (
        f"for {goal.engine}: rank {target.kv_lora_rank} + rope {target.qk_rope_head_dim} ="
        f" {target.cache_width} numbers per token and layer, the most its kernels take at or below"
        f" the {wanted} asked for"
    )


def _words(sizes: Sequence[int]) -> str:
    return " or ".join(filter(None, [", ".join(map(str, sizes[:-1])), str(sizes[-1])]))


def _rank(source: AttentionSpec, choices: list[int], rope_dim: int, goal: Goal) -> int:
    """C, at most what the source caches per token without R."""
    full = source.cache_width
    highest, exact = full - rope_dim, source.kv_lora_rank is None
    if goal.max_kl is not None:
        return highest  # what is looked for lies at or below
    if goal.kv_lora_rank is not None:
        if not 1 <= goal.kv_lora_rank <= highest:
            raise UsageError(
                f"--kv-lora-rank {goal.kv_lora_rank} is not between 1 and {highest}: the source"
                f" caches {full} numbers per token and layer, {rope_dim} of them stay rotated",
                remedy=f"the nearest are --kv-lora-rank {highest if goal.kv_lora_rank > 1 else 1}"
                " and "
                + ("--equal-cache (exact, the source's own bytes)" if exact else "--cache-ratio 1"),
            )
        return goal.kv_lora_rank
    ratio = goal.cache_ratio or 0.0
    if not 0 < ratio <= 1:
        raise UsageError(
            f"--cache-ratio {ratio:g} is not between 0 and 1: it is the share of the source's own"
            " cache that is kept",
            remedy="the nearest are --cache-ratio 1 and "
            + ("--equal-cache (exact, the same bytes)" if exact else "the source as it is")
            if ratio > 1
            else f"the smallest with {rope_dim} rotary dimensions is --cache-ratio"
            f" {_ratio(rope_dim + 1, full)}",
        )
    width = math.floor(ratio * full + 1e-9)
    if width > rope_dim:
        return width - rope_dim
    fitting = [size for size in choices if size < width]
    other = (
        f"--cache-ratio {ratio:g} --qk-rope-head-dim {fitting[-1]}"
        if fitting
        else f"--cache-ratio {_ratio(choices[0] + 1, full)} --qk-rope-head-dim {choices[0]}"
    )
    raise UsageError(
        f"--cache-ratio {ratio:g} keeps {width} of {full} numbers per token and layer; {rope_dim}"
        " rotary dimensions leave no room for a latent",
        remedy=f"the nearest are --cache-ratio {_ratio(rope_dim + 1, full)} and {other}",
    )


def _ratio(width: int, full: int) -> str:
    """The smallest ratio of four decimals that keeps ``width`` of ``full`` numbers."""
    return f"{math.ceil(width / full * 1e4) / 1e4:g}"
