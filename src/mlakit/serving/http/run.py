"""A model, its engine and its server, from start to end."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from pathlib import Path
from typing import Any

from mlakit.account import parse_bytes
from mlakit.errors import MlakitError, UsageError
from mlakit.evaluation import open_subject
from mlakit.serving.engine import Engine
from mlakit.serving.http.endpoints import Limits, Service
from mlakit.serving.http.reading import use_chat_template
from mlakit.serving.http.server import Server, listen
from mlakit.serving.options import DEFAULTS, KEY, ServeOptions
from mlakit.serving.plan import CachePlan, device_of, pool_bytes
from mlakit.spec import BLOCK_SIZE

LOG = logging.getLogger("mlakit.serve")


def run(model: str | Path, options: ServeOptions) -> None:
    """Serves until a signal ends it.

    Args:
        model: folder or hub id.
        options: how.

    Raises:
        UsageError: an option makes no sense, or the model was not converted.
        MlakitError: the model or the address cannot be had, or requests were cut off at the end.
    """
    if options.key is not None and not options.key.isascii():
        raise UsageError("the API key is not ASCII, and HTTP headers are", remedy="choose another")
    body = parse_bytes(_given(options, "max_body"))
    listener = listen(options.host, options.port)  # before the model, which may take minutes
    engine, plan = _start(model, options)
    limits = Limits(tokens=plan.request_tokens, waiting=engine.max_waiting, body=body)
    server = Server(
        Service(engine, engine.tokenizer, plan.model, limits),
        listener,
        api_key=options.key,
        cors_origins=tuple(options.cors_origin),
        drain_seconds=_given(options, "drain_timeout"),
    )
    announce(listener, options.key, plan)
    engine.start()
    try:
        asyncio.run(server.serve())
    finally:
        engine.stop()
    if server.cut_off:
        raise MlakitError(
            f"sequences that were cut off at the end: {server.cut_off}",
            remedy="give them more time with --drain-timeout",
        )
    LOG.info("stopped; every accepted request was answered")


def _start(model: str | Path, options: ServeOptions) -> tuple[Engine, CachePlan]:
    """The engine with its model, and what its pool holds."""
    device = device_of(options)
    subject = open_subject(
        model, dtype=options.dtype, device=device, cache_format=options.cache_format
    )
    if options.chat_template is not None:
        use_chat_template(subject.tokenizer, options.chat_template)
    batch = _given(options, "max_batch_size")
    engine = Engine(
        subject.model,
        subject.tokenizer,
        max_batch_size=batch,
        cache_bytes=pool_bytes(options.cache_memory, device),
        max_tokens_per_request=options.max_tokens,
        max_waiting=_given(options, "max_waiting"),
    )
    stats = engine.stats()
    return engine, CachePlan(
        model=options.called(model),
        weight_bytes=sum(tensor.nbytes for tensor in subject.model.parameters()),
        pages=stats.pages_total,
        cache_bytes=stats.cache_nbytes,
        request_tokens=min(engine.max_tokens, stats.pages_total * BLOCK_SIZE),
        max_batch_size=batch,
    )


def _given(options: ServeOptions, name: str) -> Any:
    """An option, or our engine's default of it."""
    value = getattr(options, name)
    return DEFAULTS[name] if value is None else value


def announce(listener: socket.socket, api_key: str | None, plan: CachePlan) -> None:
    """Says what the server holds, where it is, and, loudly, that anybody may come in."""
    address, port = listener.getsockname()[:2]
    LOG.info("%s", plan)
    shown = f"[{address}]" if ":" in address else address
    LOG.info("%-9shttp://%s:%d (Ctrl-C ends it)", "address", shown, port)
    if api_key is None and not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        LOG.warning(
            "\nWARNING: anybody who reaches %s can use this model: there is no API key.\n"
            "Set %s, or listen on 127.0.0.1.\n",
            address,
            KEY,
        )
