"""Exports: stock classes compute what the converted model computes, or nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from mlakit.checkpoint import open_checkpoint
from mlakit.cli import app
from mlakit.conversion.apply import convert
from mlakit.engines.export import EXPORTS, export
from mlakit.errors import UnsupportedModelError, UsageError, VerificationError
from mlakit.nn.hf import load
from tiny_models import TEXT, save_tiny

FAST = {"refine_steps": 0, "calibration_tokens": 1024}
SOURCES: dict[str, dict[str, Any]] = {
    "llama, rms_norm_eps 1e-5, tied": {
        "family": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    },
    "llama, rough, biases, llama3 rope": {
        "family": "llama", "rough": True,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        },
    },
    "mistral, bfloat16": {"family": "mistral", "sliding_window": None, "dtype": torch.bfloat16},
    "phi3": {"family": "phi3", "sliding_window": None, "pad_token_id": 0},
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def converted(folder: Path, text: Path, **options: Any) -> Path:
    goal = {"cache_ratio": 0.5, "qk_rope_head_dim": 8, "engine": "transformers", **FAST}
    goal |= {name: options.pop(name) for name in goal if name in options}
    source = save_tiny(folder / "source", **options)
    convert(source, folder / "converted", calibration=text, **goal)
    return folder / "converted"


@pytest.mark.parametrize("name", SOURCES)
def test_the_stock_class_computes_the_same(name: str, text: Path, tmp_path: Path) -> None:
    folder = converted(tmp_path, text, **SOURCES[name])
    found = export(folder, tmp_path / "out", text=text)
    # float32: a norm that is constant to 2^-17, and products in another order
    limit = 2e-5 if "bfloat16" not in name else found.check.tolerance
    assert found.check.one_pass.rms < limit and found.check.through_cache.rms < limit
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "deepseek_v3" and config["rms_norm_eps"] == 1e-6
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__module__.startswith("transformers.")
    assert "Exported for transformers" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert found.check.result_bytes == found.check.source_bytes


def test_ranks_by_layer_become_the_largest(text: Path, tmp_path: Path) -> None:
    options = {"engine": "mlakit", "without": ["frequencies"], "ranks": "measured"}
    source = save_tiny(tmp_path / "source", rough=True)
    convert(source, tmp_path / "own", calibration=text, cache_ratio=0.5, qk_rope_head_dim=8,
            **options, **FAST)  # fmt: skip
    ranks = json.loads((tmp_path / "own" / "config.json").read_text())["kv_lora_ranks"]
    found = export(tmp_path / "own", tmp_path / "out", text=text)
    if ranks is not None:
        assert found.shape.rank == max(ranks) and found.shape.rank + found.shape.rope > found.width
    assert found.check.one_pass.rms < 2e-5


def test_padded_to_the_sizes_of_vllm(text: Path, tmp_path: Path) -> None:
    folder = converted(tmp_path, text, engine="sglang")
    with pytest.raises(UnsupportedModelError, match=r"320 or 512 or 576.*not 8 \+ 8"):
        export(folder, tmp_path / "out", to="vllm", text=text)
    found = export(folder, tmp_path / "out", to="vllm", pad=True, text=text)
    assert (found.shape.rank, found.shape.rope, found.shape.nope) == (256, 64, 64)
    assert found.check.one_pass.rms < 2e-5


def test_llama_cpp_reads_a_rank_of_queries(text: Path, tmp_path: Path) -> None:
    folder = converted(tmp_path, text, engine="llama.cpp")
    export(folder, tmp_path / "out", to="llama.cpp", text=text)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["q_lora_rank"] == 0


def test_what_an_engine_cannot_express_is_refused_by_name(text: Path, tmp_path: Path) -> None:
    own = save_tiny(tmp_path / "own-source")
    convert(own, tmp_path / "own", calibration=text, cache_ratio=0.5, qk_rope_head_dim=8, **FAST)
    convert(own, tmp_path / "equal", equal_cache=True)
    biased = save_tiny(tmp_path / "biased-source", "qwen2", rough=True)
    convert(biased, tmp_path / "biased", equal_cache=True)
    for folder, reason in {
        "own": "frequencies of their own",
        "equal": "no class for the form equal-cache",
        "biased": "queries have no bias",
    }.items():
        with pytest.raises(UnsupportedModelError, match=reason) as raised:
            export(tmp_path / folder, tmp_path / "out")
        assert "--for transformers" in str(raised.value.remedy)
    path = tmp_path / "own" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cache_format": "int4"}))
    for to in ("vllm", "transformers-code"):
        with pytest.raises(UnsupportedModelError, match="no cache in int4"):
            export(tmp_path / "own", tmp_path / "out", to=to)
    with pytest.raises(UsageError, match="not a converted checkpoint"):
        export(own, tmp_path / "out")
    with pytest.raises(UsageError, match="none of"):
        export(tmp_path / "own", tmp_path / "out", to="mlakit")
    assert not (tmp_path / "out").exists() and set(EXPORTS) > {"vllm", "sglang"}


def test_a_wrong_export_is_never_written(text: Path, tmp_path: Path) -> None:
    """A latent beyond the bound that the norm's epsilon stands for is no constant any more."""
    folder = converted(tmp_path, text)
    path = next(
        path for path in folder.glob("*.safetensors")
        if "model.layers.0.self_attn.kv_a_proj_with_mqa.weight" in load_file(path)
    )  # fmt: skip
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"] *= 4000
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="differs in transformers from the model"):
        export(folder, tmp_path / "out", text=text)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == []


def test_folders_that_are_in_use(text: Path, tmp_path: Path) -> None:
    folder = converted(tmp_path, text)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        export(folder, tmp_path / "out")
    with pytest.raises(UsageError, match="never written to"):
        export(folder, folder / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_the_command(text: Path, tmp_path: Path) -> None:
    folder = converted(tmp_path, text)
    arguments = ["export", str(folder), "-o", str(tmp_path / "out"), "--text", str(text)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for words in ("rank 8 + rope 8", "checked in transformers", "from_pretrained"):
        assert words in result.output
    ids = torch.arange(2, 12)[None]
    ours, stock = (load(path)(input_ids=ids).logits for path in (folder, tmp_path / "out"))
    assert (ours - stock).std() < 2e-5 * ours.std()
    assert open_checkpoint(tmp_path / "out").config["kv_lora_rank"] == 8
