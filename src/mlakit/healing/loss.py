"""Losses on logits that are never all in memory.

Logits ``[tokens, vocabulary]`` are the largest tensor of a training step. Here they are made a few
hundred tokens at a time, their gradient with respect to the hidden states is taken at once, and
they are dropped: what stays is as large as the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CHUNK_LOGITS = 2**25
"""Logits at a time; with both models' and their gradients about a gigabyte in float32."""


@dataclass(frozen=True)
class LogitLoss:
    """Weights of the two losses on logits.

    Attributes:
        ce_weight: of the next token's negative log-likelihood.
        kl_weight: of KL(teacher || student).
        temperature: divides both models' logits in the KL, whose value is multiplied by its
            square, so that gradients keep their size (Hinton et al., arXiv 1503.02531).
        top_k: most likely tokens of the teacher that are told apart, 0 for all.
    """

    ce_weight: float
    kl_weight: float
    temperature: float = 1.0
    top_k: int = 0

    def __call__(
        self, student: Tensor, teacher: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sums over tokens.

        Args:
            student: logits ``[n, vocabulary]``.
            teacher: logits likewise; None where the KL has no weight.
            targets: next tokens ``[n]``.

        Returns:
            The weighted loss, and ``[2]``: cross entropy and KL as they are.
        """
        student = student.float()
        ce = functional.cross_entropy(student, targets, reduction="sum")
        kl = ce.new_zeros(())
        if teacher is not None:
            kl = self.divergence(student, teacher.float()).sum()
        total = self.kl_weight * kl
        if self.ce_weight:
            total = total + self.ce_weight * ce
        return total, torch.stack((ce, kl)).detach()

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """KL(teacher || student) of each token, ``[n]``, times the temperature squared."""
        log_p = (teacher / self.temperature).log_softmax(-1)
        log_q = (student / self.temperature).log_softmax(-1)
        if 0 < self.top_k < log_p.shape[-1]:
            best = log_p.topk(self.top_k, -1).indices
            log_p, log_q = (_with_rest(part.gather(-1, best)) for part in (log_p, log_q))
        return (log_p.exp() * (log_p - log_q)).sum(-1) * self.temperature**2


def _with_rest(log_p: Tensor) -> Tensor:
    """``[n, k]`` log probabilities and, as one more outcome, all that is left."""
    rest = (-torch.expm1(log_p.logsumexp(-1, keepdim=True).clamp_max(-1e-7))).clamp_min(1e-30)
    return torch.cat((log_p, rest.log()), -1)


ChunkLoss = Callable[[Tensor, list[Tensor], slice], tuple[Tensor, Tensor]]
"""Of hidden states ``[n, D]``, the output weights and which rows these are: the loss to
differentiate, and figures to add up."""


def chunked(
    part: ChunkLoss, hidden: Tensor, weights: Sequence[Tensor], rows: int
) -> tuple[Tensor, Tensor]:
    """Adds a loss up over chunks of rows, with the gradient taken chunk by chunk.

    Args:
        part: the loss of one chunk.
        hidden: ``[tokens, D]``.
        weights: the output layer's parameters, of which some may train.
        rows: tokens per chunk.

    Returns:
        The loss and the figures, summed; only the loss has a gradient, of first order.
    """
    total, facts = _Chunked.apply(part, rows, hidden, *weights)
    return total, facts


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, part: ChunkLoss, rows: int, hidden: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        wanted = list(ctx.needs_input_grad[2:])
        gradients = [
            torch.zeros_like(tensor, dtype=torch.float32 if index else None) if needed else None
            for index, (tensor, needed) in enumerate(zip((hidden, *weights), wanted, strict=True))
        ]
        totals, facts = [], []
        for start in range(0, max(len(hidden), 1), rows):  # one chunk at least, if empty
            chunk = slice(start, start + rows)
            inputs = [hidden[chunk].detach(), *(weight.detach() for weight in weights)]
            for tensor, needed in zip(inputs, wanted, strict=True):
                tensor.requires_grad_(needed)
            with torch.enable_grad():
                loss, found = part(inputs[0], inputs[1:], chunk)
            slopes = iter(
                torch.autograd.grad(loss, [t for t, n in zip(inputs, wanted, strict=True) if n])
                if any(wanted)
                else ()
            )
            for index, gradient in enumerate(gradients):
                if gradient is not None and index:
                    gradient += next(slopes)
                elif gradient is not None:
                    gradient[chunk] = next(slopes)
            totals.append(loss.detach())
            facts.append(found)
        ctx.save_for_backward(*(g for g in gradients if g is not None))
        ctx.wanted = wanted
        whole = torch.stack(facts).sum(0)
        ctx.mark_non_differentiable(whole)
        return torch.stack(totals).sum(), whole

    @staticmethod
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        found = [next(saved) * slope if needed else None for needed in ctx.wanted]
        return (None, None, *found)
