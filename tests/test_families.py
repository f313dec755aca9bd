"""Families: configs and tensors are read as transformers understands them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mlakit.checkpoint import open_checkpoint
from mlakit.errors import UnsupportedModelError
from mlakit.families import FAMILIES, convertible, read_model, tensor_shapes
from mlakit.families.table import table
from mlakit.spec import ModelSpec
from toy_models import SIZES, TOYS, YARN, as_json, converted_config, toy_config

LLAMA = {"model_type": "llama", **SIZES}


def modules(spec_config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(spec_config)
    return model


@pytest.mark.parametrize("name", TOYS)
def test_tensors_are_those_that_transformers_saves(name, tmp_path):
    config = toy_config(name)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert tensor_shapes(read_model(checkpoint.config)) == checkpoint.shapes


@pytest.mark.parametrize("name", TOYS)
def test_scale_window_softcap_and_rope_are_those_of_the_modules(name):
    config = toy_config(name)
    model = modules(config)
    spec = read_model(as_json(config))
    assert len(spec.layers) == len(model.model.layers)
    for layer, block in zip(spec.layers, model.model.layers):
        attention = block.self_attn
        assert layer.softmax_scale == pytest.approx(attention.scaling, rel=1e-12)
        window = getattr(attention, "sliding_window", None)
        if spec.family in ("mistral", "mixtral", "phi3"):  # theirs is on the config, for all layers
            window = config.sliding_window
        assert layer.sliding_window == window
        softcap = getattr(attention, "attn_logit_softcapping", None)
        assert layer.logit_softcap == (None if spec.family == "gemma3_text" else softcap)
        assert bool(layer.qk_norm) == hasattr(attention, "q_norm")
        assert (layer.rope is not None) == bool(getattr(attention, "use_rope", True))
        if layer.rope is not None:
            check_rope(layer, model.model.rotary_emb, config)


def check_rope(layer, rotary, config):
    kind = "sliding_attention" if layer.sliding_window else "full_attention"
    given, frequencies = config.rope_parameters, getattr(rotary, "inv_freq", None)
    if frequencies is None:  # one rotary embedding per layer type
        given, frequencies = given[kind], getattr(rotary, f"{kind}_inv_freq")
    assert layer.rope.dim == 2 * frequencies.numel()
    assert layer.rope.theta == given["rope_theta"]
    scaling = getattr(rotary, "attention_scaling", 1.0)
    assert layer.rope.attention_factor == pytest.approx(scaling)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=str,
)
def test_both_config_styles_give_the_same_spec(rope):
    new = {**LLAMA, "rope_parameters": {**rope, "rope_theta": 5e5}}
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": rope["rope_type"], **rope}}
    del old["rope_scaling"]["rope_type"]
    specs = [read_model(config).layers for config in (new, old)]
    assert specs[0] == specs[1]
    from transformers import LlamaConfig

    theirs = LlamaConfig(**{k: v for k, v in new.items() if k != "model_type"})
    assert specs[0][0].rope.as_rope_parameters() == theirs.rope_parameters
    scaling = modules(theirs).model.rotary_emb.attention_scaling
    assert specs[0][0].rope.attention_factor == pytest.approx(scaling)


def test_no_rope_keys_at_all_is_the_family_default():
    assert read_model(LLAMA).layers[0].rope.as_rope_parameters() == {
        "rope_theta": 10000.0,
        "rope_type": "default",
    }
    mixtral = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    assert read_model(mixtral).layers[0].rope.theta == 1e6


def test_rope_parameters_nested_by_layer_type():
    config = {
        **LLAMA,
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
        },
    }
    layers = read_model(config).layers
    assert [layer.sliding_window for layer in layers] == [8, None, None]
    assert [layer.rope.theta for layer in layers] == [1e4, 1e6, 1e6]
    assert [layer.rope.rope_type for layer in layers] == ["default", "linear", "linear"]
    config["rope_parameters"]["full_attention"] = None
    assert read_model(config).layers[1].rope is None
    with pytest.raises(UnsupportedModelError, match="rope_parameters"):
        convertible(config, tensor_shapes(read_model(config)))


@pytest.mark.parametrize(
    "extra,windows",
    [
        ({}, [None, None, None]),
        ({"sliding_window": 9}, [None, None, None]),
        ({"sliding_window": 9, "use_sliding_window": True}, [None, None, None]),
        ({"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1}, [None, 9, 9]),
        (
            {
                "sliding_window": 9,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            [9, None, 9],
        ),
    ],
)
def test_qwen2_windows(extra, windows):
    layers = read_model({**LLAMA, "model_type": "qwen2", **extra}).layers
    assert [layer.sliding_window for layer in layers] == windows


def test_unknown_family_is_named_with_those_that_are_known():
    with pytest.raises(UnsupportedModelError) as caught:
        read_model({"model_type": "rwkv"})
    assert "'rwkv'" in caught.value.message and caught.value.exit_code == 3
    assert all(name in caught.value.remedy for name in ("llama", "deepseek_v3", "mla_qwen2"))
    with pytest.raises(UnsupportedModelError, match="no model_type"):
        read_model({})


@pytest.mark.parametrize(
    "change,words",
    [
        ({"hidden_size": None}, ["hidden_size", "missing"]),
        ({"num_attention_heads": 5}, ["48", "5"]),  # REQUIREMENTS B08: both numbers
        ({"num_key_value_heads": 3}, ["4", "3"]),
        ({"num_hidden_layers": -1}, ["num_hidden_layers", "-1"]),
        ({"vocab_size": "96"}, ["vocab_size", "'96'"]),
        ({"head_dim": 7}, ["7", "pairs"]),
        ({"layer_types": ["full_attention"]}, ["1", "3"]),
        ({"layer_types": ["linear_attention"] * 3}, ["linear_attention"]),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, ["llama3", "low_freq_factor"]),
    ],
)
def test_configs_that_make_no_sense(change, words):
    config = {key: value for key, value in {**LLAMA, **change}.items() if value is not None}
    with pytest.raises(UnsupportedModelError) as caught:
        read_model(config)
    for word in words:
        assert word in caught.value.message


@pytest.mark.parametrize(
    "change,word",
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_scaling": {"type": "longrope", "short_factor": []}}, "rope_type 'longrope'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ],
)
def test_configs_not_converted_are_refused_by_key(change, word):
    config = {**LLAMA, **change}
    with pytest.raises(UnsupportedModelError, match=word):
        convertible(config, tensor_shapes(read_model(config)))


def test_mistral_with_some_windows_is_refused():
    types = ["full_attention", "sliding_attention", "full_attention"]
    config = {**LLAMA, "model_type": "mistral", "sliding_window": 9, "layer_types": types}
    with pytest.raises(UnsupportedModelError, match="layer_types"):
        convertible(config, tensor_shapes(read_model(config)))


@pytest.mark.parametrize("name", TOYS)
def test_families_are_convertible(name):
    config = as_json(toy_config(name))
    shapes = tensor_shapes(read_model(config))
    shapes["model.layers.0.self_attn.rotary_emb.inv_freq"] = (6,)  # old checkpoints have it
    assert isinstance(convertible(config, shapes), ModelSpec)


def test_yarn_is_convertible():
    config = {**LLAMA, "rope_parameters": YARN}
    assert convertible(config, tensor_shapes(read_model(config))).layers[0].rope.rope_type == "yarn"


def test_shapes_that_contradict_the_config_are_refused_with_both_numbers():
    shapes = tensor_shapes(read_model(LLAMA))
    key = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(UnsupportedModelError) as caught:
        convertible(LLAMA, shapes | {key: (48, 48)})
    assert all(word in caught.value.message for word in (key, "[48, 48]", "[24, 48]"))
    with pytest.raises(UnsupportedModelError, match="no tensor " + key):
        convertible(LLAMA, {name: shape for name, shape in shapes.items() if name != key})
    bias = "model.layers.0.self_attn.o_proj.bias"
    with pytest.raises(UnsupportedModelError, match=bias):
        convertible(LLAMA, shapes | {bias: (48,)})


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2"])
@pytest.mark.parametrize("form", ["compress", "equal-cache", "article"])
def test_converted_configs_are_read_as_their_models_are_built(form, family):
    from mlakit.nn import models

    config = converted_config(form, family)
    with torch.device("meta"):
        model = getattr(models, f"MLA{family}ForCausalLM")(config)
    spec = read_model(as_json(config))
    built = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert tensor_shapes(spec) == built
    assert {layer.kind for layer in spec.layers} == {"mla"}
    assert spec.layers[0].cache_width == config.head_dim
    assert spec.layers[0].softmax_scale == config.softmax_scale
    assert spec.layers[0].rope.width == config.qk_rope_head_dim
    with pytest.raises(UnsupportedModelError, match="already"):
        convertible(as_json(config), tensor_shapes(spec))


@pytest.mark.parametrize(
    "change,word", [({"mla_form": "gta"}, "gta"), ({"softmax_scale": None}, "None")]
)
def test_converted_config_of_another_version(change, word):
    with pytest.raises(UnsupportedModelError, match=word):
        read_model(as_json(converted_config("compress")) | change)


def test_real_checkpoints_are_convertible(shared):
    for name in ("stories260k", "llama2xs280k", "aidreams260k"):
        checkpoint = open_checkpoint(shared / "models" / name)
        spec = convertible(checkpoint.config, checkpoint.shapes)
        assert spec.family == "llama" and spec.dtype == "float32"
        assert tensor_shapes(spec) == checkpoint.shapes
    assert set(FAMILIES) >= {"llama", "mistral", "qwen2", "mla_llama", "mla_mistral", "mla_qwen2"}


def test_the_page_shows_the_table():
    page = Path(__file__).resolve().parents[1] / "docs" / "families.md"
    assert table() in page.read_text(encoding="utf-8")
