"""Folders with their own code: without mlakit they are the same function; and other sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mlakit.conversion.apply import convert
from mlakit.engines import vllm_plugin
from mlakit.engines.export import export
from mlakit.engines.targets import OWN_CODE_DECODERS
from mlakit.engines.vllm_plugin import fit, servable_shape
from mlakit.errors import UnsupportedModelError
from mlakit.families import read_model
from mlakit.nn.hf import load
from tiny_models import TEXT, save_tiny

FAST = {"refine_steps": 0, "calibration_tokens": 1024, "cache_ratio": 0.75}
SPECIAL: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "phi3": {"sliding_window": None, "pad_token_id": 0},
    "glm": {"pad_token_id": 0},
    "glm4": {"pad_token_id": 0},
    "stablelm": {"num_key_value_heads": 2},
    "smollm3": {"num_hidden_layers": 4, "pad_token_id": 0},
    "granite": {"attention_multiplier": 0.4, "logits_scaling": 2.0, "residual_multiplier": 0.5},
}

ELSEWHERE = """
import sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

sys.modules["mlakit"] = None  # an import of it fails
folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32").eval()
assert "transformers_modules" in type(model).__module__, type(model).__module__
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).kv_lora_rank == 256
bare = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="float32").eval()
long, short = torch.arange(2, 14)[None], torch.arange(5, 10)[None]
found = {"logits": model(input_ids=long).logits, "hidden": bare(input_ids=long).last_hidden_state}
for attention in ("eager", "sdpa"):
    model.set_attn_implementation(attention)
    step = model(input_ids=long[:, :7], use_cache=True)
    cache = step.past_key_values
    pieces = [step.logits]
    for start, end in ((7, 8), (8, 11), (11, 12)):
        step = model(input_ids=long[:, start:end], past_key_values=cache, use_cache=True)
        pieces.append(step.logits)
    found[attention] = torch.cat(pieces, dim=1)
found["row"] = torch.tensor([cache.layers[0].keys.shape[-1], cache.layers[0].values.shape[-1]])
how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
for beams in (1, 3):
    alone = [model.generate(ids, num_beams=beams, **how)[:, ids.shape[1]:] for ids in (long, short)]
    padding = torch.zeros(1, long.shape[1] - short.shape[1], dtype=torch.long)
    both = torch.cat((long, torch.cat((padding, short), dim=1)))
    mask = torch.ones_like(both)
    mask[1, : padding.shape[1]] = 0
    written = model.generate(both, attention_mask=mask, num_beams=beams, **how)[:, long.shape[1]:]
    for own, row in zip(alone, written):
        end = own.shape[1]
        assert torch.equal(own[0], row[:end]), (beams, own, row)
static = model.generate(long, cache_implementation="static", **how)
assert torch.equal(static, model.generate(long, **how))
torch.save(found, out)
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def converted(folder: Path, text: Path, options: dict[str, Any], **source: Any) -> Path:
    convert(save_tiny(folder / "source", **source), folder / "converted", calibration=text,
            **FAST | options)  # fmt: skip
    return folder / "converted"


def test_without_mlakit_it_is_the_same_function(text: Path, tmp_path: Path) -> None:
    """Logits in one pass and through a cache, left padding, beams, a static cache."""
    folder = converted(tmp_path, text, {}, family="qwen2", rough=True)
    export(folder, tmp_path / "out", to="vllm-transformers", pad=True, text=text)
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "out"), str(tmp_path / "found.pt")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "code")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt")
    with torch.no_grad():
        ids = torch.arange(2, 14)[None]
        ours = load(folder)(input_ids=ids, output_hidden_states=True)
    for name, expected in {
        "logits": ours.logits,
        "eager": ours.logits,
        "sdpa": ours.logits,
        "hidden": ours.hidden_states[-1],
    }.items():
        # float32: products in another order, and norms of a rough model that amplify
        assert (found[name] - expected).std() < 2e-5 * expected.std(), name
    assert found["row"].tolist() == [256, 64]


def test_for_transformers_alone_nothing_is_filled_up(text: Path, tmp_path: Path) -> None:
    folder = converted(tmp_path, text, {"ranks": "even"}, dtype=torch.float16)
    found = export(folder, tmp_path / "out", to="transformers-code", text=text)
    assert found.shape.rank + found.shape.rope == found.width
    assert found.check.result_bytes == found.check.source_bytes


def test_mlakit_loads_the_folder_as_well(text: Path, tmp_path: Path) -> None:
    options = {"ranks": "measured"}
    folder = converted(tmp_path, text, options, rough=True, attention_bias=True)
    export(folder, tmp_path / "out", to="vllm-transformers", width=576, text=text)
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        ours, filled = (load(path)(input_ids=ids).logits for path in (folder, tmp_path / "out"))
    assert (ours - filled).std() < 2e-5 * ours.std()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["head_dim"] == 576 and config["kv_lora_ranks"] is None
    assert all(len(layer) == 32 and layer[-1] == 0 for layer in config["rope_inv_freq"])


def test_sizes_that_fit_leave_every_number_as_it_is(text: Path, tmp_path: Path) -> None:
    """Heads of 64 dimensions with as many that turn are what vLLM takes."""
    source = {"hidden_size": 256, "head_dim": 64, "num_key_value_heads": 4}
    options = {"kv_lora_rank": 256, "qk_rope_head_dim": 64, "cache_ratio": None}
    folder = converted(tmp_path, text, options, **source)
    export(folder, tmp_path / "out", to="vllm-transformers", text=text)
    before, after = (
        {k: v for path in place.glob("*.safetensors") for k, v in load_file(path).items()}
        for place in (folder, tmp_path / "out")
    )
    prefix = "model.layers.1.self_attn."
    for name in ("q_proj.weight", "kv_a_proj_with_mqa.weight", "kv_a_layernorm.weight"):
        assert torch.equal(before[prefix + name], after[prefix + name])
    width = json.loads((tmp_path / "out" / "config.json").read_text())["head_dim"]
    assert width == json.loads((folder / "config.json").read_text())["head_dim"] == 320


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name == "phi3" else pytest.mark.slow)
        for name in OWN_CODE_DECODERS
    ],
)
def test_families(family: str, text: Path, tmp_path: Path) -> None:
    folder = converted(tmp_path, text, {}, family=family, **SPECIAL.get(family, {}))
    found = export(folder, tmp_path / "out", to="vllm-transformers", pad=True, text=text)
    assert found.check.one_pass.rms < 2e-5 and found.check.through_cache.rms < 2e-5


@pytest.mark.parametrize(
    "source,options,reason",
    [
        ({"family": "qwen3"}, {}, "latents are made of normed keys"),
        ({"family": "mistral", "sliding_window": 8}, {}, "no sliding windows"),
        ({"family": "gemma2"}, {}, "does not soft-cap scores"),
    ],
)
def test_what_cannot_be_fused_is_refused(
    source: dict[str, Any], options: dict[str, Any], reason: str, text: Path, tmp_path: Path
) -> None:
    folder = converted(tmp_path, text, options, **source)
    with pytest.raises(UnsupportedModelError, match=reason) as raised:
        export(folder, tmp_path / "out", to="vllm-transformers", pad=True, text=text)
    assert "mlakit's own classes" in str(raised.value.remedy)
    assert not (tmp_path / "out").exists()


def test_sizes_that_the_plugin_runs(caplog: Any, monkeypatch: Any) -> None:
    config: dict[str, Any] = {
        "model_type": "mla_qwen3", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "mla_form": "compress", "kv_lora_rank": 300, "qk_rope_head_dim": 48,
        "qk_nope_head_dim": 96, "v_head_dim": 96, "head_dim": 348, "softmax_scale": 0.1,
        "qk_norm": "head", "source_kv_heads": 4, "source_head_dim": 96, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "max_position_embeddings": 64, "latent_norm_eps": 4.0**14, "rope_blocks": 1,
        "mlakit": {"format_version": 1},
    }  # fmt: skip
    found = servable_shape(config, read_model(config))
    assert (found.rank, found.rope, found.nope, found.value) == (448, 64, 128, 128)
    assert servable_shape(config, read_model(config), on_cpu=True).rank == 512
    with pytest.raises(UnsupportedModelError, match="VLLM_MLA_DISABLE is set"):
        servable_shape(config, read_model(config), expanded=True)
    newer = config | {"mlakit": {"format_version": 2}}
    with pytest.raises(UnsupportedModelError, match="format version 2, this mlakit reads 1"):
        servable_shape(newer, read_model(newer))
    monkeypatch.setattr(vllm_plugin, "_platform", lambda: (False, False))
    fit(SimpleNamespace(to_dict=lambda: config))
    assert [record.getMessage()[:29] for record in caplog.records] == [
        "vLLM's kernels take rows of 5"
    ]
    fit(SimpleNamespace(to_dict=lambda: config | {"cache_format": "int4"}))
    assert "vLLM has no cache in int4" in caplog.text
