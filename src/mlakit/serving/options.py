"""What a server is told when it is started; light enough for every way to start one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlakit.errors import UsageError
from mlakit.spec import CacheKind

KEY = "MLAKIT_API_KEY"
"""Environment variable with the API key."""

DEFAULTS: dict[str, Any] = {
    "max_batch_size": 32,
    "max_waiting": 256,
    "max_body": "4MiB",
    "drain_timeout": 30.0,
}
"""Of our own engine; for another one, what is not given is left to it."""

SHARE_OF_MEMORY = 0.8
"""Of the memory that is free beside the weights, what the pages take at most by default."""


@dataclass(frozen=True)
class ServeOptions:
    """How a checkpoint is served.

    Attributes:
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
        cors_origin: sites whose pages may use the server from a browser; ``*`` for all.
        drain_timeout: seconds that accepted requests have to end after SIGTERM; 30 by default.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    name: str | None = None
    max_batch_size: int | None = None
    cache_memory: str | None = None
    max_tokens: int | None = None
    max_waiting: int | None = None
    max_body: str | None = None
    cache_format: CacheKind | None = None
    dtype: str | None = None
    device: str | None = None
    chat_template: str | Path | None = None
    cors_origin: Sequence[str] = ()
    drain_timeout: float | None = None

    @property
    def key(self) -> str | None:
        """The API key, from here or from the environment; an empty variable is none.

        Raises:
            UsageError: the one from here is blank, as an unset variable of a shell is, or the
                environment's is only spaces: nobody may believe in a lock that is not there.
        """
        key = os.environ.get(KEY) or None if self.api_key is None else self.api_key
        if key is not None and not key.strip():
            raise UsageError("the API key is blank", remedy="give one, or none for an open server")
        return key

    def called(self, model: str | Path) -> str:
        """What requests call the model."""
        last = Path(model).name
        return self.name or (Path(model).resolve().name if last in ("", "..") else last)
