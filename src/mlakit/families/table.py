"""The families as a page shows them: which models, what is special, what is refused and why."""

from __future__ import annotations

from mlakit.families.rows import FAMILIES

ABOUT = {
    "llama": ("Llama 1 to 3.x, SmolLM, and others saved as Llama", "biases where the config says"),
    "mistral": ("Mistral", "one sliding window for all layers"),
    "qwen2": ("Qwen2, Qwen2.5", "biases on q, k, v; windows in upper layers"),
    "qwen3": ("Qwen3", "norm of each query and key head"),
    "granite": ("Granite 3", "its own factors on scores, embeddings, residuals and logits"),
    "olmo2": ("OLMo 2", "norm over the whole q and k projection, none in front of attention"),
    "smollm3": ("SmolLM3", "layers without positions"),
    "gemma": ("Gemma", "scaled embeddings, norms of 1 + w"),
    "gemma2": ("Gemma 2", "soft-capped scores, alternating windows, `query_pre_attn_scalar`"),
    "gemma3_text": ("Gemma 3, its text model", "norm of each head, windows, two rotary bases"),
    "mixtral": ("Mixtral", "experts, one by one on disk or fused"),
    "qwen2_moe": ("Qwen1.5-MoE, Qwen2-MoE", "experts and a shared one; biases on q, k, v"),
    "qwen3_moe": ("Qwen3-MoE", "experts; norm of each query and key head"),
    "phi3": ("Phi-3 and 3.5 4k, Phi-4", "q, k, v in one matrix; partly rotated heads"),
    "glm": ("GLM-4 9B", "half of each head rotated, in interleaved pairs"),
    "glm4": ("GLM-4-0414", "the same, with norms after the blocks"),
    "stablelm": ("StableLM 3B, StableLM 2 1.6B", "a quarter of each head rotated; LayerNorms"),
    "deepseek_v2": ("DeepSeek-V2, V2-Lite", "latent already: it becomes a smaller latent"),
    "deepseek_v3": (
        "DeepSeek-V3, R1, and others of that class, in 16 bits",
        "the same; rotated in pairs or halves, grouped routing",
    ),
}
"""Per family the models that have it, and what sets its attention apart."""

EQUAL_CACHE = "`--equal-cache` and `--method transmla`: there are no key and value heads to convert"
ARTICLE = "`--form article`: its class does not hand on the positions that form needs"


def table() -> str:
    """Every family that converts, as a Markdown table."""
    lines = [("`model_type`", "models", "what sets its attention apart", "refused, and why")]
    lines.append(("---",) * 4)
    for name, row in FAMILIES.items():
        if row.obstacle:
            continue
        models, special = ABOUT[name]
        refused = [f"`{key}`: {reason}" for key, reason in row.refused.items()]
        if row.layout.latent:
            refused.append(EQUAL_CACHE)
        elif not row.article:
            refused.append(ARTICLE)
        lines.append((f"`{name}`", models, special, "; ".join(refused)))
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in lines)
