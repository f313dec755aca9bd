"""Levels, low rank, heads, shared layers and reads, each against a formula of its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mlakit.baselines import METHODS, Bench, Variant
from mlakit.baselines import heads as heads_room
from mlakit.baselines.layers import merge_pairs, slerp
from mlakit.baselines.levels import (
    bell_levels,
    centre_and_width,
    fit_levels,
    nearest,
    random_rotation,
    turbo,
)
from mlakit.baselines.linear import FeatureMap, imitation, mixed_attention, teach
from mlakit.baselines.low_rank import value_pair
from mlakit.baselines.prefix import Rotation, read_prefix
from mlakit.baselines.reads import PAGE, page_bounds, pages_kept, read_share
from mlakit.baselines.slicing import residual_moment, slice_model
from mlakit.baselines.states import linear_bytes, mamba_bytes, rwkv_bytes, yoco_bytes
from mlakit.baselines.weight_size import DAMP, gptq, wanda
from mlakit.baselines.weights import attentions
from mlakit.checkpoint import open_checkpoint
from mlakit.data import Source
from mlakit.evaluation import open_subject
from mlakit.evaluation.quality import continuation_logits, feed
from mlakit.families import read_model
from mlakit.nn.hf import cache_nbytes
from tiny_models import TEXT, save_tiny

PREFIX, LENGTH = 40, 60
BY_NAME = {method.name: method for method in METHODS}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    path = save_tiny(folder / "model", num_hidden_layers=4)
    (folder / "text.txt").write_text(TEXT)
    spec = read_model(open_checkpoint(path).config)
    source = open_subject(str(path))
    text = Source("text", str(folder / "text.txt"))
    return Bench(source, spec, path, folder / "models", (text,), 0)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(2, 50, (LENGTH,), generator=torch.Generator().manual_seed(1))


def logits(variant: Variant, ids: Tensor, chunk: int = LENGTH) -> Tensor:
    """Of what follows the prefix, through the variant's cache."""
    prefix = read_prefix(
        variant.model, ids[:PREFIX], max_length=LENGTH,
        queries=variant.needs_queries, new_cache=variant.new_cache,
    )  # fmt: skip
    cache = variant.compress(prefix)
    with torch.no_grad(), variant.reading(cache):
        starts = range(PREFIX, LENGTH, chunk)
        return torch.cat([feed(variant.model, ids[i : i + chunk], cache, seen=i) for i in starts])


def nbytes(variant: Variant, ids: Tensor) -> int:
    prefix = read_prefix(
        variant.model, ids[:PREFIX], max_length=LENGTH, new_cache=variant.new_cache
    )
    return cache_nbytes(variant.compress(prefix))


# A value for every method at which nothing is lost, where there is one.
WHOLE = {"gqa": 2.0, "pruned-groups": 2.0, "low-rank": 1.0, "clover": 1.0, "mlkv": 1.0,
         "top-pages": 1.0}  # fmt: skip
SOME = {"gqa": 1.0, "pruned-groups": 1.0, "low-rank": 0.5, "clover": 0.75, "mlkv": 2.0,
        "top-pages": 0.5, "minicache": 0.5, "linear": 16.0, "kvquant": 4.0,
        "turboquant": 4.0}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_nothing_taken_away_changes_nothing(name: str, bench: Bench, ids: Tensor) -> None:
    variant = BY_NAME[name].build(bench, WHOLE[name])
    whole = continuation_logits(bench.source.model, ids, PREFIX)
    # Sharing and reading give the very numbers; a rotation there and back rounds float32.
    exact = name in ("gqa", "pruned-groups", "mlkv")
    torch.testing.assert_close(logits(variant, ids), whole, atol=0 if exact else 2e-4, rtol=0)


@pytest.mark.parametrize("name", SOME)
def test_steps_equal_one_shot(name: str, bench: Bench, ids: Tensor) -> None:
    variant = BY_NAME[name].build(bench, SOME[name])
    # The same sums in another order: float32, logits below 30.
    torch.testing.assert_close(logits(variant, ids, 1), logits(variant, ids), atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    "name,doses",
    {
        "gqa": (1, 2), "pruned-groups": (1, 2), "low-rank": (0.1, 0.25, 0.5, 1.0),
        "clover": (0.625, 0.75, 1.0), "mlkv": (4, 2, 1), "kvquant": (2, 3, 4),
        "turboquant": (2, 3, 4),
    }.items(),
)  # fmt: skip
def test_bytes_grow_with_the_dose(
    name: str, doses: tuple[float, ...], bench: Bench, ids: Tensor
) -> None:
    sizes = [nbytes(BY_NAME[name].build(bench, dose), ids) for dose in doses]
    assert sizes == sorted(set(sizes))


def test_the_source_stays_as_it_is(bench: Bench, ids: Tensor) -> None:
    before = continuation_logits(bench.source.model, ids, PREFIX)
    for name, dose in SOME.items():
        logits(BY_NAME[name].build(bench, dose), ids)
    assert torch.equal(continuation_logits(bench.source.model, ids, PREFIX), before)


def test_shares_of_bytes(bench: Bench, ids: Tensor) -> None:
    own = nbytes(Variant(bench.source.model), ids)
    for name, dose, share in [
        ("gqa", 1, 0.5), ("pruned-groups", 1, 0.5), ("low-rank", 0.25, 0.25),
        ("clover", 0.75, 0.75), ("mlkv", 2, 0.5), ("mlkv", 4, 0.25),
    ]:  # fmt: skip
        assert nbytes(BY_NAME[name].build(bench, dose), ids) == share * own, name


def test_levels_are_lloyds_for_a_bell() -> None:
    # Max, Quantizing for minimum distortion, 1960, table I: N = 4 and N = 2.
    torch.testing.assert_close(
        bell_levels(2), torch.tensor([-1.510, -0.4528, 0.4528, 1.510]), atol=2e-3, rtol=0
    )
    torch.testing.assert_close(bell_levels(1), torch.tensor([-0.798, 0.798]), atol=2e-3, rtol=0)


def test_fitted_levels_are_fixed_points() -> None:
    samples = torch.rand(5000, generator=torch.Generator().manual_seed(0)).double() ** 2
    levels = fit_levels(samples, 3)
    chosen = (samples[:, None] - levels).abs().argmin(1)
    assert torch.equal(nearest(samples, levels), chosen)
    means = torch.stack([samples[chosen == index].mean() for index in range(8)])
    torch.testing.assert_close(levels, means, atol=5e-3, rtol=0)  # thirty rounds are near the end


def test_turboquant_is_the_formula(bench: Bench, ids: Tensor) -> None:
    prefix = read_prefix(bench.source.model, ids[:PREFIX], max_length=PREFIX)
    matrix = random_rotation(8, 3).double()
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(8).double(), atol=1e-6, rtol=0)
    got, _ = turbo(3, 3, prefix).layers[1].unpack()
    keys = prefix.layers[1][0].double()
    norms = keys.norm(dim=-1, keepdim=True).half().double()
    turned = keys / norms @ matrix * 8**0.5
    levels = bell_levels(3).double()
    rounded = levels[(turned[..., None] - levels).abs().argmin(-1)]
    wanted = rounded @ matrix.mT / 8**0.5 * norms
    # A number half way between two levels may fall to either side in float32.
    assert ((got - wanted).abs() < 1e-4).double().mean() > 0.99


def test_kvquant_keeps_outliers_and_the_first_token(bench: Bench, ids: Tensor) -> None:
    prefix = read_prefix(bench.source.model, ids[:PREFIX], max_length=PREFIX)
    layer = BY_NAME["kvquant"].build(bench, 3).compress(prefix).layers[0]
    keys, values = layer.unpack()
    exact_keys, exact_values = prefix.layers[0]
    assert torch.equal(keys[:, :, 0], exact_keys[:, :, 0])
    packed = layer.packed[1]
    flat = exact_values[:, :, 1:].flatten()
    assert len(packed.places) == int(0.01 * flat.numel())
    far = ((flat.view(packed.shape) - packed.centre.float()) / packed.width.float()).abs().flatten()
    assert set(packed.places.tolist()) == set(far.topk(len(packed.places)).indices.tolist())
    torch.testing.assert_close(
        values[:, :, 1:].flatten()[packed.places.long()], flat[packed.places.long()],
        atol=1e-2, rtol=1e-3,  # float16
    )  # fmt: skip
    levels = torch.tensor(packed.levels)
    wanted = levels[((flat.view(packed.shape) - packed.centre.float()) / packed.width.float())[
        ..., None].sub(levels).abs().argmin(-1)]  # fmt: skip
    rebuilt = (wanted * packed.width.float() + packed.centre.float()).flatten()
    others = [i for i in range(flat.numel()) if i not in set(packed.places.tolist())]
    torch.testing.assert_close(values[:, :, 1:].flatten()[others], rebuilt[others])


def test_quantiles_are_torchs() -> None:
    x = torch.randn(3, 41, generator=torch.Generator().manual_seed(0))
    centre, width = centre_and_width(x, 0.1)
    low, high = x.quantile(0.05, -1, keepdim=True), x.quantile(0.95, -1, keepdim=True)
    torch.testing.assert_close(centre, ((low + high) / 2).half())
    torch.testing.assert_close(width, ((high - low) / 2).half())


def test_rotation_there_and_back(bench: Bench, ids: Tensor) -> None:
    prefix = read_prefix(bench.source.model, ids[:PREFIX], max_length=PREFIX)
    keys = prefix.layers[0][0]
    rotation = Rotation(bench.source.model, bench.spec)
    torch.testing.assert_close(rotation.turn(rotation.turn_back(keys)), keys)
    hidden = bench.source.model.model.embed_tokens(ids[:PREFIX])
    layer = bench.source.model.model.layers[0]
    unturned = layer.self_attn.k_proj(layer.input_layernorm(hidden)).unflatten(1, (2, 8))
    torch.testing.assert_close(
        # float32, turned and turned back; measured 5e-7
        rotation.turn_back(keys)[0],
        unturned.transpose(0, 1),
        atol=1e-5,
        rtol=1e-5,
    )


def test_low_rank_is_the_best_of_its_rank(bench: Bench) -> None:
    """On the calibration text itself no other basis of that rank leaves less."""
    variant = BY_NAME["low-rank"].build(bench, 0.5)
    layer, left, total = 2, 0.0, []
    for window in bench.calibration_ids:
        prefix = read_prefix(bench.source.model, window, max_length=len(window))
        exact = prefix.layers[layer][1][0].transpose(0, 1).flatten(1).double()
        got = variant.compress(prefix).layers[layer].unpack()[1][0].transpose(0, 1).flatten(1)
        left += float((got - exact).square().sum())
        total.append(exact)
    singular = torch.linalg.svdvals(torch.cat(total))
    assert left == pytest.approx(float(singular[8:].square().sum()), rel=1e-4)


def test_clover_is_the_truncated_product() -> None:
    generator = torch.Generator().manual_seed(0)
    values, outputs = torch.randn(2, 8, 32, generator=generator), torch.randn(
        2, 96, 8, generator=generator)  # fmt: skip
    down, up = (x.double() for x in value_pair(values, outputs, 3))
    product = outputs.double() @ values.double()
    best = torch.linalg.svdvals(product)[:, 3:].square().sum(1)
    got = outputs.double() @ up.mT @ down.mT @ values.double()
    # both in float64; measured 2e-11 of values near 1e4
    torch.testing.assert_close((product - got).square().sum((1, 2)), best, rtol=1e-9, atol=0)


def test_equal_heads_merge_exactly(bench: Bench, ids: Tensor) -> None:
    model = heads_room.copied(bench.source.model)
    for attention in attentions(model):
        for linear in (attention.k_proj, attention.v_proj):
            linear.weight.data = linear.weight.data[:8].repeat(2, 1)
    twin = Bench(
        bench.source._replace(model=model), bench.spec, bench.path, bench.workspace,
        bench.calibration, 0,
    )  # fmt: skip
    merged = BY_NAME["gqa"].build(twin, 1)
    torch.testing.assert_close(
        # float32 logits, sums in another order; measured 1e-5
        logits(merged, ids),
        continuation_logits(model, ids, PREFIX),
        atol=2e-5,
        rtol=1e-5,
    )


def test_the_group_that_adds_least_is_pruned(bench: Bench) -> None:
    importance = heads_room.group_importance(bench)
    seen: dict[int, list[Tensor]] = {}
    found = attentions(bench.source.model)
    for index, attention in enumerate(found):
        attention.o_proj.register_forward_pre_hook(
            lambda _, args, index=index: seen.setdefault(index, []).append(args[0].detach())
        )
    try:
        with torch.no_grad():
            for window in bench.calibration_ids:
                bench.source.model(input_ids=window[None], use_cache=False)
    finally:
        for attention in found:
            attention.o_proj._forward_pre_hooks.clear()
    for index, attention in enumerate(found):
        x, weight = torch.cat(seen[index], 1)[0].double(), attention.o_proj.weight.detach().double()
        wanted = [float((x[:, g * 16 : g * 16 + 16] @ weight[:, g * 16 : g * 16 + 16].mT)
                        .square().sum()) for g in range(2)]  # fmt: skip
        assert importance[index].tolist() == pytest.approx(wanted, rel=1e-4)
        kept = int(torch.tensor(wanted).argmax())
        pruned = attentions(BY_NAME["pruned-groups"].build(bench, 1).model)[index]
        rows = attention.k_proj.weight[kept * 8 : kept * 8 + 8]
        assert torch.equal(pruned.k_proj.weight, rows)


def test_slerp_is_half_way() -> None:
    a = torch.nn.functional.normalize(torch.randn(5, 7).double(), dim=-1)
    b = torch.nn.functional.normalize(torch.randn(5, 7).double(), dim=-1)
    middle = slerp(a, b)
    angle = (a * b).sum(-1).acos()
    for end in (a, b):
        torch.testing.assert_close((middle * end).sum(-1).acos(), angle / 2)
    torch.testing.assert_close(slerp(a, a), a)


def test_minicache_is_the_formula(bench: Bench, ids: Tensor) -> None:
    prefix = read_prefix(bench.source.model, ids[:PREFIX], max_length=PREFIX)
    cache = merge_pairs(2, prefix)
    for untouched in (0, 1):
        assert torch.equal(cache.layers[untouched].keys, prefix.layers[untouched][0])
    pair = [prefix.layers[i][0][0].transpose(0, 1).flatten(1).double() for i in (2, 3)]
    units = [x / x.norm(dim=-1, keepdim=True) for x in pair]
    middle = units[0] + units[1]  # half way on the circle: the bisector
    middle = middle / middle.norm(dim=-1, keepdim=True)
    far = (units[0] * units[1]).sum(-1).acos().topk(2).indices  # 5 % of 40
    for layer, x in zip(cache.layers[2:], pair, strict=True):
        wanted = middle * x.norm(dim=-1, keepdim=True)
        wanted[far] = x[far]
        got = layer.unpack()[0][0].transpose(0, 1).flatten(1).double()
        # float32 directions and norms against float64; measured 6e-7
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_minicache_counts_what_is_shared_once(bench: Bench, ids: Tensor) -> None:
    prefix = read_prefix(bench.source.model, ids[:PREFIX], max_length=PREFIX)
    row = 16 * 4  # G d numbers of float32
    layer = 2 * PREFIX * row
    merged = 2 * (PREFIX * row + 2 * 4 + 2 * (PREFIX * 4 + 2 * row))  # keys and values of a pair
    assert cache_nbytes(merge_pairs(2, prefix)) == 2 * layer + merged


def test_followers_hold_nothing(bench: Bench, ids: Tensor) -> None:
    variant = BY_NAME["mlkv"].build(bench, 4)
    prefix = read_prefix(
        variant.model, ids[:PREFIX], max_length=PREFIX, new_cache=variant.new_cache
    )
    assert cache_nbytes(prefix.cache) == 2 * PREFIX * 16 * 4
    weights = [a.k_proj.weight.double() for a in attentions(bench.source.model)]
    leader = attentions(variant.model)[0].k_proj.weight.double()
    torch.testing.assert_close(leader, sum(weights) / 4, atol=1e-6, rtol=0)


def test_page_bounds_hold_and_are_reached() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(1, 2, 64, 8, generator=generator), torch.randn(
        1, 4, 5, 8, generator=generator)  # fmt: skip
    pages = keys.unflatten(2, (-1, PAGE))
    bounds = page_bounds(queries, pages.amin(3), pages.amax(3))
    products = queries @ keys.repeat_interleave(2, 1).mT
    assert (products.unflatten(3, (-1, PAGE)).amax(-1) <= bounds + 1e-5).all()
    q, low, high = (
        queries[0, 3, 2].double(),
        *(x[0, 1, 1].double() for x in (pages.amin(3), pages.amax(3))),
    )
    wanted = sum(max(a * b, a * c) for a, b, c in zip(q, low, high, strict=True))
    assert float(bounds[0, 3, 2, 1]) == pytest.approx(float(wanted), rel=1e-5)


def test_reading_some_pages_is_attention_over_them(bench: Bench, ids: Tensor) -> None:
    """The first layer's keys do not depend on what is read: check its output by hand."""
    variant = BY_NAME["top-pages"].build(bench, 0.5)
    prefix = read_prefix(bench.source.model, ids[:PREFIX], max_length=LENGTH)
    cache = variant.compress(prefix)
    attention = bench.source.model.model.layers[0].self_attn
    seen: dict[str, Any] = {}
    handles = [
        attention.o_proj.register_forward_pre_hook(lambda _, args: seen.update(out=args[0])),
        attention.q_proj.register_forward_hook(lambda _, args, out: seen.update(q=out)),
    ]
    with torch.no_grad(), variant.reading(cache):
        feed(bench.source.model, ids[PREFIX : PREFIX + 1], cache, seen=PREFIX)
    for handle in handles:
        handle.remove()
    positions = torch.tensor([[PREFIX]])
    cos, sin = bench.source.model.model.rotary_emb(torch.zeros(1), positions)
    query = seen["q"].view(4, 8).double()
    half = torch.cat([-query[:, 4:], query[:, :4]], 1)
    query = query * cos[0].double() + half * sin[0].double()
    keys, values = (x[0].double() for x in (cache.layers[0].keys, cache.layers[0].values))
    assert pages_kept(0.5, 2) == 1
    outputs = []
    for head in range(4):
        k, v = keys[head // 2], values[head // 2]
        bounds = [
            sum(max(float(a * b), float(a * c)) for a, b, c in zip(
                query[head], k[p : p + PAGE].amin(0), k[p : p + PAGE].amax(0), strict=True))
            for p in (0, PAGE)
        ]  # fmt: skip
        first = PAGE * bounds.index(max(bounds))
        rows = [*range(first, first + PAGE), *range(2 * PAGE, PREFIX + 1)]
        outputs.append((k[rows] @ query[head] * 8**-0.5).softmax(0) @ v[rows])
    torch.testing.assert_close(
        # float32 attention against float64; measured 3e-7
        seen["out"].flatten().double(),
        torch.cat(outputs),
        atol=1e-5,
        rtol=1e-5,
    )


def test_share_of_bytes_read() -> None:
    # Per 16 tokens and head: 32 vectors of keys and values, and two bounds; half are read.
    assert read_share(0.5) == pytest.approx((2 + 16) / 34)


def test_every_method_says_what_it_leaves_out() -> None:
    names = [method.name for method in METHODS]
    assert len(set(names)) == len(names)
    for method in METHODS:
        assert method.differs.endswith(".") and len(method.differs) < 220, method.name
        assert Path(method.name).name == method.name


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_wanda_is_the_formula(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 8, generator=generator), torch.randn(50, 8, generator=generator)
    pruned = wanda(weight, (x.mT @ x).double() / 50, share)
    for row, kept in zip(weight, pruned, strict=True):
        scores = [abs(float(w)) * float(x[:, j].norm()) for j, w in enumerate(row)]
        order = sorted(range(8), key=lambda j: scores[j])
        gone = set(order[: int(8 * share)])
        assert kept.tolist() == [0.0 if j in gone else float(w) for j, w in enumerate(row)]


def test_gptq_is_optimal_brain_quantisation() -> None:
    """The same without the Cholesky factor: each column leaves the inverse Hessian by elimination.

    Source: Frantar et al., arXiv 2210.17323, equations 2 and 3.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 12, generator=generator).double()
    x = torch.randn(80, 12, generator=generator).double() @ torch.randn(
        12, 12, generator=generator).double()  # fmt: skip
    moment = x.mT @ x / 80
    left = weight.clone()
    inverse = torch.linalg.inv(moment + DAMP * moment.diagonal().mean() * torch.eye(12))
    low, high = weight.amin(1), weight.amax(1)
    step = (high - low) / 15
    for j in range(12):
        rounded = low + step * ((left[:, j] - low) / step).round().clamp(0, 15)
        change = (left[:, j] - rounded) / inverse[j, j]
        left -= change[:, None] * inverse[j] * (torch.arange(12) >= j)
        left[:, j] = rounded
        inverse = inverse - inverse[:, j : j + 1] @ inverse[j : j + 1] / inverse[j, j]
    got = gptq(weight, moment, 4)
    torch.testing.assert_close(got, left, atol=1e-9, rtol=0)
    plain = low[:, None] + step[:, None] * ((weight - low[:, None]) / step[:, None]).round()
    errors = [float(((w - weight) @ moment * (w - weight)).sum()) for w in (got, plain)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("name,dose,least,most", [("wanda", 0.5, 0.5, 0.7), ("gptq", 4, 0.1, 0.6)])
def test_weights_shrink_and_the_cache_stays(
    name: str, dose: float, least: float, most: float, bench: Bench, ids: Tensor
) -> None:
    variant = BY_NAME[name].build(bench, dose)
    assert nbytes(variant, ids) == nbytes(Variant(bench.source.model), ids)
    own = sum(p.nbytes for p in bench.source.model.parameters())
    assert variant.weight_bytes is not None and least < variant.weight_bytes / own < most
    linear = variant.model.model.layers[1].mlp.down_proj.weight
    if name == "wanda":
        assert ((linear == 0).sum(1) == linear.shape[1] // 2).all()
    else:
        assert max(len(set(row.tolist())) for row in linear) <= 16


def test_states_are_those_that_transformers_holds(bench: Bench) -> None:
    from transformers import MambaConfig, MambaForCausalLM, RwkvConfig, RwkvForCausalLM

    size, layers = bench.spec.hidden_size, len(bench.spec.layers)
    ids = torch.tensor([[1, 2, 3]])
    config = RwkvConfig(vocab_size=9, hidden_size=size, num_hidden_layers=layers)
    state = RwkvForCausalLM(config)(ids, use_cache=True).state
    assert sum(t.nbytes for t in state) == rwkv_bytes(bench.spec, 3, 4)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=9, hidden_size=size, num_hidden_layers=layers))
    cache = mamba(ids, use_cache=True).cache_params
    assert cache_nbytes(cache) == mamba_bytes(bench.spec, 3, 4)
    # 4 query heads of 8: a state of 8 x 8 and a normaliser of 8 each, float32.
    assert linear_bytes(bench.spec, 3, 2) == layers * 4 * (64 + 8) * 4
    # 2 K/V heads of 8, keys and values, 2 bytes: one cache, and two windows of the lower half.
    assert yoco_bytes(bench.spec, 5000, 2) == 64 * (5000 + 2 * 1024)
    assert yoco_bytes(bench.spec, 100, 2) == 64 * 3 * 100


def test_mixed_attention_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, near, far = (torch.randn(*shape, generator=generator)
                          for shape in ((4, 3, 8), (2, 3, 8), (2, 9, 8)))  # fmt: skip
    values = torch.randn(2, 12, 8, generator=generator)
    found = FeatureMap(torch.randn(4, 8, 8, generator=generator),
                       torch.randn(2, 8, 8, generator=generator),
                       torch.randn(4, 1, 1, generator=generator))  # fmt: skip
    scores = (queries @ near.repeat_interleave(2, 0).mT).masked_fill(
        torch.ones(3, 3, dtype=torch.bool).triu(1), -torch.inf
    )
    read, state = found.of_queries(queries), found.state(far, values[:, :9])
    got = mixed_attention(read, state, found.weight, scores, values[:, 9:])
    # A shift of all scores, and of what the state counts, changes nothing at any size.
    for shift in (-200.0, 200.0):
        moved = mixed_attention(read, state, found.weight + shift, scores + shift, values[:, 9:])
        torch.testing.assert_close(moved, got, atol=1e-4, rtol=1e-4)  # 200 in float32: 2^-17
    alone = mixed_attention(read, state, found.weight - 500, scores, values[:, 9:])
    exact = scores.softmax(-1) @ values[:, 9:].repeat_interleave(2, 0)
    torch.testing.assert_close(alone, exact)

    def phi(x: Tensor, matrix: Tensor) -> Tensor:
        x = (x @ matrix).double()
        return torch.cat([x.exp() / x.exp().sum(), (-x).exp() / (-x).exp().sum()])

    for head, step in [(0, 0), (3, 2), (1, 1)]:
        group, query = head // 2, queries[head, step]
        seen = [float(phi(query, found.query[head]) @ phi(key, found.key[group]))
                * float(found.weight[head].exp()) for key in far[group]]  # fmt: skip
        seen += [float((query.double() @ near[group, j].double()).exp()) for j in range(step + 1)]
        weights = torch.tensor(seen).double() / sum(seen)
        wanted = weights @ values[group, : 9 + step + 1].double()
        torch.testing.assert_close(got[head, step].double(), wanted, atol=1e-5, rtol=1e-5)


def test_a_feature_map_learns_to_imitate() -> None:
    generator = torch.Generator().manual_seed(0)
    sample = tuple(torch.randn(count, 32, 8, generator=generator) for count in (4, 2, 2))
    before = float(imitation(FeatureMap.new(4, 2, 8, torch.device("cpu")), sample, 8**-0.5))
    after = float(imitation(teach([sample], 8**-0.5, 0), sample, 8**-0.5))
    assert after < before / 2


def test_a_state_does_not_grow(bench: Bench, ids: Tensor) -> None:
    variant = BY_NAME["linear"].build(bench, 16)
    for length in (20, 40):
        prefix = read_prefix(variant.model, ids[:length], max_length=length)
        # 4 layers, 2 K/V heads, 16 features, 8 values and a sum, float32
        assert cache_nbytes(variant.compress(prefix)) == 4 * 2 * 16 * 9 * 4
    assert variant.trained_tokens > 0


def test_slicing_nothing_changes_nothing(bench: Bench, ids: Tensor) -> None:
    variant = BY_NAME["slicegpt"].build(bench, 0.0)
    whole = continuation_logits(bench.source.model, ids, PREFIX)
    # A rotation there and back in float32, logits below 30.
    torch.testing.assert_close(logits(variant, ids), whole, atol=1e-3, rtol=0)


def test_a_slice_stays_on_the_device(bench: Bench) -> None:
    model = copy.deepcopy(bench.source.model).to("meta")
    slice_model(model, torch.empty(bench.spec.hidden_size, 24, device="meta"), 0.0)
    assert {part.device.type for part in model.parameters()} == {"meta"}


def test_a_slice_is_its_formula(bench: Bench, ids: Tensor) -> None:
    """The residual stream of the sliced model, one layer in float64, and what it reads there."""
    model = BY_NAME["slicegpt"].build(bench, 0.25).model
    source = bench.source.model.model
    basis = torch.linalg.eigh(residual_moment(bench)).eigenvectors.flip(1)[:, :24]
    stream = source.embed_tokens.weight[ids].double() @ basis
    torch.testing.assert_close(
        model.model.embed_tokens.weight[ids].double(), stream, atol=1e-6, rtol=1e-5
    )
    # RMSNorm over the original width, its weight, the projection, all in the kept directions.
    layer = source.layers[0]
    unit = stream / (stream.square().sum(-1, keepdim=True) / 32).sqrt()
    wanted = unit @ basis.mT * layer.input_layernorm.weight.double()
    wanted = wanted @ layer.self_attn.q_proj.weight.double().mT
    sliced = model.model.layers[0]
    got = sliced.self_attn.q_proj(sliced.input_layernorm(stream.float()))
    torch.testing.assert_close(got.double(), wanted, atol=1e-3, rtol=1e-3)  # eps of the norm
    assert nbytes(Variant(model), ids) == nbytes(Variant(bench.source.model), ids)
    sizes = [sum(p.nbytes for p in m.parameters()) for m in (model, bench.source.model)]
    assert 0.7 < sizes[0] / sizes[1] < 0.8


def test_directions_are_those_of_the_stream(bench: Bench) -> None:
    total = 0
    model = bench.source.model
    seen: list[Tensor] = []
    handles = [
        norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()[0].double()))
        for layer in model.model.layers
        for norm in (layer.input_layernorm, layer.post_attention_layernorm)
    ]
    with torch.no_grad():
        for window in bench.calibration_ids:
            model(input_ids=window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    for x in seen:
        unit = x / x.square().mean(-1, keepdim=True).sqrt()
        total = total + unit.mT @ unit
    torch.testing.assert_close(residual_moment(bench), total, rtol=1e-4, atol=1e-2)
