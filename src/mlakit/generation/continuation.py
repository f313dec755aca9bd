"""A prompt and what has been written after it: the part that every way to generate shares."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mlakit.generation.sampling import Sampling, choose_tokens, penalise, row_generator
from mlakit.generation.text import TextStream

FinishReason = Literal["eos", "stop", "length"]


class Continuation:
    """One text on its way.

    Attributes:
        token_ids: what has been written, without the end-of-sequence token; with a stop string,
            up to the token that completed it.
        stream: their text.
        finish_reason: ``eos``, ``stop`` (a stop string), ``length``, or None while it goes on.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompt_ids: the prompt.
        sampling: how to go on; its seed is a number unless the temperature is 0.
        eos: the tokens that end a text.
        occurrence: how many times the same prompt came before with the same seed.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        eos: frozenset[int],
        occurrence: int = 0,
    ) -> None:
        self.sampling = sampling
        self.eos = frozenset() if sampling.ignore_eos else eos
        self.stream = TextStream(tokenizer, prompt_ids, sampling.stop)
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.generator: torch.Generator | None = None
        if sampling.temperature:
            self.generator = row_generator(sampling.seed or 0, prompt_ids, occurrence)
        self.penalised = bool(sampling.presence_penalty or sampling.frequency_penalty)
        self.written: Counter[int] = Counter()

    def accept(self, token: int) -> str:
        """Takes the next token and returns the text that is certain now, often none."""
        if token in self.eos:
            self.finish_reason, piece = "eos", ""
        else:
            self.token_ids.append(token)
            if self.penalised:
                self.written[token] += 1
            piece = self.stream.push(token)
            if self.stream.stopped:
                self.finish_reason = "stop"
            elif len(self.token_ids) == self.sampling.max_tokens:
                self.finish_reason = "length"
        if self.finish_reason in ("eos", "length"):
            piece += self.stream.finish()
            if self.stream.stopped:
                self.finish_reason = "stop"
        return piece


def next_tokens(logits: Tensor, rows: Sequence[Continuation]) -> list[int]:
    """Chooses a token for every row, each by its own wishes and its own random numbers.

    Args:
        logits: ``[B, vocabulary]``.
        rows: B texts; a finished one gets some token, and draws no number.
    """
    changed = [row.penalised or bool(row.sampling.logit_bias) for row in rows]
    if any(changed):
        logits = logits.clone()
    alike: dict[tuple[float, int, float], list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        if changed[place]:
            penalise(logits[place], row.written, row.sampling)
        how = row.sampling
        alike[how.temperature, how.top_k, how.top_p].append(place)
    tokens = [0] * len(rows)
    for options, places in alike.items():
        draws = _draws([rows[place] for place in places]) if options[0] else None
        some = logits if len(places) == len(rows) else logits[places]
        for place, token in zip(places, choose_tokens(some, draws, *options).tolist()):
            tokens[place] = token
    return tokens


def _draws(rows: Sequence[Continuation]) -> Tensor:
    """A uniform number of each unfinished row, ``[B]`` float64."""
    draws = torch.zeros(len(rows), dtype=torch.float64)
    for place, row in enumerate(rows):
        if row.finish_reason is None:
            draws[place] = torch.rand((), generator=row.generator, dtype=torch.float64)
    return draws


def eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text: the generation config's, else the tokenizer's."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if eos is None:
        eos = tokenizer.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)
