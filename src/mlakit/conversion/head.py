"""What comes after the last layer, a slice of the vocabulary at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mlakit.conversion.amounts import VOCABULARY_SLICE
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
    def divergence(self, source: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """``KL(source || other)`` of each token's prediction, nats, ``[...]`` float64.

        Args:
            source: what the source's last layer gives, ``[..., D]``.
            other: the converted model's.
        """
        both = [self.norm(part.to(self.reader.device)) for part in (source, other)]
        wholes = [self._normaliser(states) for states in both]
        found = torch.zeros_like(wholes[0])
        for (_, first, _), (_, second, _) in zip(*map(self._slices, both), strict=True):
            first, second = (
                logits.double() - whole[..., None]
                for logits, whole in zip((first, second), wholes, strict=True)
            )
            found += (first.exp() * (first - second)).sum(-1)
        return found

    @torch.no_grad()
    def loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """``-log p`` of each token's next token, nats, ``[...]`` float64.

        Args:
            hidden: what the last layer gives, ``[..., D]``.
            targets: the next tokens, ``[...]``.
        """
        states = self.norm(hidden.to(self.reader.device))
        plain = (states * self.output[targets.to(self.reader.device)]).sum(-1)
        logits = self.reader.family.logits(self.config, plain)
        return self._normaliser(states) - logits.double()

    @torch.no_grad()
    def _normaliser(self, states: torch.Tensor) -> torch.Tensor:
        """``log sum exp`` of the logits, ``[...]`` float64."""
        parts = [logits.double().logsumexp(-1) for _, logits, _ in self._slices(states)]
        return torch.stack(parts).logsumexp(0)

    def _slices(
        self, states: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Per slice of the vocabulary: its rows, the logits, their slope in ``rows @ states``."""
        for stored in self.output.split(VOCABULARY_SLICE):
            rows = stored.float()
            plain = (states @ rows.mT).requires_grad_(True)
            with torch.enable_grad():
                logits = self.reader.family.logits(self.config, plain)
                (slope,) = torch.autograd.grad(logits.sum(), plain)
            yield rows, logits.detach(), slope
