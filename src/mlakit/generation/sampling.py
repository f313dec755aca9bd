"""The next token of every sequence from its logits, and the wishes that decide it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mlakit.errors import UsageError

CANDIDATES = 1024
"""Tokens among which the one that a number falls on is looked for first."""


@dataclass(frozen=True)
class Sampling:
    """How one text's tokens are chosen, and where it ends.

    Attributes:
        max_tokens: most tokens written.
        temperature: 0 for the most likely token, else the logits are divided by it.
        top_p: samples from the most likely tokens that reach this probability.
        top_k: samples from this many tokens; 0 for all.
        stop: strings that end the text and are not part of it.
        seed: seed of the sampling; with the prompt it decides the text. None for a new one.
        logprobs: None for no log-probabilities; n for those of the token chosen and of the n
            likeliest. They are the model's own: before penalties, bias and temperature.
        ignore_eos: an end-of-sequence token is a token like any other.
        presence_penalty: taken from the logit of every token that has been written.
        frequency_penalty: taken from it once for every time.
        logit_bias: added to the logits of these tokens.

    Raises:
        UsageError: a value makes no sense.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        added = (self.presence_penalty, self.frequency_penalty, *self.logit_bias.values())
        for wrong, message in (
            (self.max_tokens < 1, f"max_tokens is {self.max_tokens}; at least 1 is needed"),
            (
                not 0 <= self.temperature < math.inf,
                f"temperature is {self.temperature}; it must not be negative",
            ),
            (not 0 <= self.top_p <= 1, f"top_p is {self.top_p}; it lies between 0 and 1"),
            (self.top_k < 0, f"top_k is {self.top_k}; it must not be negative"),
            (isinstance(self.stop, str), "stop is one string, not a list of them"),
            ("" in self.stop, "an empty stop string would end every text"),
            (
                self.logprobs is not None and self.logprobs < 0,
                f"logprobs is {self.logprobs}; it must not be negative",
            ),
            (not all(map(math.isfinite, added)), "a penalty or a bias is not a finite number"),
        ):
            if wrong:
                raise UsageError(message)


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
    levels = logits.double()  # below the largest, so that no temperature takes them to infinity
    scaled = (levels - levels.amax(dim=-1, keepdim=True)) / temperature
    draws = draws.to(logits.device).unsqueeze(1)
    probabilities, order = _likeliest(scaled, top_k, draws if top_p == 1 else draws * 0 + top_p)
    if top_p < 1:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill((before >= top_p) & (before > 0), 0.0)
        draws = draws * probabilities.sum(dim=-1, keepdim=True)
    place = torch.searchsorted(probabilities.cumsum(dim=-1), draws, right=True)
    return order.gather(1, place.clamp_max(order.shape[-1] - 1)).squeeze(1)


def _likeliest(scaled: Tensor, top_k: int, reach: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and ids ``[B, n]``, likeliest first, until they reach a sum.

    A few tokens hold nearly all of the probability, and finding those is much cheaper than
    sorting all. The likeliest come first also because rounding then moves the place that a
    number falls in least: by the probability that is left, not by what has been added up.

    Args:
        scaled: logits ``[B, vocabulary]``, float64.
        top_k: only this many, which share the whole probability; 0 for all.
        reach: the sum ``[B, 1]``; it may take all tokens.
    """
    size = scaled.shape[-1]
    if top_k:
        levels, order = scaled.topk(min(top_k, size), dim=-1)
        return levels.softmax(dim=-1), order
    whole, count = scaled.logsumexp(dim=-1, keepdim=True), CANDIDATES
    while True:
        levels, order = scaled.topk(min(count, size), dim=-1)
        probabilities = (levels - whole).exp()
        reached = bool((probabilities.sum(dim=-1, keepdim=True) > reach).all())
        if count >= size or reached:
            return probabilities, order
        count *= 8


def penalise(logits: Tensor, written: Mapping[int, int], sampling: Sampling) -> None:
    """Changes one text's logits ``[vocabulary]`` by its penalties and its bias, in place.

    Args:
        logits: of the next token.
        written: how often each token has been written, the prompt not counted.
        sampling: whose ``presence_penalty``, ``frequency_penalty`` and ``logit_bias`` count.
    """
    changes = dict(sampling.logit_bias)
    for token, count in written.items():
        penalty = sampling.presence_penalty + count * sampling.frequency_penalty
        changes[token] = changes.get(token, 0.0) - penalty
    tokens = torch.tensor(list(changes), dtype=torch.long, device=logits.device)
    logits[tokens] += torch.tensor(list(changes.values())).to(logits)


def log_probabilities(
    logits: Tensor, token: int, count: int
) -> tuple[float, list[tuple[int, float]]]:
    """Of one token, and of the likeliest ones, in the model's own distribution.

    Args:
        logits: ``[vocabulary]``.
        token: the token.
        count: how many of the likeliest to name.

    Returns:
        The token's natural log-probability, and tokens with theirs, likeliest first.
    """
    levels = logits.double().log_softmax(dim=-1)
    top, order = levels.topk(min(count, len(levels)))
    return float(levels[token]), list(zip(order.tolist(), top.tolist(), strict=True))


def row_generator(seed: int, prompt_ids: Sequence[int], occurrence: int) -> torch.Generator:
    """The random numbers of one prompt, the same whatever stands beside it in the batch.

    Args:
        seed: the run's seed.
        prompt_ids: the prompt.
        occurrence: how many times the same prompt came before in this run.
    """
    key = f"{seed}\n{occurrence}\n{' '.join(map(str, prompt_ids))}"
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
