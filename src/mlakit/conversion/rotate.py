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


@dataclass(frozen=True)
class KeptRope:
    """The complex key components that keep a rotation, and how queries of each head read them.

    Component m is ``sum_g mix[m, g] kappa[g, source[m]]``; the keys it stands for are
    ``spread[m, g]`` times it.

    Attributes:
        source: ``[R/2]``, index of the source frequency that component m is made of.
        mix: ``[R/2, G]`` complex128.
        spread: ``[R/2, G]`` complex128.
        frequencies: ``[R/2]`` float64, what each component turns with.
    """

    source: torch.Tensor
    mix: torch.Tensor
    spread: torch.Tensor
    frequencies: torch.Tensor

    def remainder(self, half: int) -> torch.Tensor:
        """``[d/2, G, G]``: per frequency, what of the keys the kept components do not carry."""
        groups = self.mix.shape[1]
        rest = torch.eye(groups, dtype=self.mix.dtype, device=self.mix.device).repeat(half, 1, 1)
        carried = self.spread[:, :, None] * self.mix[:, None]
        return rest.index_add(0, self.source, -carried)


def keep_rope(
    moment: torch.Tensor,
    damage: torch.Tensor,
    frequencies: torch.Tensor,
    count: int,
    *,
    slots: torch.Tensor | None = None,
    avoided: torch.Tensor | None = None,
    unitary: bool = True,
) -> KeptRope:
    """Chooses the key components that keep a rotation, and the frequency each turns with.

    RoPE multiplies ``kappa[g, j]`` by a phase that depends on j alone, so any invertible complex
    mixing of the G heads of one frequency commutes with it; TransMLA's (real, the same for both
    parts) is a special case. Principal axes of ``E[kappa kappa^H]``, each head weighted by what
    losing its rotation would do, put the most into the fewest components.

    Args:
        moment: ``E[kappa kappa^H]`` per frequency, ``[d/2, G, G]`` complex128.
        damage: ``[d/2, G]``: error per unit of ``|kappa|^2`` where the rotation is dropped.
        frequencies: ``[d/2]``, the source's.
        count: R/2.
        slots: ``[R/2]``, frequencies to give away once each; each component's own if None.
        avoided: ``[d/2, R/2]``, share of the damage that turning with a slot avoids.
        unitary: False for real mixing, as published.
    """
    groups = damage.shape[1]
    highest = float(damage.max())
    scale = damage.clamp_min(1e-8 * highest).sqrt() if highest > 0 else torch.ones_like(damage)
    weighted = scale[:, :, None] * moment * scale[:, None]
    if not unitary:
        weighted = weighted.real.to(moment)
    energy, axes = torch.linalg.eigh(weighted)
    energy, axes = energy.flatten(), axes.mT.flatten(0, 1)  # [d/2 G], [d/2 G, G]
    if slots is None or avoided is None:
        still = (frequencies == 0).repeat_interleave(groups)  # only when nothing else is left
        energy = energy - still * (1 + energy.max())
        chosen = energy.argsort(descending=True, stable=True)[:count].sort().values
        turns = frequencies[chosen // groups]
    else:
        chosen = _assign(energy[:, None] * avoided.repeat_interleave(groups, 0))
        turns = slots
    source = chosen // groups
    return KeptRope(
        source, axes[chosen].conj() * scale[source], axes[chosen] / scale[source], turns
    )


def _assign(score: torch.Tensor) -> torch.Tensor:
    """For each column a row of its own, greedily by the highest score."""
    score, chosen = score.clone(), torch.zeros(score.shape[1], dtype=torch.long)
    for _ in range(len(chosen)):
        row, column = divmod(int(score.argmax()), len(chosen))
        chosen[column] = row
        score[row], score[:, column] = -torch.inf, -torch.inf
    return chosen.to(score.device)
