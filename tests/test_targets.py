"""What engines can express, and conversions planned for them, from configs alone."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mlakit.cli import app
from mlakit.conversion.apply import convert
from mlakit.conversion.budget import engine_choice, target_layer
from mlakit.conversion.goal import Goal
from mlakit.engines.targets import TARGETS, adaptations, padded_heads, require_expressible, table
from mlakit.errors import UnsupportedModelError, UsageError
from mlakit.evaluation import check
from mlakit.families import read_model
from mlakit.spec import AttentionSpec, ModelSpec, RopeSpec
from tiny_models import TEXT, save_tiny

DOCS = Path(__file__).resolve().parents[1] / "docs"
COMMON = {"vocab_size": 1000, "max_position_embeddings": 8192}
LLAMA2_7B = {
    **COMMON, "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "torch_dtype": "float16", "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3_8B = {
    **LLAMA2_7B, "num_key_value_heads": 8, "intermediate_size": 14336, "rope_theta": 500000.0,
}  # fmt: skip
LLAMA31_8B = {
    **LLAMA3_8B, "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
QWEN25_7B = {
    **COMMON, "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "rope_theta": 1e6, "torch_dtype": "bfloat16", "use_sliding_window": False,
}  # fmt: skip
QWEN25_HALF_B = {
    **QWEN25_7B, "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2,
    "num_hidden_layers": 24,
}  # fmt: skip
LLAMA32_1B = {
    **LLAMA31_8B, "hidden_size": 2048, "num_hidden_layers": 16, "head_dim": 64,
    "intermediate_size": 8192,
}  # fmt: skip
MISTRAL_01 = {
    **LLAMA3_8B, "model_type": "mistral", "sliding_window": 4096, "rope_theta": 10000.0,
}  # fmt: skip
QWEN3 = {**LLAMA3_8B, "model_type": "qwen3", "head_dim": 128}
GEMMA2 = {
    **COMMON, "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
}  # fmt: skip


def plan_sizes(config: dict[str, Any], goal: Goal) -> tuple[int, int]:
    model = read_model(config)
    require_expressible(goal.engine, model, goal.method)
    found = {(t.kv_lora_rank, t.qk_rope_head_dim) for t in map_layers(model, goal)}
    (sizes,) = found
    return sizes  # type: ignore[return-value]


def map_layers(model: ModelSpec, goal: Goal) -> list[AttentionSpec]:
    return [target_layer(layer, goal) for layer in model.layers]


@pytest.mark.parametrize(
    "config,options,sizes",
    [
        (LLAMA3_8B, {"cache_ratio": 1.0}, (512, 64)),  # 2048 numbers: 576 is all vLLM takes
        (LLAMA3_8B, {"cache_ratio": 0.28125}, (512, 64)),  # 576 exactly
        (LLAMA3_8B, {"cache_ratio": 0.28}, (448, 64)),
        (LLAMA3_8B, {"cache_ratio": 0.25}, (448, 64)),  # 512 exactly
        (LLAMA3_8B, {"cache_ratio": 0.2}, (256, 64)),
        (LLAMA3_8B, {"kv_lora_rank": 512}, (512, 64)),
        (LLAMA3_8B, {"cache_ratio": 0.3, "qk_rope_head_dim": 64}, (512, 64)),
        (LLAMA31_8B, {"cache_ratio": 0.3}, (512, 64)),
        (LLAMA2_7B, {"cache_ratio": 0.0703125}, (512, 64)),  # 576 of 8192
        (LLAMA2_7B, {"cache_ratio": 0.5}, (512, 64)),
        (LLAMA32_1B, {"cache_ratio": 0.5}, (448, 64)),  # heads of 64: all dimensions may turn
        (LLAMA3_8B, {"cache_ratio": 0.25, "method": "transmla"}, (448, 64)),
    ],
)
def test_vllm_sizes(
    config: dict[str, Any], options: dict[str, Any], sizes: tuple[int, int]
) -> None:
    assert plan_sizes(config, Goal(engine="vllm", **options)) == sizes


def test_qwen_has_biases_that_only_our_own_class_holds() -> None:
    with pytest.raises(UnsupportedModelError, match="queries have no bias") as caught:
        plan_sizes(QWEN25_7B, Goal(engine="vllm", cache_ratio=0.5))
    assert caught.value.remedy == "the nearest are --for vllm-transformers and --for vllm-plugin"
    assert plan_sizes(QWEN25_7B, Goal(engine="vllm-transformers", cache_ratio=0.5)) == (448, 64)
    assert plan_sizes(QWEN25_7B, Goal(engine="vllm-transformers", cache_ratio=0.6)) == (512, 64)


def test_norms_on_keys_run_in_vllm_through_the_plugin() -> None:
    assert plan_sizes(QWEN3, Goal(engine="vllm-plugin", cache_ratio=0.3)) == (512, 64)
    with pytest.raises(UnsupportedModelError, match="decoder layers are not those of gemma2"):
        plan_sizes(GEMMA2, Goal(engine="vllm-plugin", cache_ratio=0.3))


def test_a_model_whose_cache_is_smaller_than_any_kernel_s_is_refused() -> None:
    with pytest.raises(UsageError, match="has only 256: nothing would be gained") as caught:
        plan_sizes(QWEN25_HALF_B, Goal(engine="vllm-transformers", cache_ratio=0.5))
    assert "the source as it is" in caught.value.remedy


@pytest.mark.parametrize(
    "config,engine,reason",
    [
        (MISTRAL_01, "vllm", "no sliding windows"),
        (MISTRAL_01, "vllm-transformers", "no sliding windows"),
        (MISTRAL_01, "transformers", "no sliding windows"),
        (QWEN3, "vllm", "no norms on queries and keys"),
        (QWEN3, "vllm-transformers", "no norms on queries and keys"),
        (GEMMA2, "vllm-transformers", "does not soft-cap scores"),
        (GEMMA2, "vllm-transformers", "no heads of 256 dimensions"),
        (GEMMA2, "llama.cpp", "decoder layers are not those of gemma2"),
        (QWEN25_7B, "transformers", "queries have no bias"),
        (QWEN25_7B, "sglang", "what it caches has no bias"),
        ({**LLAMA3_8B, "attention_bias": True}, "vllm", "output projection has no bias"),
    ],
)
def test_what_an_engine_cannot_express_is_refused_by_name(
    config: dict[str, Any], engine: str, reason: str
) -> None:
    model = read_model(config)
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        require_expressible(engine, model, "mlakit")
    for name in re.findall(r"--for ([\w.-]+)", caught.value.remedy):
        require_expressible(name, model, "mlakit")  # what is offered works


@pytest.mark.parametrize(
    "config,options,offers",
    [
        (LLAMA3_8B, {"kv_lora_rank": 300}, ("--kv-lora-rank 256", "--kv-lora-rank 448")),
        (LLAMA3_8B, {"kv_lora_rank": 600}, ("--kv-lora-rank 512", "--for mlakit")),
        (LLAMA3_8B, {"cache_ratio": 0.1}, ("--cache-ratio 0.1563", "--cache-ratio 0.25")),
        (LLAMA3_8B, {"cache_ratio": 0.02}, ("--cache-ratio 0.1563", "--cache-ratio 0.25")),
        (
            LLAMA3_8B,
            {"cache_ratio": 0.5, "qk_rope_head_dim": 128},
            ("--for vllm --qk-rope-head-dim 64", "--for mlakit"),
        ),
    ],
)
def test_sizes_out_of_reach_name_the_nearest_two(
    config: dict[str, Any], options: dict[str, Any], offers: tuple[str, str]
) -> None:
    with pytest.raises(UsageError, match="--for vllm") as caught:
        plan_sizes(config, Goal(engine="vllm", **options))
    assert caught.value.remedy == f"the nearest are {offers[0]} and {offers[1]}"


def test_ratio_beyond_one_is_refused_as_ever() -> None:
    with pytest.raises(UsageError, match="not between 0 and 1"):
        plan_sizes(LLAMA3_8B, Goal(engine="vllm", cache_ratio=2.0))


def test_what_the_table_says_is_what_engines_take() -> None:
    vllm, own = TARGETS["vllm"], TARGETS["vllm-transformers"]
    assert vllm.widths == own.widths == (320, 512, 576)
    assert set(vllm.heads or ()) == {(128, 64, 128), (64, 64, 128), (192, 64, 256), (256, 0, 256)}
    assert vllm.parts_off == ("means", "frequencies") and own.parts_off == ()
    assert not (vllm.q_bias or vllm.latent_bias or vllm.o_bias)
    assert own.q_bias and own.latent_bias and own.o_bias
    assert vllm.rope_types == ("default", "yarn") and own.rope_types is None
    stock = TARGETS["transformers"]
    assert stock.widths is None and stock.heads is None and stock.rope_types is None
    assert stock.latent_bias and stock.o_bias and not stock.q_bias
    assert stock.parts_off == ("frequencies",)
    assert TARGETS["tensorrt-llm"].sizes(read_model(LLAMA3_8B).layers[0]) == ((512, 64),)
    for name in ("sglang", "llama.cpp"):
        assert TARGETS[name].widths is None and TARGETS[name].parts_off == vllm.parts_off
        assert TARGETS[name].rope_types == ("default", "yarn")
    everything = TARGETS["mlakit"]
    assert everything.parts_off == () and everything.layer_ranks and everything.decoders is None
    assert not any(t.layer_ranks for t in TARGETS.values() if t is not everything)
    assert not any(t.window or t.softcap for t in TARGETS.values() if t != everything)
    assert {t.name for t in TARGETS.values() if t.qk_norm} == {"mlakit", "vllm-plugin"}
    for config in (LLAMA3_8B, QWEN25_7B, MISTRAL_01, QWEN3, GEMMA2):
        assert everything.obstacles(read_model(config)) == []


@pytest.mark.parametrize(
    "dim,padded", [(32, (64, 128)), (64, (64, 128)), (96, (128, 128)), (128, (128, 128)),
                   (160, (192, 256)), (192, (192, 256))],
)  # fmt: skip
def test_heads_are_padded_to_the_smallest_that_holds_them(
    dim: int, padded: tuple[int, int]
) -> None:
    assert padded_heads(TARGETS["vllm"], dim) == padded
    layer = replace(read_model(LLAMA3_8B).layers[0], head_dim=dim, num_key_value_heads=32)
    assert (512, 64) in (TARGETS["vllm"].sizes(layer) or ())


def test_llama3_frequencies_become_the_plain_schedule_where_they_must() -> None:
    model = read_model(LLAMA31_8B)
    (goal, kept), source = (Goal(engine=e, cache_ratio=0.3) for e in ("vllm", "transformers")), None
    source = model.layers[0].rope
    plain, same = target_layer(model.layers[0], goal).rope, target_layer(model.layers[0], kept).rope
    assert plain == RopeSpec(theta=500000.0, dim=64) and source and same
    assert same.rope_type == "llama3" and same.parameters == source.parameters
    assert any("plain schedule" in sentence for sentence in adaptations("vllm", model))
    assert not any("plain schedule" in sentence for sentence in adaptations("transformers", model))
    with pytest.raises(UnsupportedModelError, match="which --method transmla keeps"):
        require_expressible("vllm", model, "transmla")
    linear = {**LLAMA3_8B, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    with pytest.raises(UnsupportedModelError, match="no rope_type 'linear'"):
        require_expressible("vllm", read_model(linear), "mlakit")


def test_what_an_engine_cannot_hold_is_switched_off_and_said() -> None:
    goal = Goal(engine="vllm", cache_ratio=0.3)
    assert not goal.has("means") and not goal.has("frequencies") and goal.has("theta")
    model = read_model(LLAMA3_8B)
    target = target_layer(model.layers[0], goal)
    assert not target.o_bias and Goal(cache_ratio=0.3).has("means")
    said = " ".join(adaptations("vllm", model))
    assert "rope_theta" in said and "o_proj has no bias" in said and "TRITON_MLA" in said
    assert "614 asked for" in (engine_choice(model.layers[0], target, goal) or "")
    assert adaptations("mlakit", model) == []
    small = read_model(LLAMA32_1B)
    assert any("padded with zeros to 64" in sentence for sentence in adaptations("vllm", small))


def test_equal_cache_is_for_mlakit_alone_and_engines_have_names() -> None:
    with pytest.raises(UsageError, match="only mlakit's own classes"):
        Goal(equal_cache=True, engine="vllm")
    with pytest.raises(UsageError, match="no such engine") as caught:
        Goal(cache_ratio=0.5, engine="vlm")
    assert "vllm-transformers" in caught.value.remedy


def test_the_page_shows_the_table() -> None:
    assert table() in (DOCS / "engines.md").read_text(encoding="utf-8")


def test_convert_for_an_engine_plans_and_says_why(tmp_path: Path) -> None:
    folder = save_tiny(
        tmp_path / "wide", hidden_size=64, num_attention_heads=4, num_key_value_heads=4, head_dim=64
    )
    arguments = ["convert", str(folder), "--for", "vllm", "--cache-ratio", "0.7", "--dry-run"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["goal"]["engine"] == "vllm"
    assert {(t["kv_lora_rank"], t["qk_rope_head_dim"]) for t in plan["layers"]} == {(256, 64)}
    warnings = " ".join(plan["warnings"])
    assert "320 numbers per token and layer" in warnings and "358 asked for" in warnings
    assert "kv_a_proj_with_mqa" in str(plan["tensors"]) and "o_proj.bias" not in str(
        plan["tensors"]
    )


def test_a_conversion_for_an_engine_has_what_it_takes(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    }  # fmt: skip
    folder = save_tiny(
        tmp_path / "wide", hidden_size=64, num_attention_heads=4, num_key_value_heads=4,
        head_dim=64, rope_parameters=rope,
    )  # fmt: skip
    (tmp_path / "text.txt").write_text(TEXT)
    plan = convert(
        folder, tmp_path / "out", cache_ratio=0.7, engine="vllm", refine_steps=0,
        calibration=tmp_path / "text.txt", calibration_tokens=512,
    )  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["kv_lora_rank"], config["qk_rope_head_dim"]) == (256, 64)
    assert config["rope_parameters"]["rope_type"] == "default" and config["rope_inv_freq"] is None
    assert config["rope_parameters"]["rope_theta"] == plan.measured["rope_theta"]
    assert not (config["q_bias"] or config["kv_a_bias"] or config["o_bias"])
    found = check(str(folder), str(tmp_path / "out"), text=tmp_path / "text.txt", windows=1)
    assert not found.failures  # through its cache what it computes in one pass
