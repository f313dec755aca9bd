"""A model, its engine and its server, from start to end."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from pathlib import Path
from typing import Any

from mlakit.account import parse_bytes
from mlakit.errors import MlakitError
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
    given: dict[str, Any] = {
        name: default if getattr(options, name) is None else getattr(options, name)
        for name, default in DEFAULTS.items()
    }
    body, device = parse_bytes(given["max_body"]), device_of(options)
    listener = listen(options.host, options.port)  # before the model, which may take minutes
    subject = open_subject(
        model, dtype=options.dtype, device=device, cache_format=options.cache_format
    )
    if options.chat_template is not None:
        use_chat_template(subject.tokenizer, options.chat_template)
    engine = Engine(
        subject.model,
        subject.tokenizer,
        max_batch_size=given["max_batch_size"],
        cache_bytes=pool_bytes(options.cache_memory, device),
        max_tokens_per_request=options.max_tokens,
        max_waiting=given["max_waiting"],
    )
    name, stats = options.called(model), engine.stats()
    plan = CachePlan(
        model=name,
        weight_bytes=sum(tensor.nbytes for tensor in subject.model.parameters()),
        pages=stats.pages_total,
        cache_bytes=stats.cache_nbytes,
        request_tokens=min(engine.max_tokens, stats.pages_total * BLOCK_SIZE),
        max_batch_size=given["max_batch_size"],
    )
    limits = Limits(tokens=plan.request_tokens, waiting=engine.max_waiting, body=body)
    server = Server(
        Service(engine, subject.tokenizer, name, limits),
        listener,
        api_key=options.key,
        cors_origins=tuple(options.cors_origin),
        drain_seconds=given["drain_timeout"],
    )
    _say(listener, options.key, plan)
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


def _say(listener: socket.socket, api_key: str | None, plan: CachePlan) -> None:
    """Where the server is, what it holds, and who may come in."""
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
