"""Latents of a prefix that lose tokens, or are made from the source's own hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mlakit.baselines import Prefix, read_prefix, tokens
from mlakit.baselines.tokens import RULES
from mlakit.baselines.weights import decoder_layers
from mlakit.comparison.latent_prefix import evict_latents, latent_scores, latents_of_source
from mlakit.conversion.apply import convert
from mlakit.errors import MlakitError
from mlakit.evaluation.quality import continuation_logits, feed
from mlakit.nn.hf import cache_nbytes, load
from mlakit.ops.cpu_prefill import BLOCK
from tiny_models import TEXT, save_tiny

LENGTH, PREFIX = 190, 150
FORMS = ("equal", "half", "half-int4")
LOGITS = 5e-5
"""float32 sums in another order, logits below 10; measured 9.3e-6."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), max_position_embeddings=256)


@pytest.fixture(scope="module")
def models(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("converted")
    text = out / "text.txt"
    text.write_text(TEXT)
    convert(folder, out / "equal", equal_cache=True)
    convert(folder, out / "half", cache_ratio=0.5, refine_steps=0, calibration=text,
            calibration_tokens=1024)  # fmt: skip
    return {
        "equal": load(out / "equal"),
        "half": load(out / "half"),
        "half-int4": load(out / "half", cache_format="int4"),
    }


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(2, 50, (LENGTH,), generator=torch.Generator().manual_seed(1))


def read(model: Any, ids: Tensor) -> Prefix:
    return read_prefix(model, ids[:PREFIX], max_length=LENGTH, queries=True)


def after(model: Any, cache: Any, ids: Tensor, chunk: int = LENGTH) -> Tensor:
    with torch.no_grad():
        parts = [
            feed(model, ids[i : min(i + chunk, LENGTH)], cache, seen=i)
            for i in range(PREFIX, LENGTH, chunk)
        ]
    return torch.cat(parts)


def scores64(model: Any, prefix: Prefix, layer: int) -> Tensor:
    """Attention each token gets from all queries and heads, by the expanded formula, ``[P]``."""
    attention: Any = decoder_layers(model)[layer].self_attn.double()
    row = prefix.cache.read(layer, PREFIX)[:, None].double()  # type: ignore[attr-defined]
    key, _ = attention.expand_kv(*row.split([attention.kv_lora_rank, row.shape[-1]
                                             - attention.kv_lora_rank], -1))  # fmt: skip
    attention.to(model.dtype)
    logits = prefix.queries[layer].double() @ key.mT * prefix.scale
    future = torch.ones(PREFIX, PREFIX, dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -torch.inf).softmax(-1).sum((0, 1, 2))


@pytest.mark.parametrize("form", ["equal", "half"])
def test_queries_of_a_long_prefix_are_seen_too(form: str, models: Any, ids: Tensor) -> None:
    model = models[form]
    long = torch.cat([ids, ids])[:BLOCK]
    prefix = read_prefix(model, long, max_length=BLOCK, queries=True)
    short = read(model, ids)
    assert len(prefix.queries) == model.config.num_hidden_layers
    assert prefix.scale == pytest.approx(short.scale)
    for seen, known in zip(prefix.queries, short.queries, strict=True):
        # float32 sums in another order, queries below 15 (measured: 1.0e-5)
        torch.testing.assert_close(seen[:, :, :PREFIX], known, rtol=0, atol=5e-5)


@pytest.mark.parametrize("form", FORMS)
def test_one_score_for_all_heads_is_the_formula(form: str, models: Any, ids: Tensor) -> None:
    model = models[form]
    prefix = read(model, ids)
    for layer, module in enumerate(decoder_layers(model)):
        rows = prefix.cache.read(layer, PREFIX)[0]  # type: ignore[attr-defined]
        got = latent_scores(
            module.self_attn, prefix.queries[layer], rows, torch.ones(PREFIX), prefix.scale
        )
        wanted = scores64(model, prefix, layer)
        # float32 softmax of 150 queries in 4 heads; measured 2.1e-7
        torch.testing.assert_close(got[0].double(), wanted, atol=0, rtol=1e-6)


@pytest.mark.parametrize("form", ["equal", "half"])
def test_eviction_is_attention_without_the_tokens(form: str, models: Any, ids: Tensor) -> None:
    model = models[form]
    prefix = read(model, ids)
    thin = evict_latents(RULES["h2o"], 0.5, prefix)
    handles = []
    for layer, module in enumerate(decoder_layers(model)):
        score = scores64(model, prefix, layer)
        score[-37:] = torch.inf  # half of 75 tokens kept are the newest
        hidden = torch.ones(PREFIX, dtype=torch.bool)
        hidden[score.topk(75).indices] = False
        seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        seen[PREFIX:, :PREFIX][:, hidden] = False
        mask = torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~seen, -torch.inf)
        handles.append(
            module.self_attn.register_forward_pre_hook(
                lambda _, args, kwargs, mask=mask: (args, kwargs | {"attention_mask": mask}),
                with_kwargs=True,
            )
        )
    with torch.no_grad():
        wanted = model(input_ids=ids[None], use_cache=False).logits[0, PREFIX:]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(after(model, thin, ids), wanted, atol=LOGITS, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_all_latents_give_identical_logits(form: str, models: Any, ids: Tensor) -> None:
    model = models[form]
    kept = evict_latents(RULES["h2o"], 1.0, read(model, ids))
    assert torch.equal(after(model, kept, ids), continuation_logits(model, ids, PREFIX))


@pytest.mark.parametrize("form", FORMS)
def test_steps_equal_one_shot(form: str, models: Any, ids: Tensor) -> None:
    model = models[form]
    prefix = read(model, ids)
    once, steps = (
        after(model, evict_latents(RULES["snapkv"], 0.3, prefix), ids, n) for n in (LENGTH, 1)
    )
    torch.testing.assert_close(steps, once, atol=LOGITS, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_pages_hold_fewer_tokens(form: str, models: Any, ids: Tensor) -> None:
    """128 tokens fill two pages of 64, half of them one; the latents are left as they are."""
    model = models[form]
    prefix = read_prefix(model, ids[:128], max_length=128, queries=True)
    before = [page.clone() for page in prefix.cache.pages]  # type: ignore[attr-defined]
    thin = evict_latents(RULES["h2o"], 0.5, prefix)
    assert 2 * cache_nbytes(thin) == cache_nbytes(prefix.cache)
    assert thin.get_seq_length() == 128
    assert all(map(torch.equal, before, prefix.cache.pages))  # type: ignore[attr-defined]


def test_latents_of_the_source_are_its_hidden_states_projected(
    folder: Path, models: Any, ids: Tensor
) -> None:
    source, model = load(folder), models["half"]
    prefix = read(model, ids)
    cache: Any = latents_of_source(source, prefix)
    with torch.no_grad():
        states = source(input_ids=ids[None, :PREFIX], output_hidden_states=True).hidden_states
    for layer, (own, other) in enumerate(
        zip(decoder_layers(source), decoder_layers(model), strict=True)
    ):
        x = own.input_layernorm(states[layer])[0].double()
        rank = other.self_attn.kv_lora_rank
        wanted = x @ other.self_attn.kv_a_proj_with_mqa.weight[:rank].double().T
        got = cache.read(layer, PREFIX)[0, :, :rank].double()
        # float32 norms and sums of 32 terms, numbers of size 1; measured 3.7e-7
        torch.testing.assert_close(got, wanted, atol=2e-6, rtol=0)
    # The first layer sees embeddings alone, so its rows are the model's own.
    own_rows = prefix.cache.read(0, PREFIX)  # type: ignore[attr-defined]
    assert torch.equal(cache.read(0, PREFIX), own_rows)
    later = prefix.cache.read(1, PREFIX)  # type: ignore[attr-defined]
    assert not torch.allclose(cache.read(1, PREFIX), later, atol=0.01)


def test_an_equal_cache_of_the_source_is_the_original(
    folder: Path, models: Any, ids: Tensor
) -> None:
    source = load(folder)
    prefix = read(models["equal"], ids)
    got = after(models["equal"], latents_of_source(source, prefix), ids)
    wanted = continuation_logits(source, ids, PREFIX)
    torch.testing.assert_close(got, wanted, atol=LOGITS, rtol=0)


def test_a_prefix_without_latents_is_refused(folder: Path, ids: Tensor) -> None:
    with pytest.raises(MlakitError, match="without latents"):
        evict_latents(tokens.RULES["h2o"], 0.5, read(load(folder), ids))
