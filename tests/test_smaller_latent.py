"""Models whose attention is latent already, converted to a smaller latent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from converted import EXACT, IDS, check_rounding, check_saved, logits, relative_error
from mlakit.checkpoint import open_checkpoint
from mlakit.conversion.apply import convert
from mlakit.errors import MlakitError, UnsupportedModelError, UsageError
from mlakit.inspection import inspect
from mlakit.nn.hf import load, new_cache
from mlakit.nn.trace import trace_model
from tiny_models import LETTERS, save_tiny

SIZES = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
    "pad_token_id": None,
    "max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.8}
YARN["original_max_position_embeddings"] = 64
V2_GROUPS = {"topk_method": "group_limited_greedy", "routed_scaling_factor": 2.0}
CASES: dict[str, dict[str, Any]] = {
    "deepseek_v2-whole-queries": {"q_lora_rank": None, **V2_GROUPS},
    "deepseek_v2-yarn-bias": {"q_lora_rank": 24, "rope_parameters": YARN, "attention_bias": True},
    "deepseek_v3": {"q_lora_rank": 24},
    "deepseek_v3-halves-bias": {"q_lora_rank": 24, "rope_interleave": False}
    | {"attention_bias": True},
    "deepseek_v3-yarn-dense": {
        "q_lora_rank": None,
        "rope_parameters": YARN,
        "first_k_dense_replace": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "hidden_size": 30,
    },
}
CLOSED = {"refine_steps": 0, "calibration_tokens": 8192, "ranks": "even"}


def save(folder: Path, case: str, **changes: Any) -> Path:
    return save_tiny(folder, case.split("-")[0], **{**SIZES, **CASES[case], **changes})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Letters in random order: a text that leaves out none."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    numbers = torch.randint(len(LETTERS), (12000,), generator=torch.Generator().manual_seed(0))
    path.write_text("".join(LETTERS[number] for number in numbers))
    return path


@pytest.mark.parametrize("rough", [False, True], ids=["", "rough"])
@pytest.mark.parametrize("case", CASES)
def test_full_rank_is_exact(case: str, rough: bool, text: Path, tmp_path: Path) -> None:
    source = save(tmp_path / "source", case, rough=rough)
    plan = convert(source, tmp_path / "out", cache_ratio=1.0, calibration=text, **CLOSED)
    assert plan.cache_ratio == 1 and plan.target.qk_nope_head_dim == 12
    if rough:
        # Measured 12 to 17: the row's outliers are mixed with what is 300 times smaller.
        check_rounding(source, tmp_path / "out", times=40)
    else:
        found = check_saved(tmp_path / "out", plan, tmp_path)
        assert relative_error(found, logits(load(source))) < 4 * EXACT
    original, result = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    same = [tensor.name for tensor in plan.tensors if tensor.copied]
    assert any(".q_" in name for name in same) and any("mlp" in name for name in same)
    assert all(torch.equal(result.read(name), original.read(name)) for name in same)


@pytest.mark.parametrize("steps", [0, 6], ids=["closed form", "refined"])
@pytest.mark.parametrize("case", CASES)
def test_fewer_rotary_dimensions_and_rank(
    case: str, steps: int, text: Path, tmp_path: Path
) -> None:
    source = save(tmp_path / "source", case)
    options = {**CLOSED, "refine_steps": steps, "cache_ratio": 0.5, "qk_rope_head_dim": 4}
    plan = convert(source, tmp_path / "out", calibration=text, **options)
    assert plan.target.cache_width == 14 and plan.target.qk_nope_head_dim == 20
    found = check_saved(tmp_path / "out", plan, tmp_path)
    assert relative_error(found, logits(load(source))) < 1
    cache = new_cache(load(tmp_path / "out"), 1, 64)
    assert cache.nbytes == 2 * 64 * 14 * 4  # layers, tokens, numbers, bytes


def test_a_cut_rank_beats_principal_components_of_the_latent(text: Path, tmp_path: Path) -> None:
    """With one layer its output error is all there is, and it is judged on other text."""
    options = {"num_hidden_layers": 1, "num_key_value_heads": 4}
    source = save(tmp_path / "source", "deepseek_v3", **options)
    convert(source, tmp_path / "out", kv_lora_rank=10, calibration=text, **CLOSED)
    expected, other = load(source), load(source)
    with torch.no_grad():
        attention = other.model.layers[0].self_attn
        hidden = other.model.layers[0].input_layernorm(other.model.embed_tokens(torch.arange(58)))
        latent = attention.kv_a_layernorm(attention.kv_a_proj_with_mqa(hidden)[:, :20])
        axes = torch.linalg.eigh(latent.mT @ latent).eigenvectors[:, -10:]
        attention.kv_b_proj.weight.copy_(attention.kv_b_proj.weight @ axes @ axes.mT)
    pca = relative_error(logits(other), logits(expected))
    ours = relative_error(logits(load(tmp_path / "out")), logits(expected))
    assert ours < 0.9 * pca


def test_trace_inspect_and_a_second_conversion(text: Path, tmp_path: Path) -> None:
    source = save(tmp_path / "source", "deepseek_v3")
    convert(source, tmp_path / "out", cache_ratio=0.75, calibration=text, **CLOSED)
    told = trace_model(load(tmp_path / "out"), IDS[0, :6].tolist()).text()
    assert "c_kv" in told and "z = x W_Z" in told
    found = inspect(tmp_path / "out")
    assert found.layers[0].kind == "mla" and "converted already" in found.conversion
    assert inspect(source).conversion == "yes"
    with pytest.raises(UnsupportedModelError, match="converted already"):
        convert(tmp_path / "out", tmp_path / "again", cache_ratio=0.5, calibration=text)


@pytest.mark.parametrize(
    "options,words",
    [
        ({"equal_cache": True}, ["--equal-cache", "latent already"]),
        ({"cache_ratio": 0.5, "method": "transmla"}, ["transmla", "latent"]),
        ({"cache_ratio": 0.5, "qk_rope_head_dim": 10}, ["--qk-rope-head-dim 10", "8"]),
        ({"kv_lora_rank": 21}, ["--kv-lora-rank 21", "20"]),
        ({"cache_ratio": 0.2}, ["--cache-ratio 0.2", "8 rotary"]),
        ({"cache_ratio": 0.5, "engine": "vllm-transformers"}, ["vllm-transformers", "another"]),
    ],
)
def test_goals_that_make_no_sense(
    options: dict[str, Any], words: list[str], text: Path, tmp_path: Path
) -> None:
    source = save(tmp_path / "source", "deepseek_v3")
    with pytest.raises((UsageError, UnsupportedModelError)) as caught:
        goal = options if "equal_cache" in options else {"calibration": text, **options}
        convert(source, tmp_path / "out", **goal)
    assert all(word in caught.value.message for word in words)
    assert "--equal-cache (exact" not in caught.value.remedy
    assert not (tmp_path / "out").exists()


def test_layers_of_another_head_are_left_out(text: Path, tmp_path: Path) -> None:
    """DeepSeek-V3 stores layers that predict further tokens behind the last; nothing reads them."""
    source = save(tmp_path / "source", "deepseek_v3")
    checkpoint = open_checkpoint(source)
    extra = {
        name.replace("layers.1.", "layers.2."): checkpoint.read(name)
        for name in checkpoint.names
        if ".layers.1." in name
    }
    whole = {name: checkpoint.read(name) for name in checkpoint.names} | extra
    from safetensors.torch import save_file

    save_file(whole, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    plan = convert(source, tmp_path / "out", cache_ratio=1.0, calibration=text, **CLOSED)
    assert not any(".layers.2." in tensor.name for tensor in plan.tensors)
    assert any("num_nextn_predict_layers" in warning for warning in plan.warnings)
    assert relative_error(logits(load(tmp_path / "out")), logits(load(source))) < 4 * EXACT
    (source / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    with pytest.raises(MlakitError, match=r"layers\.2"):
        convert(source, tmp_path / "none", cache_ratio=1.0, calibration=text)
