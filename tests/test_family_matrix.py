"""Family by family: converted models compute what transformers' own classes compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from converted import EXACT, IDS, check_rounding, check_saved, logits, relative_error
from mlakit.checkpoint import open_checkpoint
from mlakit.conversion.apply import convert
from mlakit.errors import UnsupportedModelError, UsageError
from mlakit.families import FAMILIES, read_model
from mlakit.inspection import inspect
from mlakit.nn.hf import load
from mlakit.nn.trace import trace_model
from tiny_models import LETTERS, save_tiny

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0}
YARN["original_max_position_embeddings"] = 32
WINDOW = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
TIED = {"tie_word_embeddings": True}
LOCAL = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9}
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-odd": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 14}
    | {"hidden_size": 30},
    "llama-yarn": {"rope_parameters": YARN},
    "llama-llama3-bias": {"rope_parameters": LLAMA3, "attention_bias": True},
    "mistral-window": {"sliding_window": 9},
    "qwen2-window-tied": {**WINDOW, **TIED},
    "qwen3-tied": TIED,
    "qwen3-bias-window": {"attention_bias": True, **WINDOW},
    "granite-bias": {
        "attention_bias": True,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 4.0,
    },
    "olmo2": {},
    "olmo2-bias-tied": {"attention_bias": True, **TIED},
    "smollm3": {"no_rope_layer_interval": 2},
    "smollm3-yarn": {"no_rope_layer_interval": 2, "rope_parameters": YARN},
    "smollm3-window": {"no_rope_layers": [0, 1], "sliding_window": 9, "use_sliding_window": True},
    "gemma2": {"query_pre_attn_scalar": 12, "attn_logit_softcapping": 5.0, "sliding_window": 9},
    "gemma2-bias": {"attention_bias": True, "attn_logit_softcapping": None, "sliding_window": 9},
    "gemma3_text": {"query_pre_attn_scalar": 12, **LOCAL},
    "gemma3_text-bias": {"attention_bias": True, "sliding_window": 9, "tie_word_embeddings": False},
    "mixtral": {"num_local_experts": 4},
    "mixtral-window": {"num_local_experts": 3, "sliding_window": 9},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 2},
    "qwen3_moe": {**EXPERTS, "mlp_only_layers": [1]},
    "phi3-window": {"sliding_window": 9},
    "phi3-partial": {"partial_rotary_factor": 0.5},
    "gemma": {},
    "glm": {},
    "glm4": {},
    "glm-yarn": {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}},
    "stablelm-bias": {"use_qkv_bias": True, "partial_rotary_factor": 0.5},
    "glm-no-bias": {"attention_bias": False, "partial_rotary_factor": 0.25},
}
"""Families with what sets their attention apart: config keys."""

FIRST = {case.split("-")[0]: case for case in reversed(CASES)}.values()
"""One case of every family."""

COMPRESSED = [*FIRST, "llama-odd", "llama-yarn", "glm-yarn", "smollm3-yarn"]

METHODS: dict[str, dict[str, Any]] = {
    "transmla": {"method": "transmla", "freqfold": 1},
    "mlakit": {"method": "mlakit", "refine_steps": 4},
}


def save(folder: Path, case: str, **changes: Any) -> Path:
    options = {"pad_token_id": None, "max_position_embeddings": 256, **CASES[case], **changes}
    return save_tiny(folder, case.split("-")[0], **options)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Letters in random order: a text that leaves out none."""
    path, generator = tmp_path_factory.mktemp("text") / "text.txt", torch.Generator().manual_seed(0)
    letters = torch.randint(len(LETTERS), (6000,), generator=generator)
    path.write_text("".join(LETTERS[letter] for letter in letters))
    return path


@pytest.mark.parametrize("case", CASES)
def test_equal_cache_computes_the_same_function(case: str, tmp_path: Path) -> None:
    source = save(tmp_path / "source", case)
    plan = convert(source, tmp_path / "out", equal_cache=True)
    assert plan.cache_ratio == 1
    found = check_saved(tmp_path / "out", plan, tmp_path)
    assert relative_error(found, logits(load(source))) < EXACT
    original, result = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    copied = [tensor.name for tensor in plan.tensors if tensor.copied]
    assert all(torch.equal(result.read(name), original.read(name)) for name in copied)
    blocks = {name for name in original.names if ".mlp." in name or "experts" in name}
    assert blocks <= set(copied)


@pytest.mark.parametrize("case", CASES)
def test_weights_scaled_as_in_large_models(case: str, tmp_path: Path) -> None:
    """Norms, biases and channels that stand out. The source's own rounding is the measure."""
    folder = save(tmp_path / "source", case, rough=True)
    convert(folder, tmp_path / "out", equal_cache=True)
    check_rounding(folder, tmp_path / "out")


@pytest.mark.parametrize("case", FIRST)
def test_articles_form_computes_the_same_function(case: str, tmp_path: Path) -> None:
    source, family = save(tmp_path / "source", case), FAMILIES[case.split("-")[0]]
    if not family.article:
        with pytest.raises(UnsupportedModelError, match=family.name):
            convert(source, tmp_path / "out", equal_cache=True, form="article")
        return
    plan = convert(source, tmp_path / "out", equal_cache=True, form="article")
    found = check_saved(tmp_path / "out", plan, tmp_path)
    assert relative_error(found, logits(load(source))) < EXACT


@pytest.mark.parametrize("case", COMPRESSED)
def test_full_rank_is_exact_with_one_key_head(case: str, text: Path, tmp_path: Path) -> None:
    """With one key head nothing loses its rotation, and at full rank nothing else is lost."""
    options: dict[str, Any] = {"num_key_value_heads": 1, "max_position_embeddings": 64}
    folder = save(tmp_path / "source", case, rough=True, **options)
    options = {"cache_ratio": 1.0, "calibration_tokens": 1024, "refine_steps": 0}
    plan = convert(folder, tmp_path / "out", calibration=text, **options)
    assert plan.calibration is not None and plan.calibration.window == 64
    check_rounding(folder, tmp_path / "out")


@pytest.mark.parametrize("case", FIRST)
def test_the_published_method_is_exact_there_too(case: str, text: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "source", case, num_key_value_heads=1)
    options = {**METHODS["transmla"], "cache_ratio": 1.0, "calibration_tokens": 128}
    plan = convert(folder, tmp_path / "out", calibration=text, **options)
    found = check_saved(tmp_path / "out", plan, tmp_path)
    # As EXACT; the two halves of a covariance with eigenvalues down to rounding cost some more.
    assert relative_error(found, logits(load(folder))) < 4 * EXACT


@pytest.mark.parametrize("case", ["llama-llama3-bias", "llama-yarn", "gemma2", "glm", "smollm3"])
def test_far_beyond_the_calibration_windows(case: str, text: Path, tmp_path: Path) -> None:
    """Frequencies chosen on 64 tokens neither leave their range nor lose their way at 256."""
    source = save(tmp_path / "source", case, max_position_embeddings=64)
    options: dict[str, Any] = {"cache_ratio": 0.5, "qk_rope_head_dim": 4, "refine_steps": 0}
    plan = convert(source, tmp_path / "out", calibration=text, calibration_tokens=4096, **options)
    assert plan.calibration.window == 64 and plan.cache_ratio == 0.5
    ids = torch.randint(2, len(LETTERS) + 2, (4, 256), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        models = (load(tmp_path / "out"), load(source))
        pairs = zip(*(model(input_ids=ids).logits.split(64, 1) for model in models), strict=True)
        errors = [relative_error(*pair) for pair in pairs]
    # Measured 0.8 to 1.5: what a dropped rotation loses grows with the distance, up to all of it.
    assert errors[-1] < 2 * errors[0]


@pytest.mark.parametrize(
    "case,method", [(c, m) for c in COMPRESSED for m in METHODS if m == "mlakit" or c in FIRST]
)
def test_half_the_cache(case: str, method: str, text: Path, tmp_path: Path) -> None:
    source = save(tmp_path / "source", case)
    options: dict[str, Any] = {**METHODS[method], "cache_ratio": 0.5, "calibration_tokens": 128}
    rope = read_model(json.loads((source / "config.json").read_text())).layers[-1].rotary_dim
    if rope > 2:
        options |= {"qk_rope_head_dim": rope // 4 * 2, "freqfold": "auto"}
    plan = convert(source, tmp_path / "out", calibration=text, **options)
    assert plan.cache_ratio == 0.5
    assert bool(check_saved(tmp_path / "out", plan, tmp_path).isfinite().all())


def test_fused_experts_stay_fused(tmp_path: Path) -> None:
    folder = save(tmp_path / "source", "mixtral")
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = logits(model)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert any(name.endswith("experts.gate_up_proj") for name in open_checkpoint(folder).names)
    convert(folder, tmp_path / "out", equal_cache=True)
    assert relative_error(logits(load(tmp_path / "out")), expected) < EXACT


@pytest.mark.parametrize("case", ["qwen3-tied", "olmo2", "gemma2", "gemma3_text", "phi3-window"])
def test_trace_and_inspect_read_the_result(case: str, text: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "source", case)
    for name, options in {
        "equal": {"equal_cache": True},
        "half": {
            "cache_ratio": 0.5,
            "refine_steps": 0,
            "calibration": text,
            "calibration_tokens": 128,
        },
    }.items():
        convert(folder, tmp_path / name, **options)
        model = load(tmp_path / name)
        told = trace_model(model, IDS[0, :6].tolist()).text()
        assert "c_kv" in told and "W_0" in told
        assert inspect(tmp_path / name).layers[0].kind == "mla"
    assert inspect(folder).conversion == "yes"


BOTH = {"use_bidirectional_attention": True}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "case,change,word",
    [
        ("gemma2", BOTH, "use_bidirectional_attention"),
        ("gemma3_text", BOTH, "use_bidirectional_attention"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("phi3-window", {"rope_parameters": LONGROPE}, "longrope"),
        ("qwen3-tied", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ("olmo2", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ("llama", {"model_type": "gpt_neox"}, "gpt_neox"),
        ("stablelm-bias", {"use_parallel_residual": True}, "use_parallel_residual"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ("stablelm-bias", {"qk_layernorm": True}, "qk_layernorm"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(
    case: str, change: dict[str, Any], word: str, tmp_path: Path
) -> None:
    folder = save(tmp_path / "source", case)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UnsupportedModelError, match=word) as caught:
        convert(folder, tmp_path / "out", equal_cache=True)
    assert caught.value.exit_code == 3 and not (tmp_path / "out").exists()


def test_the_published_method_refuses_yarns_factor(text: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "source", "llama-yarn")
    with pytest.raises(UsageError, match="YaRN"):
        convert(folder, tmp_path / "out", cache_ratio=0.5, calibration=text, method="transmla")
    assert not (tmp_path / "out").exists()


def test_every_convertible_family_is_in_the_matrix() -> None:
    tested = {case.split("-")[0] for case in CASES}
    latent = {"deepseek_v2", "deepseek_v3"}  # tests/test_smaller_latent.py
    assert tested | latent == {name for name, row in FAMILIES.items() if not row.obstacle}
