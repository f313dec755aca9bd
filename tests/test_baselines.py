"""The other ways to shrink a cache: each against a formula of its own, and what all must keep."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mlakit.baselines import bits, tokens
from mlakit.baselines.bits import Float8Layer, IntegerLayer, pack_bits, unpack_bits
from mlakit.baselines.method import require_plain
from mlakit.baselines.prefix import Prefix, read_prefix
from mlakit.errors import UnsupportedModelError
from mlakit.evaluation.quality import continuation_logits, feed
from mlakit.families import read_model
from mlakit.nn.hf import cache_nbytes, load
from tiny_models import save_tiny

PREFIX = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(save_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(2, 50, (60,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def prefix(model: Any, ids: Tensor) -> Prefix:
    return read_prefix(model, ids[:PREFIX], max_length=60, queries=True)


def after(model: Any, cache: Any, ids: Tensor, chunk: int = 20) -> Tensor:
    """Logits of what follows the prefix."""
    with torch.no_grad():
        parts = [
            feed(model, ids[i : i + chunk], cache, seen=i) for i in range(PREFIX, len(ids), chunk)
        ]
    return torch.cat(parts)


BY_SHARE: dict[str, Callable[[float], Callable[[Prefix], Any]]] = {
    "window": lambda share: partial(tokens.slide, share),
    **{
        name: lambda share, rule=rule: partial(tokens.evict, rule, share)  # type: ignore[misc]
        for name, rule in tokens.RULES.items()
    },
}
BY_BITS: dict[str, Callable[[int], Callable[[Prefix], Any]]] = {
    "int": lambda n: partial(bits.round_integers, n, False, 0),
    "kivi": lambda n: partial(bits.round_integers, n, True, 8),
}
SMALL = {
    **{name: make(0.5) for name, make in BY_SHARE.items()},
    **{name: make(4) for name, make in BY_BITS.items()},
    "fp8": bits.round_float8,
}


@pytest.mark.parametrize("name", BY_SHARE)
def test_all_tokens_give_identical_logits(
    name: str, model: Any, ids: Tensor, prefix: Prefix
) -> None:
    whole = continuation_logits(model, ids, PREFIX)
    assert torch.equal(after(model, BY_SHARE[name](1.0)(prefix), ids), whole)


@pytest.mark.parametrize("by_channel", [False, True])
def test_a_residual_of_everything_gives_identical_logits(
    by_channel: bool, model: Any, ids: Tensor, prefix: Prefix
) -> None:
    cache = bits.round_integers(2, by_channel, PREFIX, prefix)
    assert torch.equal(after(model, cache, ids), continuation_logits(model, ids, PREFIX))


@pytest.mark.parametrize("name", SMALL)
def test_steps_equal_one_shot(name: str, model: Any, ids: Tensor, prefix: Prefix) -> None:
    # The same sums in another order: some units in the last place of float32, logits below 30.
    at_once, stepwise = (after(model, SMALL[name](prefix), ids, chunk) for chunk in (20, 1))
    torch.testing.assert_close(stepwise, at_once, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", SMALL)
def test_the_exact_prefix_is_left_as_it_is(
    name: str, model: Any, ids: Tensor, prefix: Prefix
) -> None:
    kept = [tensor.clone() for pair in prefix.layers for tensor in pair]
    after(model, SMALL[name](prefix), ids)
    assert all(map(torch.equal, kept, (t for pair in prefix.layers for t in pair)))


@pytest.mark.parametrize("name", BY_SHARE)
def test_bytes_are_the_share(name: str, prefix: Prefix) -> None:
    own = cache_nbytes(prefix.cache)
    sizes = [cache_nbytes(BY_SHARE[name](share)(prefix)) for share in (0.1, 0.25, 0.5, 1.0)]
    assert sizes == [own * share for share in (0.1, 0.25, 0.5, 1.0)]


@pytest.mark.parametrize("name", BY_BITS)
def test_bytes_grow_with_bits(name: str, prefix: Prefix) -> None:
    sizes = [cache_nbytes(BY_BITS[name](count)(prefix)) for count in (2, 3, 4, 8)]
    assert sizes == sorted(set(sizes)) and sizes[-1] < cache_nbytes(prefix.cache)


def attention64(prefix: Prefix, layer: int) -> Tensor:
    """The causal attention of a layer by its formula, float64 ``[G, H/G, P, P]``."""
    query, key = prefix.queries[layer][0].double(), prefix.layers[layer][0][0].double()
    query = query.unflatten(0, (len(key), -1))
    logits = torch.einsum("ghqd,gkd->ghqk", query, key) * 8**-0.5
    future = torch.ones(PREFIX, PREFIX, dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -torch.inf).softmax(-1)


EXPECTED: dict[str, Callable[[Tensor], Tensor]] = {  # attention -> scores [G, P]
    "snapkv": lambda a: a[:, :, -2:].sum((1, 2)),  # 40 // 16 queries vote
    "h2o": lambda a: a.sum((1, 2)),
    "tova": lambda a: a[:, :, -1].sum(1),
    "a2sf": lambda a: sum(0.99 ** (PREFIX - 1 - q) * a[:, :, q].sum(1) for q in range(PREFIX)),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_scores_are_the_formula(name: str, prefix: Prefix) -> None:
    weights = tokens.RULES[name].weights(PREFIX)
    for layer, (keys, _) in enumerate(prefix.layers):
        scores = tokens.attention_scores(prefix.queries[layer], keys, weights, prefix.scale)
        # float32 softmax of up to 40 queries against float64; measured 8e-7
        torch.testing.assert_close(
            scores.double(),
            EXPECTED[name](attention64(prefix, layer)),
            atol=1e-5,
            rtol=1e-5,
        )


def test_chosen_tokens_are_the_highest() -> None:
    scores = torch.tensor([[5.0, 0, 0, 4, 0, 3, 0, 0], [0.0, 9, 0, 0, 1, 0, 2, 0]])
    heavy = tokens.choose(scores, tokens.RULES["h2o"], 4)  # half of them the newest
    assert heavy.tolist() == [[0, 3, 6, 7], [1, 4, 6, 7]]
    shared = tokens.choose(scores, tokens.RULES["tova"], 4)  # 2.5, 4.5, 0, 2, .5, 1.5, 1 and last
    assert shared.tolist() == [[0, 1, 3, 7], [0, 1, 3, 7]]
    pooled = tokens.choose(scores[1:], tokens.RULES["snapkv"], 3)
    means = [sum(scores[1, max(0, i - 2) : min(7, i + 3)]) / 5 for i in range(7)]
    best = sorted(range(7), key=lambda i: -means[i])[:2]
    assert pooled.tolist() == [[*sorted(best), 7]]


def test_a_window_keeps_the_first_and_the_newest(prefix: Prefix) -> None:
    layer = tokens.slide(0.5, prefix).layers[0]
    rows = [0, 1, 2, 3, *range(24, 40)]
    assert torch.equal(layer.keys, prefix.layers[0][0][:, :, rows])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.lists(st.integers(0, 255), min_size=1, max_size=70))
def test_packed_codes_come_back(width: int, numbers: list[int]) -> None:
    codes = torch.tensor(numbers) % 2**width
    packed = pack_bits(codes, width)
    assert packed.dtype == torch.uint8 and len(packed) <= -(-len(numbers) // 8) * width
    assert torch.equal(unpack_bits(packed, width, len(numbers)).long(), codes)


def rounded64(x: Tensor, count: int, axis: int) -> Tensor:
    """Asymmetric rounding by its formula, float64, scale and offset shared along ``axis``."""
    x = x.double()
    low = x.amin(axis, keepdim=True).half().double()
    step = ((x.amax(axis, keepdim=True) - low) / (2**count - 1)).half().double()
    return low + step * ((x - low) / step).round().clamp(0, 2**count - 1)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_integers_are_the_formula(count: int) -> None:
    keys, values = torch.randn(2, 1, 2, 70, 8, generator=torch.Generator().manual_seed(count))
    layer = IntegerLayer(keys, values, bits=count, by_channel=False, residual=0)
    for got, x in zip(layer.unpack(), (keys, values), strict=True):
        # the same numbers, float64 from float32 steps; measured 0
        torch.testing.assert_close(got.double(), rounded64(x, count, -1), atol=1e-6, rtol=1e-6)
    kivi = IntegerLayer(keys, values, bits=count, by_channel=True, residual=5)
    old_keys, old_values = kivi.unpack()  # 64 of 70: whole groups of 32, at least 5 exact
    wanted = rounded64(keys[:, :, :64].unflatten(2, (2, 32)), count, 3).flatten(2, 3)
    # the same numbers, float64 from float32 steps; measured 0
    torch.testing.assert_close(old_keys.double(), wanted, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        # likewise
        old_values.double(),
        rounded64(values[:, :, :64], count, -1),
        atol=1e-6,
        rtol=1e-6,
    )
    assert torch.equal(kivi.keys, keys[:, :, 64:])


def test_outlier_channels_need_scales_by_channel() -> None:
    keys = torch.randn(1, 2, 64, 32, generator=torch.Generator().manual_seed(0))
    keys[..., 3] *= 50
    values = torch.zeros_like(keys)
    errors = []
    for by_channel in (False, True):
        layer = IntegerLayer(keys, values, bits=4, by_channel=by_channel, residual=0)
        others = [channel for channel in range(32) if channel != 3]
        errors.append(float((layer.unpack()[0] - keys)[..., others].abs().mean()))
    assert errors[1] < errors[0] / 5


def test_float8_is_the_formula() -> None:
    keys, values = torch.randn(2, 1, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    got, _ = Float8Layer(keys, values).unpack()
    scale = keys.abs().amax((2, 3), keepdim=True) / 448
    assert torch.equal(got, (keys / scale).to(torch.float8_e4m3fn).float() * scale)


def test_models_whose_cache_would_be_misread_are_refused() -> None:
    from toy_models import as_json, toy_config

    for name, word in {
        "deepseek_v3": "latent",
        "gemma2": "soft-capped",
        "qwen2-windows": "window",
    }.items():
        with pytest.raises(UnsupportedModelError, match=word):
            require_plain(read_model(as_json(toy_config(name))), 48)


def test_a_window_that_never_binds_is_taken(tmp_path: Path) -> None:
    from toy_models import as_json, toy_config

    require_plain(read_model(as_json(toy_config("qwen2-windows"))), 7)
