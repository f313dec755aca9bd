"""What goes into the engine and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlakit.errors import MlakitError
from mlakit.generation.sampling import Sampling

__all__ = [
    "Draining",
    "EngineStats",
    "FinishReason",
    "Piece",
    "QueueFull",
    "Sampling",
    "Ticket",
    "TokenLogprob",
]

FinishReason = Literal["eos", "stop", "length", "cancelled", "error"]


class QueueFull(MlakitError):
    """As many requests wait as may wait; a later try may succeed."""


class Draining(MlakitError):
    """The engine takes no more requests: it is being stopped."""


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model held a token to be, before penalties, bias and temperature.

    Attributes:
        token_id: the token chosen.
        logprob: its natural log-probability.
        top: the likeliest tokens and their log-probabilities, likeliest first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """One step's news of one request.

    Attributes:
        text: whole characters only, never part of a stop string; may be empty.
        token_ids: the tokens of this step; their text may come with a later piece. The token
            that ended the text is not among them.
        logprobs: of those tokens, where asked for.
        finish_reason: on the last piece: ``eos``, ``stop`` (a stop string), ``length``,
            ``cancelled`` or ``error``.
        error: what went wrong, with ``error``.
        cached_tokens: prompt tokens that were in shared pages already; on the last piece.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    cached_tokens: int = 0


@dataclass(frozen=True)
class Ticket:
    """What ``Engine.submit`` gives for a request, to cancel it by."""

    number: int


@dataclass(frozen=True)
class EngineStats:
    """What the engine holds now, and what it has done since it was made.

    Attributes:
        waiting: requests that hold no pages, those that gave them back included.
        running: requests that hold pages.
        pages_total: pages of the pool; one is P tokens in every layer.
        pages_used: pages that running requests hold, a shared one counted once.
        pages_kept: pages that no request holds, kept for the prefix in them.
        pages_free: pages that hold nothing; with the kept ones, what a request can get.
        cache_nbytes: bytes of the pool.
        preemptions: times a running request gave its pages back to be computed again.
        prefix_hits: pages of prompts and of preempted texts that were found instead of computed.
        prompt_tokens: tokens of the prompts accepted.
        written_tokens: tokens delivered.
        finished: requests that ended, by finish reason.
        steps: steps of the model's decode batch or of a prompt's chunk, or both.
    """

    waiting: int
    running: int
    pages_total: int
    pages_used: int
    pages_kept: int
    pages_free: int
    cache_nbytes: int
    preemptions: int
    prefix_hits: int
    prompt_tokens: int
    written_tokens: int
    finished: dict[FinishReason, int]
    steps: int
