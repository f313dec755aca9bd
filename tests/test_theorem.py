"""Theorem 1 in numbers: against the definitions, on models small enough to write them out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import mlakit
from mlakit.cli.prove import prove as verb
from mlakit.conversion.apply import convert
from mlakit.errors import UnsupportedModelError, VerificationError
from mlakit.theorem import Proof, prove
from mlakit.theorem.measure import EXACT
from mlakit.theorem.view import explanation
from toy_models import TOYS, toy_config

DEMO = Path(mlakit.__file__).parent / "assets" / "demo_model"


def saved(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(toy_config(name)).save_pretrained(folder)
    return folder


def run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(verb)
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.output


def test_both_numbers_on_the_packaged_model() -> None:
    found = mlakit.prove(DEMO)
    assert found.holds and found.more and not found.converted and len(found.layers) == 4
    for layer in found.layers:
        assert layer.cached == layer.cached_latent == 256
        for side in (layer.keys, layer.values):
            assert side.rank == 128  # G d: what the article caches
            # float64's rounding through an SVD of 512 rows: measured 2e-15 to 4e-15
            assert side.error is not None and side.error < 1e-13 < EXACT
            assert side.grouped is not None and side.grouped.largest == 64
            assert side.grouped.beyond < 1e-28
            assert side.latent.smallest == 128 and side.latent.beyond > 0.05  # 0.10 to 0.36


def test_pairs_are_the_bilinear_forms_written_out() -> None:
    """Singular values of W_Q,h^T W_K,g(h), both heads one above the other, not by the short way."""
    weights = load_file(DEMO / "model.safetensors")
    q, k = (
        weights[f"model.layers.1.self_attn.{name}.weight"].double().unflatten(0, (-1, 64))
        for name in ("q_proj", "k_proj")
    )
    forms = torch.cat([q[0].mT @ k[0], q[1].mT @ k[0]])
    sizes = torch.linalg.svdvals(forms)
    side = prove(DEMO).layers[1].keys
    assert side.grouped is not None
    mine = torch.tensor(side.grouped.sizes, dtype=torch.float64)
    # both are float64 decompositions of 512 rows: measured 3e-15
    torch.testing.assert_close(mine, (sizes / sizes[0])[:128], rtol=0, atol=1e-13)
    # the up-projections that prove takes: head 0 reads the first d latents, head 1 the others
    _, size, right = torch.linalg.svd(k.repeat_interleave(4, 0).flatten(0, 1))
    latent = (size[:128].sqrt()[:, None] * right[:128]).view(2, 64, 256)
    reached = torch.linalg.svdvals(torch.cat([q[0].mT @ latent[0], q[1].mT @ latent[1]]))
    other = torch.tensor(side.latent.sizes, dtype=torch.float64)
    torch.testing.assert_close(other, (reached / reached[0])[:128], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in TOYS if n not in ("stablelm", "llama-mha")])
def test_every_family_with_groups(name: str, tmp_path: Path) -> None:
    config = toy_config(name)
    groups, heads = config.num_key_value_heads, config.num_attention_heads
    folder = saved(name, tmp_path)
    if groups in (1, heads):
        with pytest.raises(UnsupportedModelError, match=r"Theorem 1 does not apply to layer 0"):
            prove(folder)
        return
    layer = prove(folder).layers[0]
    width = groups * layer.head_dim
    assert (layer.groups, layer.keys.rank, layer.values.rank) == (groups, width, width)
    assert layer.holds and layer.keys.latent.smallest == 2 * layer.head_dim


@pytest.mark.parametrize("form", ["absorbed", "article"])
def test_a_conversion_reaches_more_once_its_up_projections_change(
    form: str, tmp_path: Path
) -> None:
    source, result = saved("llama", tmp_path / "source"), tmp_path / "result"
    convert(source, result, equal_cache=True, form=form)
    found = prove(result)
    assert found.converted and found.holds and not found.more
    assert "not yet" in explanation(found)[-1]
    for layer in found.layers:
        assert layer.cached == layer.cached_latent == 48
        assert layer.keys.latent.largest == layer.values.latent.largest == layer.head_dim
    for shard in result.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if any(part in name for part in ("q_up_proj", "k_b_proj", "v_b_proj", "kv_b_proj")):
                tensors[name] = tensor + 1e-3 * torch.randn_like(tensor)
        save_file(tensors, shard, metadata={"format": "pt"})
    trained = prove(result)
    assert trained.more and "reached" in explanation(trained)[-1]
    for layer in trained.layers:
        assert layer.keys.latent.smallest == layer.values.latent.smallest == 2 * layer.head_dim


def test_where_it_does_not_apply_it_says_why(tmp_path: Path) -> None:
    for name, reason in {
        "llama-mha": "every head has a key of its own",
        "llama-mqa": "all heads share one key",
        "deepseek_v3": "one latent already",
    }.items():
        with pytest.raises(UnsupportedModelError, match=reason) as raised:
            prove(saved(name, tmp_path / name))
        assert "GQA" in raised.value.remedy


def test_weights_that_do_not_show_it(tmp_path: Path) -> None:
    """Groups whose keys are equal leave a latent nothing to choose from."""
    folder = saved("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name] = tensors[name][:12].repeat(2, 1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = prove(folder)
    assert [layer.holds for layer in found.layers] == [True, False, True]
    code, _ = run(str(folder))
    assert code == 1  # typer's; main() turns VerificationError into 4
    with pytest.raises(VerificationError):
        verb(str(folder), picture=None, as_json=True)


def test_command_line(tmp_path: Path) -> None:
    folder, picture = saved("llama", tmp_path / "model"), tmp_path / "new" / "proof.png"
    code, text = run(str(folder), "--picture", str(picture))
    assert code == 0 and "GQA, 4 heads on 2 of 12" in text and text.endswith("within reach\n")
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, text = run(str(folder), "--json")
    told = json.loads(text)
    assert code == 0 and told["holds"] and len(told["layers"]) == 3
    assert told["layers"][0]["keys"]["rank"] == 24
    assert isinstance(prove(folder), Proof)
