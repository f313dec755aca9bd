"""The factorisations in float64: what is exact is exact, and ranks are what Theorem 1 says."""

from __future__ import annotations

import itertools

import pytest
import torch

from mlakit.conversion.factor import (
    AttentionWeights,
    article,
    compress,
    equal_cache,
    identity_norm_exponent,
    joint_low_rank,
    latent_bound,
)
from mlakit.conversion.rotate import rorope
from mlakit.spec import AttentionSpec
from test_rotate import frequencies, rotate

# Exact identities: float64 rounding on numbers of order one to a hundred.
EXACT = 1e-10
HEADS, DIM, HIDDEN, LENGTH = 6, 8, 96, 20


def spec(groups: int) -> AttentionSpec:
    return AttentionSpec(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=groups,
        head_dim=DIM,
        softmax_scale=DIM**-0.5,
        q_bias=True,
        kv_bias=True,
    )


def random_weights(groups: int, hidden: int = HIDDEN) -> AttentionWeights:
    generator = torch.Generator().manual_seed(groups)

    def projection(heads: int) -> torch.Tensor:
        weight = torch.randn(heads, DIM, hidden + 1, dtype=torch.float64, generator=generator)
        return weight / hidden**0.5

    norm = torch.rand(hidden, dtype=torch.float64, generator=generator) + 0.5
    output = torch.randn(hidden, HEADS * DIM + 1, dtype=torch.float64, generator=generator)
    heads = projection(HEADS), projection(groups), projection(groups)
    return AttentionWeights(*heads, output / (HEADS * DIM) ** 0.5, norm)


@pytest.fixture(params=[1, 2, 3, 6], ids=lambda groups: f"{groups}kv")
def weights(request: pytest.FixtureRequest) -> AttentionWeights:
    return random_weights(request.param)


@pytest.fixture
def inputs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(LENGTH, HIDDEN, dtype=torch.float64, generator=generator)
    return torch.cat([x, torch.ones(LENGTH, 1, dtype=torch.float64)], 1)


def joined(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return torch.cat([tensors[f"{name}.weight"], tensors[f"{name}.bias"][:, None]], 1)


def source_scores(weights: AttentionWeights, x: torch.Tensor) -> torch.Tensor:
    query = rotate(x @ weights.q.mT, frequencies(DIM))
    key = rotate(x @ weights.k.mT, frequencies(DIM))
    return query @ key[weights.group_of_head].mT


def test_equal_cache_scores_and_values(weights: AttentionWeights, inputs: torch.Tensor) -> None:
    groups = len(weights.k)
    tensors = equal_cache(weights, spec(groups))
    latent = inputs @ joined(tensors, "kv_a_proj_with_mqa").mT
    assert latent.shape[1] == 2 * groups * DIM  # the bytes of the source's own cache
    values, keys = latent.chunk(2, 1)
    repeated = frequencies(DIM).repeat(groups)
    query = torch.einsum("hrd,htd->htr", tensors["q_up_proj.weight"], inputs @ weights.q.mT)
    scores = rotate(query, repeated) @ rotate(keys, repeated).mT
    torch.testing.assert_close(scores, source_scores(weights, inputs), rtol=0, atol=EXACT)
    up = tensors["kv_b_proj.weight"].view(HEADS, DIM, -1)
    expected = (inputs @ weights.v.mT)[weights.group_of_head]
    torch.testing.assert_close(values @ up.mT, expected, rtol=0, atol=EXACT)


def test_equal_cache_up_projections_are_orthogonal(weights: AttentionWeights) -> None:
    tensors = equal_cache(weights, spec(len(weights.k)))
    eye = torch.eye(DIM, dtype=torch.float64)
    for up in (tensors["q_up_proj.weight"].mT, tensors["kv_b_proj.weight"].view(HEADS, DIM, -1)):
        torch.testing.assert_close(up @ up.mT, eye.expand(HEADS, -1, -1), rtol=0, atol=EXACT)


def test_article_form_is_the_svd_of_the_replicated_projection(
    weights: AttentionWeights, inputs: torch.Tensor
) -> None:
    groups = len(weights.k)
    tensors = article(weights, spec(groups))
    down_v, down_k = joined(tensors, "kv_a_proj_with_mqa").chunk(2)
    for up, down, own in (
        (tensors["k_b_proj.weight"], down_k, weights.k),
        (tensors["v_b_proj.weight"], down_v, weights.v),
    ):
        replicated = own[weights.group_of_head].flatten(0, 1)
        sizes = torch.linalg.svdvals(replicated)
        assert int((sizes > 1e-9 * sizes[0]).sum()) == groups * DIM  # Theorem 1: rank G d
        torch.testing.assert_close(up @ down, replicated, rtol=0, atol=1e-13)
        kept = torch.diag(sizes[: groups * DIM])  # both halves carry sqrt(S)
        torch.testing.assert_close(up.mT @ up, kept, rtol=0, atol=EXACT)
        torch.testing.assert_close(down @ down.mT, kept, rtol=0, atol=EXACT)


def test_article_form_of_a_projection_wider_than_its_input() -> None:
    weights = random_weights(6, hidden=16)  # G d = 48 key dimensions from 17 numbers
    tensors = article(weights, spec(6))
    down = joined(tensors, "kv_a_proj_with_mqa")[48:]
    assert down.shape == (48, 17)
    torch.testing.assert_close(
        tensors["k_b_proj.weight"] @ down,
        weights.k[weights.group_of_head].flatten(0, 1),
        rtol=0,
        atol=1e-13,
    )


def test_trained_up_projections_leave_what_a_group_can_express() -> None:
    """Two heads of a group share d latent directions; free up-projections can use 2 d."""
    weights = random_weights(3)
    tensors = equal_cache(weights, spec(3))
    up = tensors["q_up_proj.weight"]
    assert torch.linalg.matrix_rank(torch.cat([up[0], up[1]], 1)) == DIM
    trained = up + 1e-3 * torch.randn_like(up)
    assert torch.linalg.matrix_rank(torch.cat([trained[0], trained[1]], 1)) == 2 * DIM


def compressed_scores(
    tensors: dict[str, torch.Tensor], rank: int, rope_dim: int, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and per-head values of the DeepSeek-shaped layer, expanded."""
    query = (x @ joined(tensors, "q_proj").mT).view(len(x), HEADS, -1).transpose(0, 1)
    latent, rope = (x @ joined(tensors, "kv_a_proj_with_mqa").mT).split([rank, rope_dim], 1)
    up = (latent @ tensors["kv_b_proj.weight"].mT).view(len(x), HEADS, -1).transpose(0, 1)
    kept = frequencies(DIM)[:: DIM // rope_dim]
    scores = query[..., :DIM] @ up[..., :DIM].mT
    scores = scores + rotate(query[..., DIM:], kept) @ rotate(rope, kept).mT
    return scores, up[..., DIM:]


def partial_rope_scores(
    weights: AttentionWeights, rotation: object, x: torch.Tensor
) -> torch.Tensor:
    """Scores with RoPE kept on the rotation's first rows only, from the definition."""
    groups = len(weights.k)
    keys = x @ weights.keys.mT
    embedded = torch.zeros(HEADS, len(x), groups, DIM, dtype=torch.float64)
    for head, group in enumerate(weights.group_of_head.tolist()):
        embedded[head, :, group] = x @ weights.q[head].mT
    embedded = embedded.flatten(2)
    kept = frequencies(DIM)[rotation.frequencies]
    rope = rotate(embedded @ rotation.rope.mT, kept) @ rotate(keys @ rotation.rope.mT, kept).mT
    return rope + (embedded @ rotation.nope.mT) @ (keys @ rotation.nope.mT).mT


@pytest.mark.parametrize("rope_dim,fold", [(8, 1), (8, 4), (4, 2), (2, 4)])
def test_full_rank_is_exactly_partial_rope(
    weights: AttentionWeights, inputs: torch.Tensor, rope_dim: int, fold: int
) -> None:
    groups = len(weights.k)
    moment = inputs.mT @ inputs / LENGTH
    rotation = rorope(weights.keys @ moment @ weights.keys.mT, groups, rope_dim, fold)
    rank = 2 * groups * DIM - rope_dim
    low_rank = joint_low_rank(weights, rotation, moment, rank)
    assert low_rank.kept == pytest.approx(1, abs=1e-12)
    tensors = compress(weights, spec(groups), rotation, low_rank)
    scores, values = compressed_scores(tensors, rank, rope_dim, inputs)
    expected = partial_rope_scores(weights, rotation, inputs)
    torch.testing.assert_close(scores, expected, rtol=0, atol=EXACT)
    source = (inputs @ weights.v.mT)[weights.group_of_head]
    torch.testing.assert_close(values, source, rtol=0, atol=EXACT)
    if groups == 1 and rope_dim == DIM and fold == 1:
        whole = source_scores(weights, inputs)
        torch.testing.assert_close(scores, whole, rtol=0, atol=EXACT)


def test_error_falls_with_rank_and_kept_energy_grows() -> None:
    weights = random_weights(3)
    moment = torch.eye(HIDDEN + 1, dtype=torch.float64)
    rotation = rorope(weights.keys @ moment @ weights.keys.mT, 3, 8, 1)
    unrotated = rotation.nope.mT @ rotation.nope @ weights.keys
    expected = torch.cat([unrotated, weights.values])
    errors, kept = [], []
    for rank in range(1, 2 * 3 * DIM - 8 + 1, 5):
        low = joint_low_rank(weights, rotation, moment, rank)
        error = torch.cat([low.key_up, low.value_up]) @ low.down - expected
        errors.append(float(torch.einsum("ij,jk,ik->", error, moment, error)))
        kept.append(low.kept)
    # with the balance ratio near one on random weights, the plain error falls as well
    assert all(a > b for a, b in itertools.pairwise(errors))
    assert all(a < b for a, b in itertools.pairwise(kept))


def test_latent_bound_holds_and_the_norm_is_the_identity() -> None:
    weights = random_weights(3)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(500, HIDDEN, dtype=torch.float64, generator=generator) * 100
    norm = torch.rand(HIDDEN, dtype=torch.float64, generator=generator)
    normed = hidden / hidden.square().mean(-1, keepdim=True).sqrt() * norm
    latent = normed @ weights.keys[:, :-1].mT + weights.keys[:, -1]
    bound = latent_bound(weights.keys, norm)
    assert float(latent.square().mean(-1).max()) <= bound
    exponent = identity_norm_exponent(bound)
    assert 4.0**exponent >= 2.0**24 * bound > 4.0 ** (exponent - 1)
    x = latent.float()
    normalised = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 4.0**exponent)
    assert torch.equal(normalised * 2.0**exponent, x)
