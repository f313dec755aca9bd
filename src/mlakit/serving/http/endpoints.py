"""The endpoints: read a request, let the engine write, answer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from mlakit.errors import UsageError
from mlakit.serving.http.answers import Health, ModelCard, ModelList
from mlakit.serving.http.entrance import NoAnswer
from mlakit.serving.http.metrics import Metrics
from mlakit.serving.http.openapi import document
from mlakit.serving.http.protocol import (
    ChatRequest,
    CompletionRequest,
    GenerationFields,
    parse,
)
from mlakit.serving.http.reading import PromptReader
from mlakit.serving.http.record import Record
from mlakit.serving.http.refusal import Refusal
from mlakit.serving.http.sequences import ClientGone, Engine, Job, Sequences
from mlakit.serving.http.spelling import Speller
from mlakit.serving.http.writers import (
    ChatWriter,
    CompletionWriter,
    Text,
    Writer,
    usage_of,
)
from mlakit.serving.request import Draining, QueueFull

DEFAULT_TOKENS = 16
"""New tokens of a completion that does not say how many: OpenAI's number."""

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        tokens: of a prompt and its continuation together.
        waiting: sequences that may wait, and so the most that one request may bring.
        body: bytes of a request's body.
    """

    tokens: int
    waiting: int
    body: int


@dataclass
class Service:
    """One served model.

    Attributes:
        engine: that writes.
        tokenizer: of the model.
        name: that requests call the model by.
        limits: of a request.
        draining: no more requests are taken.
    """

    engine: Engine
    tokenizer: Any
    name: str
    limits: Limits
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.engine.stats)
        self.reader = PromptReader(self.tokenizer)
        self.speller = Speller(self.tokenizer)
        self.reading = ThreadPoolExecutor(1, "mlakit-read")

    async def completions(self, request: Request) -> Response:
        """``POST /v1/completions``."""
        asked, jobs, echoes = await self._read(request, self._completion_jobs)
        writer = CompletionWriter(asked, self.name, self.speller, echoes)
        return await self._answer(request, asked, jobs, writer)

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        asked, jobs = await self._read(request, self._chat_jobs)
        return await self._answer(request, asked, jobs, ChatWriter(asked, self.name, self.speller))

    async def models(self, request: Request) -> Response:
        """``GET /v1/models``."""
        return _json(ModelList(data=[self._card()]))

    async def model(self, request: Request) -> Response:
        """``GET /v1/models/{id}``."""
        self._require_model(request.path_params["id"])
        return _json(self._card())

    async def health(self, request: Request) -> Response:
        """``GET /health``."""
        if self.draining:
            return _json(Health(status="draining"), 503)
        return _json(Health(status="ok"))

    async def figures(self, request: Request) -> Response:
        """``GET /metrics``."""
        return Response(self.metrics.text(), media_type=METRICS_TYPE)

    async def openapi(self, request: Request) -> Response:
        """``GET /openapi.json``."""
        return JSONResponse(document(self.name, self.limits.tokens))

    async def home(self, request: Request) -> Response:
        """``GET /``: for people."""
        return PlainTextResponse(
            f"{self.name} is served here by mlakit, up to {self.limits.tokens} tokens a request."
            f"\n\ncurl {request.base_url}v1/completions -H 'Content-Type: application/json'"
            ' -d \'{"prompt": "Once upon a time", "max_tokens": 40}\'\n\n'
            "/v1/completions /v1/chat/completions /v1/models /health /metrics /openapi.json\n"
        )

    def _card(self) -> ModelCard:
        return ModelCard(id=self.name, created=self.created, max_model_len=self.limits.tokens)

    def _require_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise Refusal(
                404,
                f"the model '{name}' is not served here: '{self.name}' is",
                param="model",
                code="model_not_found",
            )

    async def _read(self, request: Request, jobs_of: Any) -> Any:
        """The body, turned into jobs on the one thread that reads."""
        if self.draining:
            raise Refusal(503, "the server is stopping and takes no more requests")
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(415, "send the header 'Content-Type: application/json'")
        body = await self._body(request)
        return await asyncio.get_running_loop().run_in_executor(self.reading, jobs_of, body)

    async def _body(self, request: Request) -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > self.limits.body:
                raise Refusal(413, f"the body has more than {self.limits.body} bytes")
            parts.append(part)
        return b"".join(parts)

    def _completion_jobs(self, body: bytes) -> tuple[CompletionRequest, list[Job], list[str]]:
        asked = parse(CompletionRequest, body)
        self._require_model(asked.model)
        self._require_few(len(asked.prompts) * asked.choices)
        jobs, echoes = [], []
        for prompt in asked.prompts:
            ids = self.reader.prompt(prompt)
            echo = self.reader.text(prompt) if asked.echo else ""
            tokens = asked.max_tokens or DEFAULT_TOKENS
            for choice in range(asked.choices):
                jobs.append((ids, asked.sampling(tokens, asked.logprobs, choice)))
                echoes.append(echo)
        return asked, jobs, echoes

    def _chat_jobs(self, body: bytes) -> tuple[ChatRequest, list[Job]]:
        asked = parse(ChatRequest, body)
        self._require_model(asked.model)
        self._require_few(asked.choices)
        ids = self.reader.conversation(asked.messages)
        tokens = asked.asked_tokens or max(1, self.limits.tokens - len(ids))
        return asked, [
            (ids, asked.sampling(tokens, asked.asked_logprobs, choice))
            for choice in range(asked.choices)
        ]

    def _require_few(self, sequences: int) -> None:
        if sequences > self.limits.waiting:
            raise Refusal(
                400,
                f"the request brings {sequences} sequences (prompts times 'n'), and at most"
                f" {self.limits.waiting} may wait",
                param="n",
            )

    async def _answer(
        self, request: Request, asked: GenerationFields, jobs: Sequence[Job], writer: Writer
    ) -> Response:
        record: Record = request.state.record
        record.stream, record.user, record.choices = bool(asked.stream), asked.user, asked.choices
        sequences = Sequences(self.engine, record)
        try:
            sequences.submit(jobs)
        except QueueFull as error:
            raise Refusal.of(429, error, code="queue_full") from error
        except Draining as error:
            raise Refusal.of(503, error) from error
        except UsageError as error:
            raise Refusal.of(400, error) from error
        record.prompt_tokens = sum(len(ids) for ids, _ in jobs[:: asked.choices])
        if asked.stream:
            return EventStream(sequences, self._events(asked, sequences, len(jobs), writer))
        texts = [Text() for _ in jobs]
        try:
            async with sequences.watched(request.receive):
                async for index, piece in sequences.pieces():
                    texts[index].add(piece)
        except ClientGone:
            return NoAnswer(record)
        return _json(writer.whole(texts, usage_of(record)))

    async def _events(
        self, asked: GenerationFields, sequences: Sequences, count: int, writer: Writer
    ) -> AsyncIterator[bytes]:
        """Server-sent events of a stream; an error after its start is an event too."""
        last = asked.include_usage
        try:
            for chunk in writer.opening(count):
                yield _event(chunk, last)
            async for index, piece in sequences.pieces():
                if piece.text or piece.logprobs or piece.finish_reason:
                    yield _event(writer.chunk(index, piece), last)
            if last:
                yield _event(writer.closing(usage_of(sequences.record)), last)
        except Refusal as refusal:
            sequences.record.reason = refusal.message
            yield b"data: " + bytes(refusal.response().body) + b"\n\n"
        yield b"data: [DONE]\n\n"


class EventStream(Response):
    """An answer that comes while it is written.

    Args:
        sequences: that write it; they end with it.
        events: server-sent ones.
    """

    media_type = "text/event-stream"

    def __init__(self, sequences: Sequences, events: AsyncIterator[bytes]) -> None:
        super().__init__(None, 200, STREAM_HEADERS)
        del self.headers["content-length"]
        self.sequences = sequences
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends every event when it is there."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with self.sequences.watched(receive):
            await send(start)
            try:
                async for event in self.events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            except ClientGone:
                self.sequences.record.reason = "disconnected"
                return
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _event(chunk: BaseModel, with_usage: bool) -> bytes:
    """One chunk; deltas say only what they add, and ``usage`` is there where it was asked for."""
    shown: dict[str, Any] = chunk.model_dump(exclude=None if with_usage else {"usage"})
    for choice in shown["choices"]:
        if "delta" in choice:
            choice["delta"] = {k: v for k, v in choice["delta"].items() if v is not None}
    return f"data: {json.dumps(shown, ensure_ascii=False)}\n\n".encode()


def _json(answer: BaseModel, status: int = 200) -> Response:
    return Response(answer.model_dump_json(), status, media_type="application/json")
