"""What every request passes first and last: identity, API key, one line in the access log."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlakit.serving.http.metrics import Metrics
from mlakit.serving.http.record import Record
from mlakit.serving.http.refusal import Refusal

ACCESS = logging.getLogger("mlakit.access")
FAILURES = logging.getLogger("mlakit.serve")

PROTECTED = "/v1"
"""Paths that ask for the key: all that use or name the model."""

QUIET = ("/health", "/metrics")
"""Paths that machines ask for all the time: logged only when they fail."""


class Entrance:
    """ASGI middleware around the whole server.

    Args:
        app: what is inside.
        metrics: that count requests.
        routes: paths that are counted by name.
        api_key: without it, anybody may come in.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, routes: frozenset[str], api_key: str | None
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.routes = routes
        self.digest = None if api_key is None else _digest(api_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        record = Record.of(scope, headers.get("x-request-id"))
        scope.setdefault("state", {})["record"] = record

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = record.identity
            await send(message)

        try:
            self._require_key(scope["path"], headers)
            await self.app(scope, receive, answer)
        except Refusal as refusal:
            record.reason = refusal.message
            await refusal.response()(scope, receive, answer)
        except ClientDisconnect:  # before the body had come
            await NoAnswer(record)(scope, receive, answer)
        except Exception as error:
            FAILURES.exception("request %s failed", record.identity)
            record.reason = f"{type(error).__name__}: {error}"
            if record.status is None:
                wrong = Refusal(500, f"internal error; the server's log tells of {record.identity}")
                await wrong.response()(scope, receive, answer)
        finally:
            self._remember(record)

    def _require_key(self, path: str, headers: Headers) -> None:
        if self.digest is None or not path.startswith(PROTECTED):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(_digest(given), self.digest):
            raise Refusal(
                401,
                "this server needs its API key: send 'Authorization: Bearer KEY'",
                code="invalid_api_key",
            )

    def _remember(self, record: Record) -> None:
        path = record.path
        if path.startswith("/v1/models/"):
            path = "/v1/models/{id}"
        known = path if path in self.routes else "other"
        self.metrics.count(record, known, time.perf_counter() - record.started)
        if path not in QUIET or record.status != 200:
            ACCESS.info(json.dumps(record.line(), ensure_ascii=False))


class NoAnswer(Response):
    """To a client that has gone away: there is nobody to answer; the log says 499."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Says nothing."""
        self.record.status = 499
        self.record.reason = "disconnected"


def _digest(key: str) -> bytes:
    """Of one length for all keys, so that comparing them takes the same time for all."""
    return hashlib.sha256(key.strip().encode()).digest()
