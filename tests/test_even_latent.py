"""The basis of the latent for quantised caches: the same function, smaller rounding errors."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_models import FORMS, latent_model, token_ids
from mlakit.nn.even_latent import even_basis, even_latents, latent_moment
from mlakit.nn.hf import load
from mlakit.ops.cache_format import CacheFormat

DEMO = Path(__file__).resolve().parents[1] / "src" / "mlakit" / "assets" / "demo_model"
NORMED = {
    "qk_norm": "head", "source_kv_heads": 2, "source_head_dim": 8, "kv_lora_rank": 12,
}  # fmt: skip


def spectrum(size: int, seed: int, decay: float) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64)).Q
    return (axes * decay ** torch.arange(size, dtype=torch.float64)) @ axes.mT


def cost(change: torch.Tensor, moment: torch.Tensor, read: torch.Tensor) -> float:
    back = torch.linalg.inv(change)
    return float((change @ moment @ change.mT).trace() * (back.mT @ read @ back).trace())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 24), st.integers(0, 9), st.floats(0.4, 1.0), st.floats(0.4, 1.0))
def test_no_other_basis_costs_less(size: int, seed: int, first: float, second: float) -> None:
    """The bound is |S^1/2 W^1/2|_*^2; the floor under eigenvalues, 1e-9, adds up to its root."""
    moment, read = spectrum(size, seed, first), spectrum(size, seed + 1, second)
    change, back = even_basis(moment, read)
    eye = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(change @ back, eye, atol=1e-7, rtol=0)
    torch.testing.assert_close((change @ moment @ change.mT).trace(), moment.trace())
    roots = [torch.linalg.cholesky(part + 1e-13 * eye) for part in (moment, read)]
    least = float(torch.linalg.matrix_norm(roots[0].mT @ roots[1], "nuc")) ** 2
    assert cost(change, moment, read) <= least * (1 + 1e-3)
    assert cost(change, moment, read) <= cost(eye, moment, read) * (1 + 1e-6)


@pytest.mark.parametrize("family,form,changes", [
    *(("llama", form, {}) for form in FORMS),
    ("qwen2", "compress", {"q_bias": True, "kv_a_bias": True}),
    ("mistral", "compress", NORMED),
])  # fmt: skip
def test_the_function_stays(family: str, form: str, changes: dict[str, object]) -> None:
    """In float64, up to its rounding; the sizes stay as well."""
    model, ids = latent_model(family, form, **changes).double(), token_ids(2, 19)
    for name, part in model.named_parameters():
        if name.endswith("kv_a_proj_with_mqa.bias"):
            torch.nn.init.normal_(part)
    with torch.no_grad():
        before = model(ids).logits
        old = copy.deepcopy(model.state_dict())
        even_latents(model)
        after = model(ids).logits
    # The latent norm computes in float32 whatever the model's dtype: 2^-23 of logits near 1.
    torch.testing.assert_close(after, before, atol=3e-6, rtol=3e-6)
    changed = {name for name, part in model.state_dict().items() if not part.equal(old[name])}
    assert {name.split(".")[-2] for name in changed} <= {
        "kv_a_proj_with_mqa", "kv_b_proj", "v_b_proj", "k_b_proj", "kv_a_layernorm"
    }  # fmt: skip
    rank, rope = model.config.kv_lora_rank, model.config.head_dim - model.config.kv_lora_rank
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert not model.state_dict()[name][:rank].equal(old[name][:rank])
    if rope:
        assert model.state_dict()[name][rank:].equal(old[name][rank:])


def test_moment_of_inputs_that_are_as_wide_as_their_norm() -> None:
    """Against the latents of a million drawn inputs; 1 % is their own noise."""
    model = latent_model().double()
    attention, norm = model.model.layers[0].self_attn, model.model.layers[0].input_layernorm
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(10**6, 32, generator=draw, dtype=torch.float64) * norm.weight
    latent = (x @ attention.kv_a_proj_with_mqa.weight[:12].T).detach()
    found = latent_moment(attention, norm)
    torch.testing.assert_close(
        found, latent.T @ latent / len(x), atol=0.01 * found.max().item(), rtol=0
    )


def test_load_changes_the_basis_for_a_quantised_cache_only(tmp_path: Path) -> None:
    latent_model().save_pretrained(tmp_path)
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    stored = load(tmp_path).state_dict()[name]
    assert load(tmp_path).state_dict()[name].equal(stored)
    evened = load(tmp_path, cache_format="int4").state_dict()[name]
    assert not evened.equal(stored)
    assert load(tmp_path, cache_format="int8").state_dict()[name].equal(evened)


def rounded(model: torch.nn.Module, kind: str) -> list[torch.utils.hooks.RemovableHandle]:
    """Sends every latent through a cache format on its way."""

    def hook(norm: torch.nn.Module, inputs: object, latent: torch.Tensor) -> torch.Tensor:
        flat = latent.flatten(0, -2)
        how, slots = CacheFormat(kind, flat.shape[1], 0), torch.arange(len(flat))
        pages = how.allocate(1, len(flat))
        how.append(pages, slots, flat)
        return how.read(pages, slots).view(latent.shape)

    norms = [m for name, m in model.named_modules() if name.endswith("kv_a_layernorm")]
    return [norm.register_forward_hook(hook) for norm in norms]


@pytest.mark.parametrize("form", FORMS)
def test_what_is_saved_in_the_new_basis_is_the_same_model(form: str, tmp_path: Path) -> None:
    model = latent_model("llama", form)
    with torch.no_grad():  # layers whose latents grow by different powers of two
        for factor, layer in zip((1.0, 8.0), model.model.layers):
            layer.self_attn.kv_a_proj_with_mqa.weight[: layer.self_attn.kv_lora_rank] *= factor
    model.save_pretrained(tmp_path / "first")
    evened, ids = load(tmp_path / "first", cache_format="int8"), token_ids(2, 19)
    evened.save_pretrained(tmp_path / "second")
    with torch.no_grad():
        logits = evened(ids).logits
        assert torch.equal(load(tmp_path / "second")(ids).logits, logits)
        # Float32 weights times a basis and back: measured up to 4e-5, logits about 1.
        torch.testing.assert_close(logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_real_model_loses_a_fraction(tmp_path: Path) -> None:
    """The packaged model at half its cache: int4 and int8 lose less than a third of before."""
    from transformers import AutoTokenizer

    from mlakit.conversion.apply import convert
    from mlakit.data import builtin_text, token_windows

    convert(DEMO, tmp_path, cache_ratio=0.5, qk_rope_head_dim=32, refine_steps=0,
            calibration_tokens=4096, dtype="float32")  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = torch.tensor(token_windows(builtin_text("evaluation"), tokenizer, 128, 8))
    model = load(tmp_path)
    exact = model(ids).logits.log_softmax(-1).detach()

    def lost(kind: str) -> float:
        handles = rounded(model, kind)
        with torch.no_grad():
            found = model(ids).logits.log_softmax(-1)
        for handle in handles:
            handle.remove()
        return float((exact.exp() * (exact - found)).sum(-1).mean())

    before = {kind: lost(kind) for kind in ("int4", "int8", "fp8")}
    even_latents(model)
    after = {kind: lost(kind) for kind in before}
    print(before, after)
    assert after["int4"] < before["int4"] / 3 and after["int8"] < before["int8"] / 3
    assert after["fp8"] < before["fp8"]
