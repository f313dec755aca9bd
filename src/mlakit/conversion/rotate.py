"""RoRoPE and FreqFold: gather what rotates into the few dimensions that keep their RoPE.

TransMLA (arXiv 2502.07864v3), section 4.2. For one frequency the real parts of the G key heads
form a vector, and so do the imaginary parts. Any rotation of these vectors, the same for both,
leaves all attention scores unchanged. RoRoPE turns them to their principal axes, keeps RoPE on
the first and drops it on the rest. FreqFold first joins ``fold`` neighbouring frequencies into
one vector, which is exact only in so far as neighbours turn alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rotation:
    """An orthogonal change of basis of all keys of a layer, split in two.

    Attributes:
        rope: ``[R, G d]``, rows of the components that keep their rotation: first the R/2 real
            parts, then the R/2 imaginary ones, in the order of their frequencies.
        nope: ``[G d - R, G d]``, rows of the components that lose it.
        frequencies: ``[R/2]``, the index of the source frequency that each component turns with.
    """

    rope: torch.Tensor
    nope: torch.Tensor
    frequencies: torch.Tensor


def hermitian_moment(key_moment: torch.Tensor, groups: int) -> torch.Tensor:
    """``E[kappa kappa^H]`` of the complex keys from ``E[k k^T]`` of the real ones.

    Args:
        key_moment: ``[G d, G d]``, head-major, each head's first half real, second imaginary.
        groups: G.

    Returns:
        ``[G d/2, G d/2]`` complex128, frequency-major: entry ``j * G + g``.
    """
    half = len(key_moment) // groups // 2
    blocks = key_moment.double().view(groups, 2, half, groups, 2, half)
    real = blocks[:, 0, :, :, 0] + blocks[:, 1, :, :, 1]
    imag = blocks[:, 1, :, :, 0] - blocks[:, 0, :, :, 1]
    moment = torch.complex(real, imag).permute(1, 0, 3, 2)  # [d/2, G, d/2, G]
    return moment.reshape(half * groups, half * groups)


def rorope(key_moment: torch.Tensor, groups: int, rope_dim: int, fold: int) -> Rotation:
    """The published rotation: real principal axes per group of ``fold`` frequencies.

    The published code adds 1 % of the mean diagonal before the eigendecomposition; that shifts
    eigenvalues, not eigenvectors, and is left out.

    Args:
        key_moment: ``E[k k^T]``, ``[G d, G d]`` float64.
        groups: G.
        rope_dim: R, a divisor of d; only every ``c = d/R``-th frequency is kept (collapse).
        fold: frequencies per group; a multiple of c and a divisor of d/2.
    """
    half = len(key_moment) // groups // 2
    collapse = 2 * half // rope_dim
    moment = hermitian_moment(key_moment, groups).real
    kept: list[torch.Tensor] = []
    dropped: list[torch.Tensor] = []
    for first in range(0, half, fold):
        members = slice(first * groups, (first + fold) * groups)
        axes = torch.linalg.eigh(moment[members, members]).eigenvectors.flip(1).mT
        rows = axes.new_zeros(len(axes), half * groups)
        rows[:, members] = axes
        kept.append(rows[: fold // collapse])
        dropped.append(rows[fold // collapse :])
    return Rotation(
        rope=_as_real(torch.cat(kept), groups),
        nope=_as_real(torch.cat(dropped), groups),
        frequencies=torch.arange(0, half, collapse, device=key_moment.device),
    )


def _as_real(rows: torch.Tensor, groups: int) -> torch.Tensor:
    """Real rows on complex keys (frequency-major) as rows on real keys (head-major, halves).

    Args:
        rows: ``[n, G d/2]``.
        groups: G.

    Returns:
        ``[2 n, G d]``: n rows that give the real parts, then n that give the imaginary ones.
    """
    per_head = rows.unflatten(1, (-1, groups)).transpose(1, 2)  # [n, G, d/2]
    nothing = torch.zeros_like(per_head)
    real, imaginary = torch.cat([per_head, nothing], 2), torch.cat([nothing, per_head], 2)
    return torch.cat([real, imaginary]).flatten(1)
