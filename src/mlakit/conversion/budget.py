"""From what the user asked for to the sizes of the target layers, or a refusal that helps.

No torch here: plans are made from configs and headers alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from mlakit.conversion.allocate import Storage
from mlakit.conversion.goal import CACHE_BITS, Goal
from mlakit.conversion.rotary_sizes import check_freqfold, check_rope_dim, open_sizes, rope_choices
from mlakit.engines.targets import TARGETS
from mlakit.errors import UsageError
from mlakit.spec import AttentionSpec, RopeSpec

Sizes = Sequence[tuple[int, int]]


def target_layer(source: AttentionSpec, goal: Goal, itemsize: int = 2) -> AttentionSpec:
    """The latent layer that a source layer becomes; the largest where calibration chooses.

    Args:
        source: the layer.
        goal: what is wanted.
        itemsize: bytes of a number in the source's cache.

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
    if goal.cache_bits == "auto":
        return _largest_of_any_bits(source, goal, itemsize)
    if widths := open_sizes(source, goal):
        query_up = TARGETS[goal.engine].query_up and not source.qk_norm
        goals = [replace(goal, qk_rope_head_dim=width) for width in widths]
        found = [replace(target_layer(source, each, itemsize), query_up=query_up) for each in goals]
        return max(found, key=_numbers)
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
        rank = _rank(source, choices, rope_dim, goal, itemsize)
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
        cache_format=goal.cache_formats[0],
    )


def _largest_of_any_bits(source: AttentionSpec, goal: Goal, itemsize: int) -> AttentionSpec:
    """The largest target over what its latent may be cached in; refuses where none fits."""
    found, refusal = [], None
    for bits in CACHE_BITS:
        try:
            found.append(target_layer(source, replace(goal, cache_bits=bits), itemsize))
        except UsageError as error:
            refusal = error
    if refusal is not None and not found:
        raise refusal
    return max(found, key=_numbers)


def _numbers(layer: AttentionSpec) -> int:
    """Of all tensors of a layer."""
    return sum(map(math.prod, layer.tensor_shapes().values()))


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
        return _rank(source, choices, rope_dim, goal, 2)  # refuses
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


def _rank(
    source: AttentionSpec, choices: list[int], rope_dim: int, goal: Goal, itemsize: int
) -> int:
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
    storage = Storage(goal.cache_formats[0], itemsize)
    if rank := storage.rank_within(width, rope_dim, highest):
        return rank
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
