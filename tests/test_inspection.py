"""inspect: right numbers from headers alone, one screen of text, no torch."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from mlakit import account
from mlakit.cli.inspect import inspect as verb
from mlakit.errors import MlakitError, UnsupportedModelError, UsageError
from mlakit.inspection import Inspection, inspect, print_inspection
from mlakit.inspection.view import ranges
from toy_models import SIZES, TOYS, converted_config, toy_config

LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "torch_dtype": "bfloat16",
}


def write(folder: Path, config: dict[str, object]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_toy(folder: Path, name: str) -> Path:
    AutoModelForCausalLM.from_config(toy_config(name)).save_pretrained(folder)
    return folder


def printed(found: Inspection, **options: object) -> str:
    stream = io.StringIO()
    print_inspection(found, Console(file=stream, **options))
    return stream.getvalue()


def variant(found: Inspection, attention: str):
    return next(v for v in found.variants if v.attention == attention)


def test_llama_3_8b_from_its_config_alone(tmp_path):
    found = inspect(write(tmp_path, LLAMA_3_8B))
    assert found.parameters["total"] == 8_030_261_248  # as published
    assert found.weight_bytes == 2 * 8_030_261_248 and not found.weights_present
    now, mla = found.variants[0], variant(found, "mla 512+64")
    assert (now.name, now.attention) == ("now", "gqa 32/8 x 128")
    assert now.cache_bytes_per_token == 131_072 and now.share_of_mha == 0.25
    assert now.cache_bytes == 2**30  # 8,192 tokens
    assert mla.share_of_own == pytest.approx(0.28125) and mla.share_of_mha == pytest.approx(
        0.0703, abs=1e-4
    )
    free = 24 * 2**30 - found.weight_bytes
    assert now.longest_context == free // 131_072
    assert any("config.json" in note for note in found.notes)
    assert found.conversion == "yes"


def test_published_sizes_of_deepseek_v3(tmp_path):
    found = inspect(write(tmp_path, DEEPSEEK_V3), memory="2TiB")
    assert round(found.parameters["total"] / 1e9) == 671  # as published, 37 B of them active
    assert 37e9 < found.parameters["active"] < 38e9
    assert found.variants[0].cache_bytes_per_token == 61 * 576 * 2  # REQUIREMENTS A11: 70 KB
    assert [group.layers for group in found.layers] == [(0, 1, 2), tuple(range(3, 61))]
    assert {group.kind for group in found.layers} == {"mla"}
    assert found.conversion == "yes"
    assert variant(found, "mha 128 x 192").share_of_own > 70


@pytest.mark.parametrize("name", TOYS)
def test_every_family_agrees_with_its_headers(name, tmp_path):
    found = inspect(save_toy(tmp_path, name))
    assert not [note for note in found.notes if "WARNING" in note or "leave out" in note]
    assert found.weights_present and found.variants[0].share_of_own == 1.0
    assert found.weight_bytes >= found.parameters["total"] * account.ITEMSIZE[found.dtype]
    assert {layer for group in found.layers for layer in group.layers} == {0, 1, 2}
    widths = [v.cache_bytes_per_token for v in found.variants if v.name == "mla"]
    assert widths == sorted(widths, reverse=True)
    names = [v.name for v in found.variants]
    assert names.count("now") == 1 and len(set(names) & {"mha", "mqa"}) >= 1


def test_headers_that_contradict_the_config_are_reported(tmp_path):
    save_toy(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    write(tmp_path, config | {"intermediate_size": 90, "num_hidden_layers": 4})
    notes = inspect(tmp_path).notes
    assert "9 tensors contradict" in notes[0] and "[80, 48], not [90, 48]" in notes[0]
    assert "9 tensors are missing" in notes[1] and "layers.3" in notes[1]
    write(tmp_path, config | {"num_hidden_layers": 2})
    found = inspect(tmp_path)
    assert "9 more tensors" in found.notes[0]
    assert "model.layers.2" in found.conversion


@pytest.mark.parametrize("form", ["compress", "equal-cache", "article"])
def test_converted_folder_shows_its_source(form, tmp_path):
    from mlakit.nn.models import MLALlamaForCausalLM

    MLALlamaForCausalLM(converted_config(form)).save_pretrained(tmp_path)
    found = inspect(tmp_path)
    now, source = found.variants[:2]
    assert not [note for note in found.notes if "WARNING" in note]
    assert now.mla_form == form and source.name == "source"
    assert source.attention == "gqa 4/2 x 12"
    assert source.cache_bytes_per_token == 3 * 2 * 2 * 12 * 4
    assert now.cache_bytes_per_token == 3 * 4 * (26 if form == "compress" else 48)
    assert "converted already" in found.conversion


def test_windows_are_explained(tmp_path):
    found = inspect(save_toy(tmp_path, "gemma2"), context=40)
    assert [group.sliding_window for group in found.layers] == [5, None]
    now = found.variants[0]
    assert now.cache_bytes < 40 * now.cache_bytes_per_token
    assert any("window" in note and "KiB" in note for note in found.notes)
    latent = next(v for v in found.variants if v.name == "mla")  # one page holds 64 tokens
    assert latent.cache_bytes == 64 * latent.cache_bytes_per_token
    mistral = inspect(write(tmp_path, LLAMA_3_8B | {"model_type": "mistral"}), context=10**6)
    assert mistral.variants[0].longest_context is None
    assert any("8,192 tokens at most" in note for note in mistral.notes)
    assert " any " in printed(mistral)


def test_dtype_comes_from_the_headers_where_the_config_has_none(tmp_path):
    import torch

    model = AutoModelForCausalLM.from_config(toy_config("llama"), dtype=torch.float16)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("dtype", None)
    write(tmp_path, config)
    found = inspect(tmp_path)
    assert found.dtype == "float16"
    assert found.weight_bytes == 2 * found.parameters["total"]
    with pytest.raises(UnsupportedModelError, match="float3"):
        inspect(write(tmp_path, config | {"dtype": "float3"}))


def test_a_size_asked_for_is_shown(tmp_path):
    found = inspect(write(tmp_path, LLAMA_3_8B), kv_lora_rank=100, qk_rope_head_dim=32)
    assert variant(found, "mla 100+32").cache_bytes_per_token == 32 * 132 * 2
    assert variant(inspect(tmp_path, kv_lora_rank=100), "mla 100+128").qk_rope_head_dim == 128
    with pytest.raises(UsageError, match="kv_lora_rank 0"):
        inspect(tmp_path, kv_lora_rank=0)
    for wrong in ({"context": 0}, {"batch": 0}, {"memory": "lots"}):
        with pytest.raises(UsageError):
            inspect(tmp_path, **wrong)


def test_batch_shares_weights_and_multiplies_the_cache(tmp_path):
    one, many = (inspect(write(tmp_path, LLAMA_3_8B), batch=batch) for batch in (1, 16))
    for before, after in zip(one.variants, many.variants):
        assert after.cache_bytes == 16 * before.cache_bytes
        page = 64 if after.name == "mla" else 1
        assert abs(after.longest_context - before.longest_context / 16) <= page
        assert after.flops_per_token == before.flops_per_token
        assert after.bytes_moved_per_token < before.bytes_moved_per_token


def test_one_screen_of_text(tmp_path):
    text = printed(inspect(write(tmp_path, LLAMA_3_8B))).replace(str(tmp_path), "MODEL")
    lines = text.splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 120 and "…" not in text
    assert "0-31" in text and "gqa 32/8 x 128" in text and "28.1 %" in text and "131,072" in text
    wide = printed(inspect(write(tmp_path, DEEPSEEK_V3)), width=60)
    assert "…" not in wide and "671 B parameters, 37.6 B active" in wide and " none " in wide


def test_a_narrow_terminal_gets_two_tables_with_the_same_numbers(tmp_path):
    found = inspect(write(tmp_path, LLAMA_3_8B))
    narrow = printed(found, width=80, force_terminal=True, color_system=None)
    assert max(map(len, narrow.splitlines())) <= 80 and "…" not in narrow
    words = [word for word in printed(found).split() if "─" not in word]
    assert set(words) <= set(narrow.split())


@pytest.mark.parametrize(
    "layers,short",
    [([0], "0"), ([0, 1], "0-1"), (range(32), "0-31"), ([0, 2, 4, 6], "0,2..6"),
     ([0, 1, 2, 5], "0-2,5"), ([1, 4], "1,4"), ([0, 2, 3], "0,2-3")],
)  # fmt: skip
def test_layer_numbers_in_short(layers, short):
    assert ranges(list(layers)) == short


def app() -> typer.Typer:
    made = typer.Typer()
    made.command()(verb)
    return made


def test_command_line_prints_json_and_text(shared):
    model = str(shared / "models" / "stories260k")
    result = CliRunner().invoke(app(), [model, "--json", "--batch", "2", "--memory", "1GiB"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["parameters"]["total"] == 260_032 and found["batch"] == 2
    assert found == json.loads(json.dumps(inspect(model, batch=2, memory="1GiB").as_dict()))
    text = CliRunner().invoke(app(), [model]).stdout
    assert "gqa 8/4 x 8" in text and "1,280" in text
    failed = CliRunner().invoke(app(), [str(shared / "nowhere")])
    assert isinstance(failed.exception, MlakitError)


def test_inspecting_a_folder_imports_neither_torch_nor_numpy_nor_rich(tmp_path):
    write(tmp_path, {"model_type": "llama", **SIZES})
    code = (
        "import sys; from mlakit.inspection import inspect\n"
        f"inspect({str(tmp_path)!r}).as_dict()\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'typer', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
