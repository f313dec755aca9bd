"""What is remembered of one HTTP request: the line in the access log and the figures."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from mlakit.serving.request import Piece


@dataclass
class Record:
    """One request from its first byte to its last.

    Times are of ``time.perf_counter``, in seconds.

    Attributes:
        identity: of the request, in the ``X-Request-Id`` header and in every log line.
        method: HTTP method.
        path: of the URL.
        client: address it came from.
        status: HTTP status; None until an answer has begun.
        reason: why it ended otherwise than it should: the error's text, or ``disconnected``.
        stream: whether the answer is a stream.
        user: as the body names it.
        choices: sequences per prompt; they come one prompt after the other.
        prompt_tokens: of all prompts.
        completion_tokens: of all choices.
        cached_tokens: prompt tokens found in pages that were there already; of each prompt as its
            first choice met them, since what one choice computes the others find.
        begun: sequences that have written.
        finished: sequences by finish reason.
        first_at: when the first token came.
    """

    identity: str
    method: str
    path: str
    client: str
    started: float = field(default_factory=time.perf_counter)
    status: int | None = None
    reason: str | None = None
    stream: bool = False
    user: str | None = None
    choices: int = 1
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    begun: set[int] = field(default_factory=set)
    finished: Counter[str] = field(default_factory=Counter)
    first_at: float | None = None
    last_at: float | None = None

    @classmethod
    def of(cls, scope: Any, identity: str | None) -> Record:
        """A record of an ASGI scope; the client's identity is kept where it is a sane one."""
        sane = identity and len(identity) <= 128 and identity.isascii() and identity.isprintable()
        client = scope.get("client") or ("", 0)
        return cls(
            identity=identity if identity and sane else f"req-{uuid.uuid4().hex}",
            method=scope["method"],
            path=scope["path"],
            client=client[0],
        )

    def hear(self, index: int, piece: Piece) -> None:
        """Counts a piece of sequence ``index`` that has come from the engine."""
        if piece.token_ids:
            self.begun.add(index)
            self.last_at = time.perf_counter()
            self.first_at = self.first_at or self.last_at
            self.completion_tokens += len(piece.token_ids)
        if piece.finish_reason is not None:
            self.finished[piece.finish_reason] += 1
            if index % self.choices == 0:
                self.cached_tokens += piece.cached_tokens

    @property
    def first_token_seconds(self) -> float | None:
        """From the request to its first token."""
        return None if self.first_at is None else self.first_at - self.started

    @property
    def seconds_per_token(self) -> float | None:
        """Between tokens after the first one of all; None where no sequence wrote a second one."""
        further = self.completion_tokens - len(self.begun)
        if self.first_at is None or self.last_at is None or further < 1:
            return None
        return (self.last_at - self.first_at) / further

    def line(self) -> dict[str, Any]:
        """For the access log."""
        line: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request": self.identity,
            "client": self.client,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "seconds": round(time.perf_counter() - self.started, 4),
        }
        if self.prompt_tokens:
            first = self.first_token_seconds
            line |= {
                "stream": self.stream,
                "first_token_seconds": None if first is None else round(first, 4),
                "prompt_tokens": self.prompt_tokens,
                "cached_tokens": self.cached_tokens,
                "completion_tokens": self.completion_tokens,
                "finish": dict(self.finished),
            }
        line |= {"user": self.user} if self.user else {}
        return line | ({"reason": self.reason} if self.reason else {})
