"""Pieces of text as the two endpoints say them: chunk by chunk, or as one whole answer."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import BaseModel

from mlakit.serving.http.answers import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    Completion,
    CompletionChoice,
    FinishReason,
    PromptTokensDetails,
    Usage,
)
from mlakit.serving.http.protocol import ChatRequest, CompletionRequest
from mlakit.serving.http.record import Record
from mlakit.serving.http.spelling import OffsetCounter, Speller
from mlakit.serving.request import Piece, TokenLogprob

REASONS: dict[str | None, FinishReason | None] = {
    None: None,
    "eos": "stop",
    "stop": "stop",
    "length": "length",
}
"""OpenAI's word for how a text ended."""


@dataclass
class Text:
    """What one sequence has written."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: FinishReason | None = None

    def add(self, piece: Piece) -> None:
        """The next piece."""
        self.text += piece.text
        self.logprobs += piece.logprobs
        self.reason = REASONS[piece.finish_reason]


class Writer(Protocol):
    """One endpoint's way to say things."""

    def opening(self, count: int) -> Sequence[BaseModel]:
        """Chunks that a stream of ``count`` texts begins with."""

    def chunk(self, index: int, piece: Piece) -> BaseModel:
        """A piece of text ``index``."""

    def closing(self, usage: Usage) -> BaseModel:
        """The chunk with the counts."""

    def whole(self, texts: Sequence[Text], usage: Usage) -> BaseModel:
        """The answer at once."""


def usage_of(record: Record) -> Usage:
    """The counts of a request that has ended."""
    return Usage(
        prompt_tokens=record.prompt_tokens,
        completion_tokens=record.completion_tokens,
        total_tokens=record.prompt_tokens + record.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=record.cached_tokens),
    )


class CompletionWriter:
    """The shapes of ``/v1/completions``.

    Args:
        asked: the request.
        model: name of the served model.
        speller: of its tokenizer.
        echoes: the prompts' texts, one per text, or empty ones.
    """

    def __init__(
        self, asked: CompletionRequest, model: str, speller: Speller, echoes: Sequence[str]
    ) -> None:
        self.asked = asked
        self.echoes = echoes
        self.counters = [OffsetCounter(speller, len(echo)) for echo in echoes]
        self.head: dict[str, Any] = _head("cmpl", model)

    def opening(self, count: int) -> list[Completion]:
        """As in Writer: the prompts, where they are echoed."""
        return [
            self._with(CompletionChoice(index=index, text=echo))
            for index, echo in enumerate(self.echoes[:count])
            if echo
        ]

    def chunk(self, index: int, piece: Piece) -> Completion:
        """As in Writer."""
        reason = REASONS[piece.finish_reason]
        return self._with(self._choice(index, piece.text, piece.logprobs, reason))

    def closing(self, usage: Usage) -> Completion:
        """As in Writer."""
        return Completion(choices=[], usage=usage, **self.head)

    def whole(self, texts: Sequence[Text], usage: Usage) -> Completion:
        """As in Writer."""
        choices = [
            self._choice(index, self.echoes[index] + text.text, text.logprobs, text.reason)
            for index, text in enumerate(texts)
        ]
        return Completion(choices=choices, usage=usage, **self.head)

    def _choice(
        self,
        index: int,
        text: str,
        logprobs: Sequence[TokenLogprob],
        reason: FinishReason | None,
    ) -> CompletionChoice:
        count, counter = self.asked.logprobs, self.counters[index]
        shown = None if count is None else counter.completion(logprobs, count)
        return CompletionChoice(index=index, text=text, logprobs=shown, finish_reason=reason)

    def _with(self, choice: CompletionChoice) -> Completion:
        return Completion(choices=[choice], **self.head)


class ChatWriter:
    """The shapes of ``/v1/chat/completions``.

    Args:
        asked: the request.
        model: name of the served model.
        speller: of its tokenizer.
    """

    def __init__(self, asked: ChatRequest, model: str, speller: Speller) -> None:
        self.asked = asked
        self.speller = speller
        self.head: dict[str, Any] = _head("chatcmpl", model)

    def opening(self, count: int) -> list[ChatChunk]:
        """As in Writer: whose turn it is."""
        delta = ChatDelta(role="assistant", content="")
        return [self._with(ChatChunkChoice(index=index, delta=delta)) for index in range(count)]

    def chunk(self, index: int, piece: Piece) -> ChatChunk:
        """As in Writer."""
        return self._with(
            ChatChunkChoice(
                index=index,
                delta=ChatDelta(content=piece.text) if piece.text else ChatDelta(),
                logprobs=self._logprobs(piece.logprobs),
                finish_reason=REASONS[piece.finish_reason],
            )
        )

    def closing(self, usage: Usage) -> ChatChunk:
        """As in Writer."""
        return ChatChunk(choices=[], usage=usage, **self.head)

    def whole(self, texts: Sequence[Text], usage: Usage) -> ChatCompletion:
        """As in Writer."""
        choices = [
            ChatChoice(
                index=index,
                message=ChatMessage(content=text.text),
                logprobs=self._logprobs(text.logprobs),
                finish_reason=text.reason,
            )
            for index, text in enumerate(texts)
        ]
        return ChatCompletion(choices=choices, usage=usage, **self.head)

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        return self.speller.chat(tokens) if self.asked.logprobs else None

    def _with(self, choice: ChatChunkChoice) -> ChatChunk:
        return ChatChunk(choices=[choice], **self.head)


def _head(kind: str, model: str) -> dict[str, Any]:
    """What all chunks of an answer share."""
    return {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
