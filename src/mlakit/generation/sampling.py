"""The next token of every sequence from its logits."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def choose_tokens(
    logits: Tensor, draws: Tensor | None, temperature: float, top_k: int, top_p: float
) -> Tensor:
    """Picks one token per row; rows do not influence each other.

    Args:
        logits: ``[B, vocabulary]``.
        draws: uniform numbers in [0, 1), ``[B]`` float64; None for the most likely token.
        temperature: divides the logits.
        top_k: keeps this many most likely tokens; 0 keeps all.
        top_p: keeps the most likely tokens until their probabilities reach this sum
            (nucleus sampling, Holtzman et al. 2019, arXiv 1904.09751); 1 keeps all.

    Returns:
        Token ids ``[B]``.
    """
    if draws is None:
        return logits.argmax(dim=-1)
    scaled, order = (logits.double() / temperature).sort(dim=-1, descending=True, stable=True)
    if top_k:
        scaled[:, top_k:] = -torch.inf
    probabilities = scaled.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = torch.where((before < top_p) | (before == 0), probabilities, 0.0)
    sums = kept.cumsum(dim=-1)
    threshold = draws.to(logits.device).unsqueeze(1) * sums[:, -1:]
    rank = (sums <= threshold).sum(dim=-1, keepdim=True).clamp_max(logits.shape[-1] - 1)
    return order.gather(1, rank).squeeze(1)


def row_generator(seed: int, prompt: str, occurrence: int) -> torch.Generator:
    """The random numbers of one prompt, the same whatever stands beside it in the batch.

    Args:
        seed: the run's seed.
        prompt: the prompt.
        occurrence: how many times the same prompt came before in this run.
    """
    digest = hashlib.sha256(f"{seed}\n{occurrence}\n{prompt}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
