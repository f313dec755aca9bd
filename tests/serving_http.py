"""A server on loopback around a tiny model, for tests."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import torch
from openai import AsyncOpenAI, OpenAI

from latent_models import latent_model
from mlakit.serving.engine import Engine
from mlakit.serving.http.endpoints import Limits, Service
from mlakit.serving.http.server import Server, listen
from test_generation import SIZES, byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CYCLE = "😀世界é"
"""Characters of 4, 3, 3 and 2 bytes, no byte twice: so the last byte decides the next one."""


def tokenizer_with(template: str | None = TEMPLATE) -> Any:
    """A token per byte."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def small_model(context: int = 256, **changes: Any) -> Any:
    """Random weights: its texts are noise, in which every byte comes up."""
    return latent_model(**SIZES, max_position_embeddings=context, **changes)


def cycling_model(tokenizer: Any) -> Any:
    """A model that says CYCLE again and again once it has read one of its bytes."""
    model = small_model()
    ring = tokenizer(CYCLE)["input_ids"][1:]
    assert len(set(ring)) == len(ring) == 12
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        rows = torch.nn.functional.normalize(model.model.embed_tokens.weight, dim=-1)
        model.model.embed_tokens.weight.copy_(rows)
        model.lm_head.weight.zero_()
        for token, following in zip(ring, ring[1:] + ring[:1]):
            model.lm_head.weight[following] = 100 * rows[token]
    return model


class Running:
    """A server that runs, and its clients."""

    def __init__(self, server: Server, engine: Engine, key: str | None) -> None:
        self.server = server
        self.engine = engine
        self.url = f"http://127.0.0.1:{server.listener.getsockname()[1]}"
        self.key = key or "none"
        self.http = httpx.Client(base_url=self.url, timeout=60)

    @property
    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=60)

    @property
    def openai_async(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=120)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def refused(self, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
        """Status and error of a request that is not answered."""
        response = self.post(path, **body)
        assert set(response.json()) == {"error"}, response.text
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return response.status_code, error

    def figures(self) -> dict[str, float]:
        """What /metrics says now."""
        lines = self.http.get("/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def leave(self) -> None:
        """What the first signal does."""
        assert self.server._loop is not None
        self.server._loop.call_soon_threadsafe(self.server.leave, "test")


def wait_until(true: Callable[[], bool], seconds: float = 30) -> None:
    """Waits for what another thread brings about."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@contextmanager
def running(
    model: Any,
    tokenizer: Any,
    *,
    api_key: str | None = None,
    cors_origins: tuple[str, ...] = (),
    body: int = 2**20,
    drain_seconds: float = 30,
    **options: Any,
) -> Iterator[Running]:
    """A server on a free port; it has ended when the block has."""
    engine = Engine(model, tokenizer, **options)
    limits = Limits(engine.max_tokens, engine.max_waiting, body)
    server = Server(
        Service(engine, tokenizer, "tiny", limits),
        listen("127.0.0.1", 0),
        api_key=api_key,
        cors_origins=cors_origins,
        drain_seconds=drain_seconds,
    )
    engine.start()
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    wait_until(lambda: server.started)
    found = Running(server, engine, api_key)
    try:
        yield found
    finally:
        found.http.close()
        if thread.is_alive():
            found.leave()
        thread.join(60)
        assert not thread.is_alive()
