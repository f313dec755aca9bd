"""The sequences of one HTTP request: from the engine's thread to the server's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Protocol

from starlette.types import Receive

from mlakit.serving.http.record import Record
from mlakit.serving.http.refusal import Refusal
from mlakit.serving.request import EngineStats, Piece, Sampling, Ticket

Job = tuple[list[int], Sampling]
"""Tokens of a prompt, and how it is to be continued."""


class Engine(Protocol):
    """What the server needs of ``mlakit.serving.engine.Engine``."""

    def submit(
        self, prompt_ids: Sequence[int], sampling: Sampling, on_piece: Callable[[Piece], None]
    ) -> Ticket: ...

    def cancel(self, ticket: Ticket) -> None: ...

    def stats(self) -> EngineStats: ...

    def drain(self, timeout: float | None = None) -> bool: ...

    def stop(self) -> None: ...


class ClientGone(Exception):
    """The client has closed the connection."""


class Sequences:
    """Some sequences that run together and end together.

    Args:
        engine: that runs them.
        record: of the request.
    """

    def __init__(self, engine: Engine, record: Record) -> None:
        self.engine = engine
        self.record = record
        self.running: dict[int, Ticket] = {}
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[tuple[int, Piece] | None] = asyncio.Queue()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Gives all of them to the engine, or none.

        Raises:
            QueueFull: too many wait.
            Draining: no more are taken.
            UsageError: one does not fit.
        """
        try:
            for index, (ids, sampling) in enumerate(jobs):
                hear = partial(self._hear, index)
                self.running[index] = self.engine.submit(ids, sampling, hear)
        except BaseException:
            self.cancel()
            raise

    def _hear(self, index: int, piece: Piece) -> None:
        """Called on the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed: the server ended without waiting
            self._loop.call_soon_threadsafe(self._news.put_nowait, (index, piece))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """News of every sequence, by its number, until all have ended.

        Raises:
            ClientGone: nobody listens any more.
            Refusal: the engine failed, or was stopped.
        """
        while self.running:
            news = await self._news.get()
            if news is None:
                raise ClientGone
            index, piece = news
            self.record.hear(index, piece)
            if piece.finish_reason is not None:
                del self.running[index]
            if piece.finish_reason == "error":
                raise Refusal(500, piece.error or "the engine failed")
            if piece.finish_reason == "cancelled":
                raise Refusal(503, "the server stopped before the answer was complete")
            yield index, piece

    def cancel(self) -> None:
        """Ends those that still run; what the engine says of them is not listened to."""
        for ticket in self.running.values():
            self.engine.cancel(ticket)
            self.record.finished["cancelled"] += 1
        self.running = {}

    @asynccontextmanager
    async def watched(self, receive: Receive) -> AsyncIterator[None]:
        """Cancels them when the block is left early, and leaves it when the client goes away.

        Args:
            receive: of the request, whose body has been read.
        """
        watcher = asyncio.create_task(self._watch(receive))
        try:
            yield
        finally:
            watcher.cancel()
            self.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._news.put_nowait(None)
