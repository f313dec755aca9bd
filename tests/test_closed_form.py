"""The closed form in float64: what is exact is exact, and the metric is the error it stands for."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlakit.conversion import closed_form, observe
from mlakit.conversion.calibrate import attend
from mlakit.conversion.closed_form import Rope
from mlakit.conversion.factor import AttentionWeights, LowRank
from mlakit.conversion.observe import Observer, Statistics, felt_output
from mlakit.conversion.rotate import hermitian_moment, keep_rope, rorope
from mlakit.spec import AttentionSpec, RopeSpec

HIDDEN, HEADS, DIM, LENGTH = 10, 6, 4, 9
# Identities of sums of at most a hundred terms of order one in float64.
EXACT = 1e-10
FREQUENCIES = torch.tensor([1.0, 0.2], dtype=torch.float64)


def spec_of(groups: int) -> AttentionSpec:
    return AttentionSpec(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=groups,
        head_dim=DIM,
        softmax_scale=DIM**-0.5,
        rope=RopeSpec(theta=25.0, dim=DIM),
        q_bias=True,
        kv_bias=True,
    )


def random_weights(groups: int, seed: int = 0) -> AttentionWeights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator) / shape[-1] ** 0.5

    return AttentionWeights(
        q=draw(HEADS, DIM, HIDDEN + 1),
        k=draw(groups, DIM, HIDDEN + 1),
        v=draw(groups, DIM, HIDDEN + 1),
        o=draw(HIDDEN, HEADS * DIM + 1),
    )


def random_inputs(windows: int = 3, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(windows, LENGTH, HIDDEN, dtype=torch.float64, generator=generator) * 2


def turn(x: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """RoPE at positions 0..T-1 on ``[..., T, 2 F]``, halves layout."""
    angles = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * frequencies
    turned = torch.complex(*x.chunk(2, -1)) * torch.exp(1j * angles)
    return torch.cat([turned.real, turned.imag], -1)


def causal_softmax(scores: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return scores.masked_fill(~mask, float("-inf")).softmax(-1)


def with_one(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)


def source_parts(
    weights: AttentionWeights, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, values ``[.., H, T, d]`` and output of the source, in the plainest way."""
    query, key, value = (
        torch.einsum("...tx,hdx->...htd", with_one(x), part)
        for part in (weights.q, weights.k, weights.v)
    )
    group = weights.group_of_head
    scores = turn(query, FREQUENCIES) @ turn(key, FREQUENCIES)[..., group, :, :].mT * DIM**-0.5
    return scores, value[..., group, :, :], output_of(weights, scores, value[..., group, :, :])


def output_of(
    weights: AttentionWeights, scores: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    heads = (causal_softmax(scores) @ values).transpose(-2, -3).flatten(-2)
    return heads @ weights.o[:, :-1].mT + weights.o[:, -1]


def latent_parts(
    tensors: dict[str, torch.Tensor], frequencies: torch.Tensor, rank: int, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and values of DeepSeek-shaped tensors, from their definition."""
    rope_dim = 2 * len(frequencies)

    def linear(name: str) -> torch.Tensor:
        return x @ tensors[f"{name}.weight"].mT + tensors[f"{name}.bias"]

    query = linear("q_proj").unflatten(-1, (HEADS, -1)).transpose(-2, -3)
    latent, rope_key = linear("kv_a_proj_with_mqa").split([rank, rope_dim], -1)
    heads = (latent @ tensors["kv_b_proj.weight"].mT).unflatten(-1, (HEADS, -1)).transpose(-2, -3)
    key, value = heads.split([DIM, DIM], -1)
    nope, rope = query.split([DIM, rope_dim], -1)
    scores = (
        nope @ key.mT + turn(rope, frequencies) @ turn(rope_key, frequencies)[..., None, :, :].mT
    )
    return scores * DIM**-0.5, value


def observed(weights: AttentionWeights, x: torch.Tensor, weigh: bool = True) -> Statistics:
    """The statistics of these inputs, as an Observer takes them."""
    groups = len(weights.k)
    felt, spec = felt_output(weights, None), spec_of(groups)
    observer = Observer(weights, spec, FREQUENCIES, 1.0, len(x), felt, weigh=weigh)
    observer.projections = [weights.q, weights.k, weights.v]  # no rounding to float32
    output = weights.o[:, :-1].unflatten(1, (HEADS, -1))
    observer.gram = torch.einsum("xhv,xhu->hvu", output, output)
    observer._add(x, source_parts(weights, x)[2], [None] * len(x))
    return observer.statistics()


def rope_of(
    weights: AttentionWeights, statistics: Statistics, rope_dim: int, **options: object
) -> Rope:
    settings = {"schedule": None, "shrinkage": 0.0, "unitary": True, "sensitive": True, **options}
    return closed_form.choose_rope(weights, statistics, FREQUENCIES, 1.0, rope_dim, **settings)


@settings(max_examples=25, deadline=None)
@given(
    groups=st.sampled_from([1, 2, 3, 6]),
    unitary=st.booleans(),
    sensitive=st.booleans(),
    shrinkage=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_every_component_kept_changes_no_score(
    groups: int, unitary: bool, sensitive: bool, shrinkage: float, seed: int
) -> None:
    """R = G d: any weighting, real or complex, leaves nothing unrotated."""
    weights, x = random_weights(groups, seed), random_inputs(seed=seed)
    options = {"unitary": unitary, "sensitive": sensitive, "shrinkage": shrinkage}
    rope = rope_of(weights, observed(weights, x), groups * DIM, **options)
    keys = closed_form.unrotated_keys(weights, rope.kept)
    assert float(keys.abs().max()) < EXACT
    low_rank = closed_form.whole(keys, weights.values)
    tensors = closed_form.latent_tensors(weights, spec_of(groups), rope, low_rank)
    rank = len(low_rank.down)
    scores, values = latent_parts(tensors, rope.kept.frequencies, rank, x)
    expected, value, _ = source_parts(weights, x)
    torch.testing.assert_close(scores, expected, rtol=0, atol=EXACT)
    torch.testing.assert_close(values, value, rtol=0, atol=EXACT)


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("rope_dim", [2, 4])
def test_full_rank_is_the_partial_rope_model(groups: int, rope_dim: int) -> None:
    """No rank cut: the metric, the means and the offset cancel out of every output."""
    weights, x = random_weights(groups), random_inputs()
    seen, spec = observed(weights, x), spec_of(groups)
    rope = rope_of(weights, seen, rope_dim, shrinkage=0.7)
    keys = closed_form.unrotated_keys(weights, rope.kept)
    metric = (
        closed_form.key_metric(seen, spec, rope.dropped),
        closed_form.value_metric(seen, spec, weights, felt_output(weights, None)),
    )
    rank = 2 * groups * DIM - rope_dim
    axes = closed_form.output_axes(weights, seen, rope.kept, metric, centred=True)
    cut = axes.cut(keys, weights.values, rank, bias=True)
    assert cut.kept == pytest.approx(1, abs=1e-12)
    outputs = []
    for low_rank in (closed_form.whole(keys, weights.values), cut):
        tensors = closed_form.latent_tensors(weights, spec, rope, low_rank)
        size = len(low_rank.down)
        scores, values = latent_parts(tensors, rope.kept.frequencies, size, x)
        bias = tensors.get("o_proj.bias", weights.o[:, -1])
        outputs.append(output_of(weights, scores, values) - weights.o[:, -1] + bias)
    # B^-1/2 divides by as little as sqrt(FLOOR), so rounding grows to 1e-16 / 3e-5
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-9)


def test_means_are_free() -> None:
    """A constant on all keys changes no attention; one on the values is the bias of the output."""
    weights, x = random_weights(2), random_inputs()
    scores, values, expected = source_parts(weights, x)
    shift = torch.randn(2 * DIM, dtype=torch.float64)
    low_rank = closed_form.whole(weights.keys * 0, weights.values)
    moved = LowRank(low_rank.down, low_rank.key_up, low_rank.value_up, 1.0, shift)
    rope = rope_of(weights, observed(weights, x), 2 * DIM)
    tensors = closed_form.latent_tensors(weights, spec_of(2), rope, moved)
    constant = shift.unflatten(0, (2, DIM))[weights.group_of_head][:, None]
    query = torch.randn(3, HEADS, LENGTH, 1, dtype=torch.float64)
    shifted = output_of(weights, scores + query, values + constant)
    torch.testing.assert_close(
        shifted, expected - weights.o[:, -1] + tensors["o_proj.bias"], rtol=0, atol=EXACT
    )


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_the_metric_is_the_measured_error_to_first_order(groups: int) -> None:
    """Independent small errors on every token's keys and values, averaged over many draws."""
    weights, x = random_weights(groups), random_inputs(2)
    seen, spec = observed(weights, x), spec_of(groups)
    still = torch.ones(HEADS, DIM // 2, dtype=torch.complex128)
    key_metric = closed_form.key_metric(seen, spec, still)
    value_metric = closed_form.value_metric(seen, spec, weights, felt_output(weights, None))
    scores, values, exact = source_parts(weights, x)
    generator = torch.Generator().manual_seed(2)
    query = torch.einsum("btx,hdx->bhtd", with_one(x), weights.q)
    size, draws = 1e-4, 3000
    noise = torch.randn(draws, 2, 2, LENGTH, groups, DIM, dtype=torch.float64, generator=generator)
    group = weights.group_of_head
    change = size * noise[..., group, :].transpose(-2, -3)  # [draws, 2, b, H, T, d]
    keys = output_of(weights, scores + query @ change[:, 0].mT * DIM**-0.5, values)
    measured = (keys - exact).square().sum(-1).mean()
    expected = size**2 * key_metric.diagonal(0, 1, 2).sum()
    # 3000 draws of about a hundred squares each: a standard error of half a per cent at most
    assert float(measured / expected) == pytest.approx(1, abs=0.03)
    moved = output_of(weights, scores, values + change[:, 1])
    measured = (moved - exact).square().sum(-1).mean()
    expected = size**2 * value_metric.trace()
    assert float(measured / expected) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("scores", [1, 120, 220])  # one query at a time, two, four
def test_statistics_do_not_depend_on_the_pieces(
    monkeypatch: pytest.MonkeyPatch, scores: int
) -> None:
    weights, x = random_weights(2), random_inputs(windows=2)
    whole = observed(weights, x)
    monkeypatch.setattr(observe, "SCORES", scores)
    pieces = observed(weights, x)
    for field in fields(Statistics):
        found, expected = (torch.as_tensor(getattr(part, field.name)) for part in (pieces, whole))
        # the same float64 sums in another order (measured: 1.6e-16)
        assert (found - expected).norm() <= 1e-14 * expected.norm(), field.name


def test_capped_attention_does_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(spec_of(4), logit_softcap=5.0)
    query, key, value = (torch.randn(2, 4, 9, 6, dtype=torch.float64) for _ in range(3))
    visible = torch.ones(9, 9, dtype=torch.bool).tril().triu(-3)
    for mask in (None, visible):
        whole = attend(query, key, value, mask, spec)
        monkeypatch.setattr(observe, "SCORES", 50)
        pieces = attend(query, key, value, mask, spec)
        # float64 sums in another order (measured: 1.1e-15 in 50 draws)
        torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-14)
        monkeypatch.undo()


def test_statistics_are_those_of_the_definition() -> None:
    weights, x = random_weights(2), random_inputs()  # its angles are float32
    seen = observed(weights, x)
    scores, _, output = source_parts(weights, x)
    attention = causal_softmax(scores)
    tokens = attention.square().sum((1, 2))
    flat, mean = with_one(x).flatten(0, 1), torch.full((3 * LENGTH,), 1 / (3 * LENGTH)).double()
    share = tokens.flatten() / tokens.sum()
    torch.testing.assert_close(seen.centre, share @ flat, rtol=0, atol=1e-5)
    assert seen.energy == pytest.approx(float(x.square().mean()))
    one = torch.zeros(1, flat.shape[1], dtype=torch.float64).index_fill(1, torch.tensor(-1), 1.0)
    rows = flat @ torch.cat([weights.keys, weights.values, one]).mT
    torch.testing.assert_close(seen.cached, (rows * share[:, None]).mT @ rows, rtol=0, atol=1e-5)
    alike = observed(weights, x, weigh=False)
    torch.testing.assert_close(alike.cached, (rows * mean[:, None]).mT @ rows, rtol=0, atol=1e-5)
    real, imaginary = (flat @ weights.keys.mT).unflatten(1, (2, 2, DIM // 2)).unbind(2)
    kappa = torch.complex(real, imaginary)
    moment = torch.einsum("tgj,thj->jgh", kappa, kappa.conj()) / len(flat)
    torch.testing.assert_close(seen.keys, moment, rtol=0, atol=EXACT)
    overlap = torch.einsum("bhmn,bgmn->hg", attention, attention) / (3 * LENGTH)
    torch.testing.assert_close(seen.overlap, overlap, rtol=0, atol=1e-5)
    gap = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    wave = torch.exp(1j * 0.3 * gap.double())
    phase = (attention * wave).sum((0, 2, 3)) / (3 * LENGTH)
    found = seen.phase(torch.tensor([0.3], dtype=torch.float64))[:, 0]
    torch.testing.assert_close(found, phase, rtol=0, atol=1e-5)
    turns, others = torch.rand(3, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    apart = seen.phase((turns[:, None] - others).flatten()).unflatten(1, (3, 2))
    # float64 sums of nine terms of size one, and their angles (measured: 2e-16)
    torch.testing.assert_close(seen.phase_between(turns, others), apart, rtol=0, atol=1e-13)
    spread = output.flatten(0, 1)
    assert seen.output == pytest.approx(float((spread - spread.mean(0)).square().sum(1).mean()))


@settings(max_examples=25, deadline=None)
@given(groups=st.integers(2, 5), seed=st.integers(0, 999))
def test_unitary_axes_keep_at_least_what_real_ones_keep(groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(30, groups * DIM, dtype=torch.float64, generator=generator)
    moment = keys.mT @ keys
    whole = hermitian_moment(moment, groups).unflatten(0, (2, groups)).unflatten(2, (2, groups))
    blocks = whole.diagonal(0, 0, 2).permute(2, 0, 1)
    damage = torch.ones(2, groups, dtype=torch.float64)
    kept = [keep_rope(blocks, damage, FREQUENCIES, 2, unitary=unitary) for unitary in (True, False)]
    energy = [
        float(torch.einsum("mg,mgk,mk->", k.mix, blocks[k.source], k.mix.conj()).real) for k in kept
    ]
    assert energy[0] >= energy[1] * (1 - 1e-12)
    rope = rorope(moment, groups, DIM, 1).rope
    published = float(torch.einsum("ij,jk,ik->", rope, moment, rope))
    stock = keep_rope(
        blocks, damage, FREQUENCIES, 2, slots=FREQUENCIES, avoided=torch.eye(2).double()
    )
    assert sorted(stock.source.tolist()) == [0, 1]
    top = float(torch.einsum("mg,mgk,mk->", stock.mix, blocks[stock.source], stock.mix.conj()).real)
    assert top >= published * (1 - 1e-12)


def test_one_phase_apart_is_one_component() -> None:
    """Two heads with the same keys up to a phase: one complex component carries both."""
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(50, 2, dtype=torch.complex128, generator=generator)
    kappa = torch.stack([first, first * torch.exp(torch.tensor(1.1j))], 1)
    keys = torch.cat([kappa.real, kappa.imag], 2).flatten(1)
    moment = hermitian_moment(keys.mT @ keys, 2).unflatten(0, (2, 2)).unflatten(2, (2, 2))
    blocks = moment.diagonal(0, 0, 2).permute(2, 0, 1)
    damage = torch.ones(2, 2, dtype=torch.float64)
    kept = keep_rope(blocks, damage, FREQUENCIES, 2)
    rest = torch.einsum("jgk,nkj->ngj", kept.remainder(2), kappa)
    assert float(rest.abs().max()) < EXACT


def test_mean_phase_is_the_best_constant() -> None:
    mean = torch.tensor([0.3 + 0.4j, 0.9 - 0.1j])
    best = closed_form.phase_error(mean, mean)
    torch.testing.assert_close(best, 1 - mean.abs().square())
    for shrinkage in (0.0, 0.5):
        other = closed_form.phase_factor(mean, shrinkage)
        assert (closed_form.phase_error(mean, other) >= best).all()
