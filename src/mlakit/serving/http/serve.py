"""The verb: a checkpoint behind an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import torch

from mlakit.account import ITEMSIZE, parse_bytes
from mlakit.errors import MlakitError, UsageError
from mlakit.evaluation import open_subject
from mlakit.nn.hf import attention_specs
from mlakit.serving.engine import Engine
from mlakit.serving.handover import Handover, hand_over
from mlakit.serving.http.endpoints import Limits, Service
from mlakit.serving.http.reading import use_chat_template
from mlakit.serving.http.server import Server, listen
from mlakit.serving.plan import CachePlan, page_bytes, plan_cache, pool_bytes
from mlakit.spec import CacheKind

LOG = logging.getLogger("mlakit.serve")

KEY = "MLAKIT_API_KEY"
"""Environment variable with the API key."""

MAX_BATCH_SIZE, MAX_WAITING, MAX_BODY, DRAIN_TIMEOUT = 32, 256, "4MiB", 30.0


def serve(
    model: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    name: str | None = None,
    max_batch_size: int | None = None,
    cache_memory: str | None = None,
    max_tokens: int | None = None,
    max_waiting: int | None = None,
    max_body: str | None = None,
    cache_format: CacheKind | None = None,
    dtype: str | None = None,
    device: str | None = None,
    chat_template: str | Path | None = None,
    cors_origin: Sequence[str] = (),
    drain_timeout: float | None = None,
    engine: str = "mlakit",
    engine_options: Sequence[str] = (),
    dry_run: bool = False,
) -> CachePlan | Handover | None:
    """Serves a converted checkpoint over HTTP until a signal ends it.

    Args:
        model: folder or hub id.
        host: address to listen on.
        port: to listen on; 0 takes a free one.
        api_key: that ``/v1`` asks for; the environment's MLAKIT_API_KEY by default.
        name: that requests call the model by; the folder's by default.
        max_batch_size: most sequences that are written at once; 32 by default.
        cache_memory: for the pages: ``2GiB``, or a share of the free memory, ``0.5`` or ``50%``;
            by default enough for ``max_batch_size`` sequences of full length, or 80 % of the free
            memory if that is less.
        max_tokens: most tokens of a prompt and its continuation; the model's context by default.
        max_waiting: most sequences that wait; 256 by default.
        max_body: most bytes of a request's body; ``4MiB`` by default.
        cache_format: ``fp8``, ``int8`` or ``int4`` quantise the latents.
        dtype: ``float32``, ``bfloat16``, ``float16``; the checkpoint's own by default.
        device: ``cpu``, ``cuda`` ...; a GPU if there is one by default.
        chat_template: file with a Jinja template in place of the tokenizer's.
        cors_origin: sites whose pages may use the server from a browser.
        drain_timeout: seconds that accepted requests have to end after SIGTERM; 30 by default.
        engine: ``mlakit``, or ``vllm`` for vLLM's server in place of this one.
        engine_options: for ``vllm``: more of its own options.
        dry_run: only check the model and return what the cache holds, or vLLM's command.

    Returns:
        The cache's plan or vLLM's command for a dry run, else None.

    Raises:
        UsageError: an option makes no sense, or the model was not converted.
        MlakitError: the model or the address cannot be had, or requests were cut off at the end.
    """
    name = name or Path(model).name
    api_key = api_key or os.environ.get(KEY) or None
    if engine == "vllm":
        return _vllm(
            hand_over(
                model,
                host=host,
                port=port,
                api_key=api_key,
                name=name,
                max_batch_size=max_batch_size,
                cache_memory=cache_memory,
                max_tokens=max_tokens,
                max_waiting=max_waiting,
                max_body=max_body,
                cache_format=cache_format,
                dtype=dtype,
                device=device,
                chat_template=chat_template,
                cors_origin=cors_origin,
                drain_timeout=drain_timeout,
                extra=engine_options,
            ),
            dry_run,
        )
    if engine != "mlakit":
        raise UsageError(f"there is no engine '{engine}'", remedy="use mlakit or vllm")
    if engine_options:
        raise UsageError(
            f"{' '.join(engine_options)}: options after -- are for --engine vllm",
            remedy="leave them out",
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    batch = max_batch_size or MAX_BATCH_SIZE
    if dry_run:
        return plan_cache(
            model,
            name=name,
            max_batch_size=batch,
            cache_memory=cache_memory,
            max_tokens=max_tokens,
            cache_format=cache_format,
            dtype=dtype,
            device=device,
        )
    listener = listen(host, port)  # before the model is loaded, which may take minutes
    body = parse_bytes(max_body or MAX_BODY)
    subject = open_subject(model, dtype=dtype, device=device, cache_format=cache_format)
    if chat_template is not None:
        use_chat_template(subject.tokenizer, chat_template)
    running = Engine(
        subject.model,
        subject.tokenizer,
        max_batch_size=batch,
        cache_bytes=pool_bytes(cache_memory, device),
        max_tokens_per_request=max_tokens,
        max_waiting=max_waiting or MAX_WAITING,
    )
    limits = Limits(tokens=running.max_tokens, waiting=running.max_waiting, body=body)
    _say(listener, api_key, _plan(running, name, batch))
    _run(
        Server(
            Service(running, subject.tokenizer, name, limits),
            listener,
            api_key=api_key,
            cors_origins=tuple(cors_origin),
            drain_seconds=DRAIN_TIMEOUT if drain_timeout is None else drain_timeout,
        ),
        running,
    )
    return None


def _vllm(command: Handover, dry_run: bool) -> Handover:
    """The command of a dry run; else does not come back."""
    if not dry_run:
        LOG.info("%s", command)
        command.run()
    return command


def _plan(engine: Engine, name: str, max_batch_size: int) -> CachePlan:
    """What the engine's pool holds."""
    model, stats = engine.model, engine.stats()
    weights = sum(tensor.nbytes for tensor in model.parameters())
    itemsize = ITEMSIZE[str(model.dtype).removeprefix("torch.")]
    page = page_bytes(attention_specs(model), itemsize)
    return CachePlan.of(name, weights, page, stats.pages_total, engine.max_tokens, max_batch_size)


def _say(listener: socket.socket, api_key: str | None, plan: CachePlan) -> None:
    """Where the server is, what it holds, and who may come in."""
    address, port = listener.getsockname()[:2]
    LOG.info(
        "%s: %s tokens of cache in %d pages, %d requests of %s tokens fit",
        plan.model, f"{plan.tokens:,}", plan.pages, plan.requests, f"{plan.request_tokens:,}",
    )  # fmt: skip
    shown = f"[{address}]" if ":" in address else address
    LOG.info("listening on http://%s:%d (Ctrl-C ends it)", shown, port)
    if api_key is None and not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        LOG.warning(
            "WARNING: anybody who reaches %s can use this model: there is no API key. Set %s,"
            " or listen on 127.0.0.1",
            address,
            KEY,
        )


def _run(server: Server, engine: Engine) -> None:
    engine.start()
    try:
        asyncio.run(server.serve())
    finally:
        engine.stop()
    if server.cut_off:
        raise MlakitError(
            f"{server.cut_off} sequences were cut off at the end",
            remedy="give them more time with --drain-timeout",
        )
    LOG.info("stopped; every accepted request was answered")
