"""Converted checkpoints in transformers: Auto classes, round trips, errors, its own generate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)

from latent_models import FAMILIES, FORMS, latent_model, token_ids
from mlakit.errors import MlakitError, UnsupportedModelError, UsageError
from mlakit.nn.hf import attention_specs, cache_nbytes, load, new_cache, register

ALL = {"q_bias": True, "kv_a_bias": True, "o_bias": True, "tie_word_embeddings": True}


def saved(folder: Path, model: Any, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def tensors(folder: Path) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    """Every tensor of a folder: dtype, shape and bytes."""
    return {
        name: (tensor.dtype, tensor.shape, tensor.view(torch.uint8).numpy().tobytes())
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_round_trip_is_bit_for_bit(family: str, form: str, tmp_path: Path) -> None:
    dtype = {"llama": torch.float32, "mistral": torch.bfloat16, "qwen2": torch.float16}[family]
    changes = ALL if family == "qwen2" else {}
    model = latent_model(family, form, **changes).to(dtype)
    first = saved(tmp_path / "first", model, max_shard_size="20KB")
    assert (first / "model.safetensors.index.json").is_file()
    loaded = load(first)
    second = saved(tmp_path / "second", loaded, max_shard_size="20KB")
    assert tensors(first) == tensors(second)  # transformers may deal them out to other shards
    for name in ("config.json", "generation_config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert type(loaded) is FAMILIES[family][1] and not loaded.training
    assert loaded.dtype == dtype
    assert load(first, dtype="float32").dtype == torch.float32
    ids = token_ids(1, 5)
    with torch.no_grad():
        # A model moved with .to(dtype) rounds its rotary frequencies, a loaded one does not.
        model.model.rotary_emb.inv_freq = loaded.model.rotary_emb.inv_freq
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_config_holds_every_field(tmp_path: Path) -> None:
    config = json.loads((saved(tmp_path, latent_model()) / "config.json").read_text())
    assert config["model_type"] == "mla_llama"
    assert config["architectures"] == ["MLALlamaForCausalLM"]
    for key in (
        *("mla_form", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
        *("q_lora_rank", "rope_blocks", "softmax_scale", "q_bias", "kv_a_bias", "o_bias"),
        *("latent_norm_eps", "head_dim", "num_key_value_heads", "mlakit"),
    ):
        assert key in config, key
    assert config["head_dim"] == 20 and config["num_key_value_heads"] == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_classes_know_it(family: str, tmp_path: Path) -> None:
    register()
    register()
    folder = saved(tmp_path, latent_model(family))
    config, model = FAMILIES[family]
    assert type(AutoConfig.from_pretrained(folder)) is config
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is model
    bare = AutoModel.from_pretrained(folder)
    ids = token_ids(1, 5)
    with torch.no_grad():
        expected = load(folder).model(ids).last_hidden_state
        assert torch.equal(bare(ids).last_hidden_state, expected)


@pytest.mark.parametrize("form", FORMS)
def test_tensors_are_the_specs(form: str) -> None:
    model = latent_model("qwen2", form, **ALL)
    for index, spec in enumerate(attention_specs(model)):
        prefix = f"model.layers.{index}.self_attn."
        found = {
            name.removeprefix(prefix): tuple(tensor.shape)
            for name, tensor in model.state_dict().items()
            if name.startswith(prefix)
        }
        assert found == spec.tensor_shapes()
        assert spec.cache_width == model.config.head_dim
        assert spec.rope is not None and spec.rope.width == model.config.qk_rope_head_dim


def test_specs_of_an_ordinary_model_and_its_cache() -> None:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    specs = attention_specs(model)
    assert specs == attention_specs(config)
    assert [spec.kind for spec in specs] == ["gqa", "gqa"]
    cache = new_cache(model, 3, 100)
    assert isinstance(cache, DynamicCache) and cache_nbytes(cache) == 0
    model(token_ids(3, 7), past_key_values=cache)
    assert cache_nbytes(cache) == 3 * 7 * 4 * sum(spec.cache_width for spec in specs)


def test_the_cache_format_is_the_configs_or_the_callers(tmp_path: Path) -> None:
    folder = saved(tmp_path, latent_model(cache_format="int4"))
    for given, want in ((None, "int4"), ("fp8", "fp8")):
        cache = new_cache(load(folder, cache_format=given), 1, 9)
        assert [layer.cache_format.kind for layer in cache.layers] == [want, want]


def test_windowed_specs() -> None:
    changes = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    specs = attention_specs(latent_model("qwen2", **changes))
    assert [spec.sliding_window for spec in specs] == [None, 5]
    specs = attention_specs(latent_model("mistral", sliding_window=5))
    assert [spec.sliding_window for spec in specs] == [5, 5]


def test_a_real_checkpoint_loads(shared: Path) -> None:
    model = load(shared / "models" / "stories260k")
    assert model(token_ids(1, 4)).logits.shape[-1] == model.config.vocab_size


class TestDamagedFolders:
    """One clear error each."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return saved(tmp_path, latent_model(), max_shard_size="20KB")

    def test_no_config(self, tmp_path: Path) -> None:
        with pytest.raises(MlakitError, match=r"no config\.json"):
            load(tmp_path)

    def test_no_such_path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(MlakitError, match="cannot be loaded"):
            load("./no/such/folder")

    def test_unfinished_conversion(self, folder: Path) -> None:
        (folder / "plan.json").write_text("{}")
        load(folder)
        (folder / "model.safetensors.index.json").unlink()
        with pytest.raises(MlakitError, match="has not finished") as caught:
            load(folder)
        assert "mlakit convert" in caught.value.remedy

    def test_missing_shard(self, folder: Path) -> None:
        shard = sorted(folder.glob("*.safetensors"))[1]
        shard.unlink()
        with pytest.raises(MlakitError, match=shard.name):
            load(folder)

    def test_truncated_shard(self, folder: Path) -> None:
        shard = sorted(folder.glob("*.safetensors"))[1]
        shard.write_bytes(shard.read_bytes()[:-100])
        with pytest.raises(MlakitError, match="cannot be loaded"):
            load(folder)

    def test_missing_tensor(self, tmp_path: Path) -> None:
        folder = saved(tmp_path, latent_model())
        held = load_file(folder / "model.safetensors")
        del held["model.layers.1.self_attn.kv_b_proj.weight"]
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(MlakitError, match=r"kv_b_proj\.weight is missing"):
            load(folder)

    def test_tensor_without_a_place(self, tmp_path: Path) -> None:
        folder = saved(tmp_path, latent_model(q_bias=True))
        config = json.loads((folder / "config.json").read_text())
        config["q_bias"] = False
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(MlakitError, match=r"q_proj\.bias has no place"):
            load(folder)

    def test_float16_that_would_overflow(self, tmp_path: Path) -> None:
        folder = saved(tmp_path, latent_model(latent_norm_eps=4.0**16))
        assert load(folder, dtype="bfloat16").dtype == torch.bfloat16
        with pytest.raises(UsageError, match="does not fit in float16"):
            load(folder, dtype=torch.float16)

    def test_impossible_device_and_dtype(self, folder: Path) -> None:
        with pytest.raises(UsageError, match="device nowhere"):
            load(folder, device="nowhere")
        with pytest.raises(UsageError, match="float31"):
            load(folder, dtype="float31")

    def test_cache_formats_that_do_not_fit(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="no cache format 'fp7'"):
            load(folder, cache_format="fp7")
        sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
        plain = LlamaForCausalLM(LlamaConfig(vocab_size=9, num_attention_heads=2, **sizes))
        with pytest.raises(UsageError, match="a cache in int8 is for latents"):
            load(saved(tmp_path / "plain", plain), cache_format="int8")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"cache_format": "fp7"}))
        with pytest.raises(MlakitError, match="fp7"):
            load(folder)

    def test_wrong_shape(self, tmp_path: Path) -> None:
        folder = saved(tmp_path, latent_model())
        held = load_file(folder / "model.safetensors")
        held["model.layers.1.self_attn.kv_b_proj.weight"] = torch.zeros(3, 3)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(MlakitError, match=r"kv_b_proj\.weight has shape \[3, 3\]"):
            load(folder)

    def test_damaged_config(self, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        with pytest.raises(MlakitError, match="damaged"):
            load(folder)

    def test_newer_format(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["mlakit"]["format_version"] = 2
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UnsupportedModelError, match="format version 2"):
            load(folder)

    def test_impossible_sizes(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["qk_rope_head_dim"] = 7
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(MlakitError, match="qk_rope_head_dim"):
            load(folder)

    def test_pickled_weights_are_not_read(self, tmp_path: Path) -> None:
        folder = saved(tmp_path, latent_model())
        held = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(held, folder / "pytorch_model.bin")
        with pytest.raises(MlakitError, match="cannot be loaded"):
            load(folder)


PADDED = (3, 7, 5)


def padded_prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Three left-padded prompts of lengths 3, 7 and 5."""
    ids, mask = token_ids(3, 7), torch.zeros(3, 7, dtype=torch.long)
    for row, length in enumerate(PADDED):
        mask[row, 7 - length :] = 1
        ids[row, : 7 - length] = 0
    return ids, mask


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_left_padded_rows_of_hf_generate_equal_single_runs(family: str, form: str) -> None:
    model = latent_model(family, form)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ids, mask = padded_prompts()
    for paged in (True, False):
        caches = {"past_key_values": new_cache(model, 3, 16)} if paged else {}
        together = model.generate(ids, attention_mask=mask, **caches, **options)[:, 7:]
        for row, length in enumerate(PADDED):
            single = ids[row : row + 1, 7 - length :]
            alone = model.generate(single, use_cache=False, **options)[:, length:]
            assert torch.equal(together[row : row + 1], alone)


@pytest.mark.parametrize("form", FORMS)
def test_beams_equal_with_every_cache(form: str) -> None:
    model = latent_model(form=form)
    ids, mask = padded_prompts()
    options: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 8,
        "num_beams": 4,
        "do_sample": False,
        "pad_token_id": 0,
    }
    plain = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, **options), plain)
    paged = model.generate(ids, past_key_values=new_cache(model, 12, 16), **options)
    assert torch.equal(paged, plain)


@pytest.mark.parametrize("form", FORMS)
def test_speculation_and_static_caches(form: str) -> None:
    """Prompt lookup crops the cache; a static one hands out columns beyond the text."""
    model, ids = latent_model(form=form), token_ids(1, 6).repeat(1, 3)
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, use_cache=False, **options)
    for cache in (None, new_cache(model, 1, 40)):
        found = model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=3, **options)
        assert torch.equal(found, plain)
    static = model.generate(ids, cache_implementation="static", **options)
    assert torch.equal(static, plain)
