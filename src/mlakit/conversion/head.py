"""What comes after the last layer, a slice of the vocabulary at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from mlakit.conversion.amounts import LOGITS
from mlakit.conversion.stream import LayerReader


class Head:
    """The final norm, the output matrix and what a family does to its logits.

    Args:
        reader: the source.
    """

    def __init__(self, reader: LayerReader) -> None:
        self.reader = reader
        self.norm, self.output = reader.head()
        self.norm.requires_grad_(False)
        self.config = {**reader.family.defaults, **reader.spec.config}

    def score_gradient(self, hidden: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Gradient of ``log p(y)`` of each token's next token y, drawn from the model itself.

        Args:
            hidden: what the last layer gives, ``[..., D]`` float32.
            draws: ``[...]``, uniform in [0, 1): y is the first token whose cumulated probability
                is above it.

        Returns:
            With respect to ``hidden``, ``[..., D]``.
        """
        hidden = hidden.to(self.reader.device).detach().requires_grad_(True)
        with torch.enable_grad():
            states = self.norm(hidden)
        states, normed = states.detach(), states
        whole = self._normaliser(states)
        gradient, below = torch.zeros_like(states), torch.zeros_like(whole)
        draws = draws.to(whole)
        for rows, logits, slope in self._slices(states):
            share = (logits - whole[..., None]).exp()
            reached = below[..., None] + share.cumsum(-1)
            before = torch.cat([below[..., None], reached[..., :-1]], -1)
            drawn = (before <= draws[..., None]) & (draws[..., None] < reached)
            gradient += ((drawn.to(share) - share).to(slope) * slope) @ rows
            below = reached[..., -1]
        normed.backward(gradient)
        assert hidden.grad is not None
        return hidden.grad

    @torch.no_grad()
    def compare(
        self, source: torch.Tensor, other: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """How far each token's prediction is from the source's, and the source's own loss.

        Args:
            source: what the source's last layer gives, ``[..., T, D]``.
            other: the converted model's.
            targets: the tokens after all but the last of them, ``[..., T - 1]``.

        Returns:
            ``KL(source || other)``, ``[..., T]``, and ``-log p(target)`` of the source,
            ``[..., T - 1]``; nats, float64.
        """
        first, second = (self.norm(part.to(self.reader.device)) for part in (source, other))
        masses, other_masses, gaps = self._per_slice(first, 3)
        slices = zip(self._slices(first), self._slices(second), strict=True)
        for index, ((_, logits, _), (_, others, _)) in enumerate(slices):
            moved, wide = (logits - others).double(), logits.double()
            masses[index] = mass = wide.logsumexp(-1)
            gaps[index] = ((wide - mass[..., None]).exp_() * moved).sum(-1)
            other_masses[index] = others.double().logsumexp(-1)
        whole = masses.logsumexp(0)
        kl = ((masses - whole).exp() * gaps).sum(0) - whole + other_masses.logsumexp(0)
        return kl, whole[..., :-1] - self._right(first[..., :-1, :], targets)

    @torch.no_grad()
    def loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """``-log p(target)`` of each token's next token, nats, ``[...]`` float64.

        Args:
            hidden: what the last layer gives, ``[..., D]``.
            targets: the next tokens, ``[...]``.
        """
        states = self.norm(hidden.to(self.reader.device))
        return self._normaliser(states) - self._right(states, targets)

    def _right(self, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Logits of some tokens, one per state, float64."""
        plain = (states * self.output[targets.to(self.reader.device)]).sum(-1)
        return self.reader.family.logits(self.config, plain).double()

    @torch.no_grad()
    def _normaliser(self, states: torch.Tensor) -> torch.Tensor:
        """``log sum exp`` of the logits, ``[...]`` float64."""
        (masses,) = self._per_slice(states, 1)
        for index, (_, logits, _) in enumerate(self._slices(states)):
            masses[index] = logits.double().logsumexp(-1)
        return masses.logsumexp(0)

    def _rows(self, states: torch.Tensor) -> int:
        """Rows of the output matrix that are multiplied with these states at once."""
        return max(1, LOGITS // states[..., 0].numel())

    def _per_slice(self, states: torch.Tensor, count: int) -> torch.Tensor:
        """Room for numbers of every slice and state, made before the logits: small tensors that
        stay between large ones that go would leave holes."""
        slices = math.ceil(len(self.output) / self._rows(states))
        return states.new_empty(count, slices, *states.shape[:-1], dtype=torch.float64)

    def _slices(
        self, states: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Per slice of the vocabulary: its rows, the logits, their slope in ``rows @ states``."""
        for stored in self.output.split(self._rows(states)):
            rows = stored.float()
            plain = (states @ rows.mT).requires_grad_(True)
            with torch.enable_grad():
                logits = self.reader.family.logits(self.config, plain)
                (slope,) = torch.autograd.grad(logits.sum(), plain)
            yield rows, logits.detach(), slope
