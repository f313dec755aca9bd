"""LazyLLM against attention under masks: which token saw which, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mlakit.baselines.lazy import LazyModel, cuts, require_same_loop
from mlakit.baselines.prefix import read_prefix
from mlakit.baselines.tokens import kept
from mlakit.baselines.weights import decoder_layers
from mlakit.errors import UnsupportedModelError
from mlakit.evaluation.quality import continuation_logits, feed
from mlakit.nn.hf import cache_nbytes, load
from tiny_models import save_tiny
from toy_models import toy_config

PREFIX, LENGTH, LAYERS = 30, 36, 6
LOGITS = 3e-5
"""float32 against float64, or sums in another order, logits below 10; measured 7e-6."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load(folder)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(2, 50, (LENGTH,), generator=torch.Generator().manual_seed(1))


def lazy_logits(model: Any, share: float, ids: Tensor, chunk: int) -> tuple[Tensor, Any]:
    lazy: Any = LazyModel(model, share)
    with torch.no_grad():
        prefix = read_prefix(lazy, ids[:PREFIX], max_length=LENGTH, new_cache=lazy.new_cache)
        cache = prefix.copy()
        parts = [
            feed(lazy, ids[i : i + chunk], cache, seen=i) for i in range(PREFIX, LENGTH, chunk)
        ]
    return torch.cat(parts), prefix.cache


def masked(model: Any, ids: Tensor, seen: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Logits and attention of every layer, ``seen[l][p, k]`` says whether p looks at k there."""
    handles = []
    for layer, rows in zip(decoder_layers(model), seen, strict=True):
        mask = torch.zeros(rows.shape, dtype=torch.float64).masked_fill(~rows, -torch.inf)[
            None, None
        ]
        handles.append(
            layer.self_attn.register_forward_pre_hook(
                lambda _, args, kwargs, mask=mask: (args, kwargs | {"attention_mask": mask}),
                with_kwargs=True,
            )
        )  # fmt: skip
    with torch.no_grad():
        out = model(input_ids=ids[None], use_cache=False, output_attentions=True)
    for handle in handles:
        handle.remove()
    return out.logits[0], [each[0].mean(0) for each in out.attentions]


def test_tokens_stop_and_come_back(folder: Path, model: Any, ids: Tensor) -> None:
    dense: Any = load(folder, dtype=torch.float64)
    dense.set_attn_implementation("eager")
    share = 0.4
    seen = [torch.eye(LENGTH, dtype=torch.bool) for _ in range(LAYERS)]
    done = [torch.zeros(LENGTH, dtype=torch.bool) for _ in range(LAYERS)]
    first_held: list[int] = []
    revived = 0
    wanted_logits = []
    for newest in range(PREFIX - 1, LENGTH):
        wanted = torch.arange(LENGTH) <= newest
        for layer in range(LAYERS):
            new = wanted & ~done[layer]
            revived += int(new[:newest].sum()) if newest >= PREFIX else 0
            seen[layer][new] |= (
                wanted & (torch.arange(LENGTH) <= torch.arange(LENGTH)[:, None])[new]
            )
            done[layer] |= new
            if layer in cuts(LAYERS, share):
                weights = masked(dense, ids, seen)[1][layer][newest].masked_fill(~wanted, -1)
                weights[newest] = 2
                wanted = torch.zeros(LENGTH, dtype=torch.bool)
                wanted[weights.topk(kept(cuts(LAYERS, share)[layer], newest + 1)).indices] = True
        if newest == PREFIX - 1:
            first_held = [int(each.sum()) for each in done]
        else:
            wanted_logits.append(masked(dense, ids, seen)[0][newest])
    got, cache = lazy_logits(model, share, ids, LENGTH)
    assert revived > 0
    assert [len(layer.places) for layer in cache.layers] == first_held
    torch.testing.assert_close(got.double(), torch.stack(wanted_logits), atol=LOGITS, rtol=0)


def test_all_tokens_give_the_logits_of_the_model(model: Any, ids: Tensor) -> None:
    got, cache = lazy_logits(model, 1.0, ids, LENGTH)
    torch.testing.assert_close(got, continuation_logits(model, ids, PREFIX), atol=LOGITS, rtol=0)
    assert not any(len(layer.stopped) for layer in cache.layers)


def test_steps_equal_one_shot(model: Any, ids: Tensor) -> None:
    steps, once = (lazy_logits(model, 0.4, ids, chunk)[0] for chunk in (1, LENGTH))
    torch.testing.assert_close(steps, once, atol=LOGITS, rtol=0)


def test_bytes_are_tokens_and_what_revives_them(model: Any, ids: Tensor) -> None:
    """Two cuts: to 21 tokens after the second layer and 12 after the fourth; int32 places."""
    _, cache = lazy_logits(model, 0.4, ids, LENGTH)
    held, stopped = [30, 30, 21, 21, 12, 12], 9 + 9
    row, state, place = 4 * 2 * 2 * 8, 4 * 32, 4
    # Places of a layer whose tokens all arrive are one tensor with others': at most one each.
    least = sum(held) * row + stopped * state
    assert [len(layer.places) for layer in cache.layers] == held
    assert least < cache_nbytes(cache) <= least + (sum(held) + stopped) * place


def test_a_model_with_more_between_its_layers_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="between its layers"):
        model = AutoModelForCausalLM.from_config(toy_config("gemma2"))
        require_same_loop(model, torch.arange(2, 12))
