"""What a converted folder says about itself: its config and its model card."""

from __future__ import annotations

from typing import Any

from mlakit import __version__
from mlakit.conversion.plan import FORMAT_VERSION, ConversionPlan
from mlakit.spec import ModelSpec

DROPPED_KEYS = ("torch_dtype", "rope_theta", "rope_scaling", "auto_map", "_name_or_path")
"""Source keys that are respelled below, or that point at code and places of the source."""


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
    config = {key: value for key, value in source.items() if key not in DROPPED_KEYS}
    return config | {
        "architectures": [f"MLA{model.family.capitalize()}ForCausalLM"],
        "model_type": f"mla_{model.family}",
        "dtype": plan.dtype,
        "rope_parameters": old.rope.as_rope_parameters() if old.rope else None,
        "num_key_value_heads": target.num_attention_heads,
        "head_dim": target.cache_width,
        "mla_form": target.mla_form,
        "q_lora_rank": None,
        "kv_lora_rank": target.kv_lora_rank,
        "qk_nope_head_dim": target.qk_nope_head_dim,
        "qk_rope_head_dim": target.qk_rope_head_dim,
        "v_head_dim": target.v_head_dim,
        "rope_blocks": target.rope.blocks if target.rope else 1,
        "softmax_scale": target.softmax_scale,
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


def model_card(plan: ConversionPlan) -> str:
    """``README.md`` of the result, in Markdown."""
    target, source = plan.target, plan.source_layer
    lines = [
        "---",
        "library_name: mlakit",
        "tags: [mlakit, multi-head-latent-attention, mla]",
        "---",
        "",
        f"# {plan.source} with multi-head latent attention",
        "",
        f"Converted by mlakit {__version__} ({plan.method}) from `{plan.source}`"
        f" (`{plan.model_type}`, fingerprint `{plan.fingerprint[:16]}`). {_promise(plan)}",
        "",
        "| per token, all layers | bytes | of its own cache | of MHA |",
        "|---|---|---|---|",
        _cache_row("source", plan.source_cache_bytes, plan),
        _cache_row("this model", plan.cache_bytes, plan),
        "",
        f"{source.num_attention_heads} query heads on {source.num_key_value_heads} key/value heads"
        f" of size {source.head_dim} became a latent of `kv_lora_rank` {target.kv_lora_rank} with"
        f" `qk_rope_head_dim` {target.qk_rope_head_dim}, stored as {plan.dtype}.",
        "",
        *_calibration_lines(plan),
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


def _promise(plan: ConversionPlan) -> str:
    if plan.goal.equal_cache:
        return "The cache keeps its size and the model computes the same function as its source."
    return "The cache is smaller; quality is lost unless the model is healed by training."


def _cache_row(name: str, nbytes: int, plan: ConversionPlan) -> str:
    own, mha = nbytes / plan.source_cache_bytes, nbytes / plan.mha_cache_bytes
    return f"| {name} | {nbytes:,} | {own:.1%} | {mha:.1%} |"


def _calibration_lines(plan: ConversionPlan) -> list[str]:
    if plan.calibration is None:
        return ["No data was needed.", ""]
    measured = plan.measured
    folds = ", ".join(
        f"{fold}: {value:.3f}" for fold, value in measured["held_out_perplexity"].items()
    )
    kept = [layer["kept"] for layer in measured["layers"]]
    return [
        f"Calibrated on {measured['calibration_windows']} windows of {plan.calibration.window}"
        f" tokens of `{plan.calibration.source}`; freqfold {measured['freqfold']}"
        + (f" (held-out perplexity with partial RoPE, by freqfold: {folds})" if folds else "")
        + f". The latent keeps {min(kept):.1%} (worst layer) of the balanced key and value energy.",
        "",
    ]
