"""RoRoPE and FreqFold: invariances in float64."""

from __future__ import annotations

import pytest
import torch

from mlakit.conversion.rotate import hermitian_moment, rorope

# The identities are exact; float64 rounding over sums of at most 64 terms of order one.
EXACT = 1e-10


def rotate(x: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """RoPE at positions 0..T-1 on ``[..., T, 2 F]``, halves layout."""
    angles = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    real, imag = x.chunk(2, -1)
    return torch.cat([real * cos - imag * sin, imag * cos + real * sin], -1)


def frequencies(dim: int, base: float = 100.0) -> torch.Tensor:
    return base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


@pytest.fixture
def keys() -> torch.Tensor:
    torch.manual_seed(0)
    mixing = torch.randn(24, 24, dtype=torch.float64)
    return torch.randn(40, 24, dtype=torch.float64) @ mixing  # T, G d with G = 3, d = 8


def test_hermitian_moment_is_that_of_complex_keys(keys: torch.Tensor) -> None:
    real = keys.view(-1, 3, 2, 4)
    kappa = torch.complex(real[:, :, 0], real[:, :, 1]).transpose(1, 2).reshape(-1, 12)
    expected = torch.einsum("ta,tb->ab", kappa, kappa.conj())
    torch.testing.assert_close(hermitian_moment(keys.mT @ keys, 3), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rope_dim,fold", [(8, 1), (8, 2), (8, 4), (4, 2), (4, 4), (2, 4)])
def test_rotation_is_orthogonal_and_names_its_frequencies(
    keys: torch.Tensor, rope_dim: int, fold: int
) -> None:
    rotation = rorope(keys.mT @ keys, 3, rope_dim, fold)
    whole = torch.cat([rotation.rope, rotation.nope])
    assert rotation.rope.shape == (rope_dim, 24)
    torch.testing.assert_close(
        whole @ whole.mT, torch.eye(24, dtype=torch.float64), rtol=0, atol=EXACT
    )
    torch.testing.assert_close(frequencies(8)[rotation.frequencies], frequencies(rope_dim))


def test_scores_survive_the_rotation_at_fold_one(keys: torch.Tensor) -> None:
    """With RoPE kept on every component, each at its own frequency, nothing changes."""
    torch.manual_seed(1)
    rotation = rorope(keys.mT @ keys, 3, 8, 1)
    query = torch.randn(40, 8, dtype=torch.float64)
    embedded = torch.zeros(40, 24, dtype=torch.float64)
    embedded[:, 8:16] = query
    per_key_head = keys.view(40, 3, 8).transpose(0, 1)
    expected = rotate(query, frequencies(8)) @ rotate(per_key_head[1], frequencies(8)).mT
    rope = (
        rotate(embedded @ rotation.rope.mT, frequencies(8))
        @ rotate(keys @ rotation.rope.mT, frequencies(8)).mT
    )
    # nope rows come in groups of one frequency: G - 1 = 2 components, real and imaginary parts
    own = frequencies(8).repeat_interleave(2)
    nope = rotate(embedded @ rotation.nope.mT, own) @ rotate(keys @ rotation.nope.mT, own).mT
    torch.testing.assert_close(rope + nope, expected, rtol=0, atol=EXACT)


def test_first_components_carry_the_most_energy(keys: torch.Tensor) -> None:
    moment = keys.mT @ keys
    rotation = rorope(moment, 3, 8, 1)

    def energy(rows: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ij,jk,ik->i", rows, moment, rows).view(2, -1).sum(0)

    kept, dropped = energy(rotation.rope), energy(rotation.nope).view(4, 2)
    assert (kept[:, None] >= dropped).all()


def test_one_key_head_needs_no_rotation() -> None:
    torch.manual_seed(2)
    keys = torch.randn(30, 8, dtype=torch.float64)
    rotation = rorope(keys.mT @ keys, 1, 8, 1)
    assert rotation.nope.shape == (0, 8)
    torch.testing.assert_close(rotation.rope.abs(), torch.eye(8, dtype=torch.float64))
