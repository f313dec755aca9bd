"""Running the server: a port, signals, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from types import FrameType

import uvicorn

from mlakit.errors import MlakitError
from mlakit.serving.http.app import application
from mlakit.serving.http.endpoints import Service

LOG = logging.getLogger("mlakit.serve")

KEEP_ALIVE = 30
"""Seconds that an idle connection stays open."""

LAST_WORDS = 5
"""Seconds for answers to reach their clients once the engine has written them."""


class Server(uvicorn.Server):
    """A uvicorn server that drains before it goes.

    The first SIGTERM or SIGINT turns new requests away with 503 and lets accepted ones end; the
    second one, or the end of the time for it, cancels what still runs.

    Args:
        service: that answers; its engine has been started.
        listener: a socket that is bound.
        api_key: that ``/v1`` asks for.
        cors_origins: sites whose pages may use the server.
        drain_seconds: longest time for accepted requests to end.

    Attributes:
        cut_off: sequences that did not end by themselves; 0 until the server has stopped.
    """

    def __init__(
        self,
        service: Service,
        listener: socket.socket,
        *,
        api_key: str | None,
        cors_origins: tuple[str, ...],
        drain_seconds: float,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                application(service, api_key=api_key, cors_origins=cors_origins),
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=LAST_WORDS,
            )
        )
        self.service = service
        self.listener = listener
        self.drain_seconds = drain_seconds
        self.cut_off = 0
        self._draining: asyncio.Task[None] | None = None
        self._hurried = False
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Answers requests until a signal ends it."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets or [self.listener])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal; what it does happens on the event loop."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.leave, signal.Signals(sig).name)

    def leave(self, why: str) -> None:
        """Begins to drain; the second time, ends at once. Called on the event loop."""
        if self._draining is None:
            LOG.info("%s: no new requests; accepted ones have %gs", why, self.drain_seconds)
            self.service.draining = True
            self._draining = asyncio.create_task(self._drain())
        else:
            LOG.info("%s again: requests that still run are cancelled", why)
            self._hurried = True

    async def _drain(self) -> None:
        engine, loop = self.service.engine, asyncio.get_running_loop()
        end = loop.time() + self.drain_seconds
        done = False
        while not done and not self._hurried and loop.time() < end:
            done = await asyncio.to_thread(engine.drain, 0.1)
        stats = engine.stats()
        self.cut_off = stats.running + stats.waiting
        await asyncio.to_thread(engine.stop)
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one.

    Raises:
        MlakitError: the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        raise MlakitError(
            f"cannot listen on {host} port {port}: {error}", remedy="try another --port"
        ) from error
    return listener
