"""What a converted folder says about itself: its config and its model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlakit import __version__
from mlakit.checkpoint.origin import front_matter
from mlakit.conversion.amounts import HELD_OUT, STEP_TOKENS
from mlakit.conversion.domains import Domain
from mlakit.conversion.plan import FORMAT_VERSION, ConversionPlan
from mlakit.families import FAMILIES, rope_parameters
from mlakit.reporting.domains import disagreement
from mlakit.spec import AttentionSpec, ModelSpec

DROPPED_KEYS = (
    *("torch_dtype", "auto_map", "_name_or_path"),
    *("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor"),
)
"""Source keys that are respelled below, or that point at code and places of the source."""


NOT_HEALED = "> **NOT HEALED.**"
"""How the line begins that labels a compressed model; healing takes it out of the card."""

FORESEEN = "predicted from the algebra alone, second order, layers added up, before refinement"


def converted_config(
    source: dict[str, Any], plan: ConversionPlan, model: ModelSpec, norm_exponent: int
) -> dict[str, Any]:
    """``config.json`` of the result: the source's, with the attention replaced.

    Args:
        source: the source's ``config.json``.
        plan: the completed plan.
        model: the source's description.
        norm_exponent: k of the latent norm, whose eps is ``4^k`` and whose weight is ``2^k``.
    """
    target, old = plan.target, plan.source_layer
    own = [layer.get("frequencies") for layer in plan.measured.get("layers", [])]
    config = {key: value for key, value in source.items() if key not in DROPPED_KEYS}
    if "num_nextn_predict_layers" in config:
        config["num_nextn_predict_layers"] = 0
    return config | {
        "architectures": [f"MLA{FAMILIES[model.family].classes}ForCausalLM"],
        "model_type": f"mla_{model.family}",
        "dtype": plan.dtype,
        "rope_parameters": rope_parameters(plan.layers, FAMILIES[model.family]),
        "num_key_value_heads": target.num_attention_heads,
        "head_dim": target.cache_width,
        "mla_form": target.mla_form,
        "q_lora_rank": target.q_lora_rank,
        "kv_lora_rank": target.kv_lora_rank,
        "kv_lora_ranks": plan.ranks if len(set(plan.ranks)) > 1 else None,
        "qk_nope_head_dim": target.qk_nope_head_dim,
        "qk_rope_head_dim": target.qk_rope_head_dim,
        "v_head_dim": target.v_head_dim,
        "rope_blocks": max(layer.rope.blocks for layer in plan.layers if layer.rope),
        "rope_inv_freq": own if plan.goal.has("frequencies") else None,
        "softmax_scale": target.softmax_scale,
        "qk_norm": target.qk_norm,
        "source_kv_heads": old.num_key_value_heads,
        "source_head_dim": old.head_dim,
        "source_kv_lora_rank": target.source_kv_lora_rank,
        "source_qk_rope_head_dim": target.source_qk_rope_head_dim,
        "query_up": target.query_up,
        "cache_format": target.cache_format,
        "q_bias": target.q_bias,
        "kv_a_bias": target.kv_bias,
        "o_bias": target.o_bias,
        "latent_norm_eps": 4.0**norm_exponent,
        "mlakit": {
            "format_version": FORMAT_VERSION,
            "mlakit_version": __version__,
            "source": plan.source,
            "source_fingerprint": plan.fingerprint,
            "source_attention": {
                "num_key_value_heads": old.num_key_value_heads,
                "head_dim": old.head_dim,
            },
            "method": plan.method,
            "plan_hash": plan.hash,
        },
    }


def model_card(plan: ConversionPlan, origin: Mapping[str, Any]) -> str:
    """``README.md`` of the result, in Markdown.

    Args:
        plan: the completed plan.
        origin: base model and licence, see ``mlakit.checkpoint.origin``.
    """
    source = plan.source_layer
    tags = ["mlakit", "multi-head-latent-attention", "mla"]
    lines = [
        *front_matter({"library_name": "mlakit", **origin, "tags": tags}),
        "",
        f"# {plan.source} with multi-head latent attention",
        "",
        *([] if plan.goal.equal_cache else [_not_healed(plan), ""]),
        f"Converted by mlakit {__version__} ({plan.method}) from `{plan.source}`"
        f" (`{plan.model_type}`, fingerprint `{plan.fingerprint[:16]}`). {_promise(plan)}",
        "",
        "| per token, all layers | bytes | of its own cache | of MHA |",
        "|---|---|---|---|",
        _cache_row("source", plan.source_cache_bytes, plan),
        _cache_row("this model", plan.cache_bytes, plan),
        "",
        f"{source.num_attention_heads} query heads on {cached_by(source)} became a latent of"
        f" {size_words(plan)} (`kv_lora_rank`, `qk_rope_head_dim`), stored as {plan.dtype}.",
        "",
        *_calibration_lines(plan),
        _licence(origin),
        "",
        "```python",
        "import mlakit",
        "model = mlakit.load('path/to/this/folder')",
        "```",
        "",
        f"`plan.json` lists every tensor (plan `{plan.hash[:16]}`). Measure the result against its"
        " source with `mlakit eval` before you rely on it.",
        "",
        *(f"Note: {warning}." for warning in plan.warnings),
    ]
    return "\n".join(lines).rstrip() + "\n"


def size_words(plan: ConversionPlan) -> str:
    """Ranks and rotary width of the result, and what calibration has still to choose."""
    ranks, widths, limit = sorted(plan.ranks), plan.rope_dims, plan.goal.max_kl
    words = f"{ranks[0]} to {ranks[-1]} by layer" if ranks[0] != ranks[-1] else f"{ranks[-1]}"
    rope = f"rope {plan.target.qk_rope_head_dim}"
    if "held_out_kl" in plan.measured:
        kind = plan.target.cache_format
        return f"rank {words}{f' in {kind}' if kind else ''}, {rope}"
    if len(widths) > 1:
        rope = f"rope {', '.join(map(str, widths[:-1]))} or {widths[-1]}, by calibration"
    bits = plan.goal.cache_bits
    stored = f" in {plan.target.cache_format}" if bits in (4, 8) else ""
    stored = " in 16, 8 or 4 bits, by calibration" if bits == "auto" else stored
    if limit is not None:
        smallest = f"the smallest within {limit:g} nats per token"
        if len(widths) > 1:
            return f"{rope}, and a rank{stored}, {smallest}"
        return f"rank 1 to {ranks[-1]}{stored}, {smallest}, {rope}"
    mean = " in the mean, by layer" if plan.goal.layer_ranks else ""
    if bits == "auto":
        held = f"{plan.goal.cache_ratio:.0%} of the bytes"
        return f"{held}{mean}: {rope}, the rest rank{stored}"
    if len(widths) > 1:
        return f"{plan.target.cache_width} numbers{mean}: {rope}, the rest rank{stored}"
    return f"rank {words}{mean}{stored}, {rope}"


def cached_by(source: AttentionSpec) -> str:
    """What a source layer caches, in words."""
    if source.kv_lora_rank is not None:
        return f"a latent of {source.kv_lora_rank} + {source.qk_rope_head_dim} numbers"
    return f"{source.num_key_value_heads} key/value heads of size {source.head_dim}"


def _promise(plan: ConversionPlan) -> str:
    if plan.goal.equal_cache:
        return "The cache keeps its size and the model computes the same function as its source."
    return "The cache is smaller; this costs quality, part of which `mlakit heal` wins back."


def _not_healed(plan: ConversionPlan) -> str:
    """The label of a compressed model that nothing has been trained in since."""
    lost = ""
    if "held_out_kl" in plan.measured:
        kl = plan.measured["held_out_kl"]
        lost = f" Its predictions differ from the source's by {kl:.3g} nats per token (KL"
        lost += " divergence, held-out calibration text)."
    return (
        f"{NOT_HEALED} The cache was compressed and nothing has been trained since.{lost}"
        " `mlakit heal` wins part of it back."
    )


def _licence(origin: Mapping[str, Any]) -> str:
    if "license" not in origin:
        return "The source names no licence in its card; its own terms hold."
    return f"Licence: {origin.get('license_name', origin['license'])}, as of the source."


def _cache_row(name: str, nbytes: int, plan: ConversionPlan) -> str:
    own, mha = nbytes / plan.source_cache_bytes, nbytes / plan.mha_cache_bytes
    return f"| {name} | {nbytes:,} | {own:.1%} | {mha:.1%} |"


def _calibration_lines(plan: ConversionPlan) -> list[str]:
    if plan.calibration is None:
        return ["No data was needed.", ""]
    sentences = [f"{name}: {value}" for name, value in findings(plan)]
    return [
        f"Calibrated on {plan.measured['calibration_windows']} windows of"
        f" {plan.calibration.window} tokens of {domain_list(plan.calibration.domains)}. In short:",
        "",
        *(f"- {sentence}" for sentence in sentences),
        "",
    ]


def domain_list(domains: Sequence[Domain]) -> str:
    """The names of texts, each with where it comes from if that says more."""
    return ", ".join(
        domain.name if domain.source in (domain.name, "") else f"{domain.name} ({domain.source})"
        for domain in domains
    )


def findings(plan: ConversionPlan) -> list[tuple[str, str]]:
    """What a compress conversion chose and measured: names and sentences."""
    measured, found = plan.measured, []
    if "freqfold" in measured:
        folds = measured["held_out_perplexity"].items()
        tried = ", ".join(f"{fold}: {value:.3f}" for fold, value in folds)
        chosen = f" (held-out perplexity with partial RoPE by fold: {tried})" if tried else ""
        found.append(("freqfold", f"{measured['freqfold']}{chosen}"))
    if "rope_theta" in measured:
        found.append(("rope_theta", f"{measured['rope_theta']:g}, by the held-out output error"))
    layers = measured.get("layers", [])
    if layers and "error" in layers[0]:
        errors = sorted(layer["error"] for layer in layers)
        weighed = plan.goal.steps and plan.goal.weighs_predictions
        how = ", both weighed by what they do to the predictions," if weighed else ""
        found.append(
            (
                "output error",
                f"{errors[-1]:.2%} of the variance{how} in the worst layer,"
                f" {errors[len(errors) // 2]:.2%} in the median (held-out calibration text)",
            )
        )
    if layers and "error_before" in layers[0]:
        before = sorted(layer["error_before"] for layer in layers)
        found.append(
            (
                "refined",
                f"{_refinement(plan)}; before, the errors were"
                f" {before[-1]:.2%} and {before[len(before) // 2]:.2%}",
            )
        )
    found += _losses(plan)
    found += _domain_findings(measured.get("domains", []))
    if layers and plan.method == "transmla":
        kept = min(layer["kept"] for layer in layers)
        found.append(("energy kept", f"{kept:.1%} in the worst layer"))
    return found


def _refinement(plan: ConversionPlan) -> str:
    """Steps and tokens that a refinement has taken."""
    assert plan.calibration is not None
    window, windows = plan.calibration.window, plan.measured["calibration_windows"]
    fitted = windows - max(1, windows // HELD_OUT)
    tokens = min(fitted, max(1, STEP_TOKENS // window)) * window
    steps = plan.goal.steps
    return (
        f"{steps} steps of {tokens:,} calibration tokens in each layer,"
        f" {steps * tokens * len(plan.layers):,} in all"
    )


def _domain_findings(domains: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The KL divergence on each text, where there are several, and whether they agree."""
    if len(domains) < 2:
        return []
    listed = "; ".join(
        f"{domain['name']}{'' if domain['calibrated'] else ' (not calibrated on)'}"
        f" {domain['kl']:.3g} (the source's own loss is {domain['source_loss']:.3g})"
        for domain in domains
    )
    losses = {domain["name"]: (domain["kl"], domain["source_loss"]) for domain in domains}
    note = disagreement(losses, [domain["name"] for domain in domains if domain["calibrated"]])
    found = [("KL by text", f"{listed}; nats per token, held-out windows")]
    return [*found, ("note", note)] if note else found


def _losses(plan: ConversionPlan) -> list[tuple[str, str]]:
    """What the conversion costs the predictions, and what the algebra foresaw."""
    measured, found = plan.measured, []
    if len(set(plan.ranks)) > 1:
        found.append(("ranks", f"{', '.join(map(str, plan.ranks))}, where each saves most"))
    if "curve" in measured:
        several = len(plan.rope_dims) > 1
        points = ", ".join(
            f"{point['cache_ratio']:.0%}"
            + (f" with rope {point['rope_dim']}" if several else "")
            + (f" in {point['cache_format']}" if point["cache_format"] else "")
            + f": {point['predicted_kl']:.2g}"
            for point in measured["curve"]
        )
        looked = ", at the widths that were looked at" if several else ""
        found.append(("curve", f"{points} (cache kept: nats per token{looked}, {FORESEEN})"))
    if "considered" in measured:
        tried = ", ".join(
            f"{width}{f' in {kind}' if kind else ''}: {kl:.3g}"
            for width, kind, kl in measured["considered"]
        )
        chosen = f"{plan.target.qk_rope_head_dim}"
        if plan.target.cache_format:
            chosen += f" in {plan.target.cache_format}"
        found.append(("rope", f"{chosen}, of {tried} nats per token at this cache, predicted"))
    if "held_out_kl" in measured:
        kl = f"{measured['held_out_kl']:.4g} nats per token from the source's on held-out"
        kl += " calibration text (KL divergence)"
        if "predicted_kl" in measured:
            kl += f"; {measured['predicted_kl']:.4g} {FORESEEN}"
        found.append(("predictions", kl))
    if "search" in measured:
        tried = ", ".join(f"{ratio:.1%}: {kl:.4g}" for ratio, kl in measured["search"])
        found.append(("search", f"at most {plan.goal.max_kl:g} nats per token; tried {tried}"))
    return found
