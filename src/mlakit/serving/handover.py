"""``--engine vllm``: the same options in vLLM's words, and its server in our place."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mlakit.account import parse_bytes
from mlakit.errors import MlakitError, UsageError
from mlakit.serving.plan import share_of

KEY = "VLLM_API_KEY"
"""Where vLLM looks for the key, so that it stands on no command line."""

NO_COUNTERPART = {
    "max_waiting": "pass vLLM's own --max-num-queued-reqs after --, which counts running ones too",
    "max_body": "limit it in a proxy before vLLM",
    "cache_format": "pass vLLM's own --kv-cache-dtype after --: its formats are not these",
    "device": "vLLM was built for one kind of device; CUDA_VISIBLE_DEVICES chooses among them",
}
"""Options that vLLM has no word for, with what to do instead."""


@dataclass(frozen=True)
class Handover:
    """A command that serves the model with vLLM.

    Attributes:
        arguments: ``vllm serve ...``.
        environment: variables that it needs beside those of this process; secrets.
    """

    arguments: tuple[str, ...]
    environment: dict[str, str]

    def __str__(self) -> str:
        """The command, secrets left out."""
        return shlex.join(self.arguments)

    def run(self) -> NoReturn:
        """Becomes vLLM.

        Raises:
            MlakitError: it is not installed.
        """
        beside = Path(sys.executable).with_name("vllm")
        program = str(beside) if beside.is_file() else shutil.which("vllm")
        if program is None:
            raise MlakitError(
                "vLLM is not installed beside mlakit",
                remedy="pip install vllm (on a machine with a GPU), or serve without --engine vllm",
            )
        sys.stdout.flush()
        sys.stderr.flush()
        os.execvpe(program, [program, *self.arguments[1:]], os.environ | self.environment)


def hand_over(
    model: str | Path,
    *,
    host: str,
    port: int,
    api_key: str | None = None,
    name: str,
    max_batch_size: int | None = None,
    cache_memory: str | None = None,
    max_tokens: int | None = None,
    dtype: str | None = None,
    chat_template: str | Path | None = None,
    cors_origin: Sequence[str] = (),
    drain_timeout: float | None = None,
    extra: Sequence[str] = (),
    **others: Any,
) -> Handover:
    """The command for vLLM.

    Args:
        model: folder or hub id that vLLM loads.
        host: as of ``serve``, like all that follow; None leaves the choice to vLLM.
        port: likewise.
        api_key: likewise.
        name: likewise.
        max_batch_size: likewise.
        cache_memory: likewise, in bytes.
        max_tokens: likewise.
        dtype: likewise.
        chat_template: likewise.
        cors_origin: likewise.
        drain_timeout: likewise.
        extra: vLLM's own options, passed as they are.
        **others: options that vLLM has no word for; none may have a value.

    Raises:
        UsageError: an option has no counterpart.
    """
    for option, value in others.items():
        if value is not None:
            raise UsageError(
                f"--{option.replace('_', '-')} has no counterpart in vLLM",
                remedy=NO_COUNTERPART[option],
            )
    if cache_memory is not None and share_of(cache_memory) is not None:
        raise UsageError(
            "a share of free memory has no counterpart in vLLM, which counts weights in its own",
            remedy="give bytes: --cache-memory 2GiB, or --gpu-memory-utilization after --",
        )
    words: list[Any] = ["vllm", "serve", model, "--host", host, "--port", port]
    words += ["--served-model-name", name]
    for option, value in (
        ("--max-num-seqs", max_batch_size),
        ("--kv-cache-memory-bytes", None if cache_memory is None else parse_bytes(cache_memory)),
        ("--max-model-len", max_tokens),
        ("--dtype", dtype),
        ("--chat-template", chat_template),
        ("--allowed-origins", json.dumps(list(cors_origin)) if cors_origin else None),
        ("--shutdown-timeout", None if drain_timeout is None else round(drain_timeout)),
    ):
        words += [] if value is None else [option, value]
    environment = {} if api_key is None else {KEY: api_key}
    return Handover(tuple(map(str, (*words, *extra))), environment)
