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
from mlakit.serving.options import ServeOptions
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

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, secrets left out."""
        return {"command": list(self.arguments)}

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


def hand_over(model: str | Path, options: ServeOptions, extra: Sequence[str] = ()) -> Handover:
    """The command for vLLM; what is not given is left to vLLM, but not where it listens.

    Args:
        model: folder or hub id that vLLM loads.
        options: how it is served.
        extra: vLLM's own options, passed as they are.

    Raises:
        UsageError: an option has no counterpart.
    """
    for option, remedy in NO_COUNTERPART.items():
        if getattr(options, option) is not None:
            name = option.replace("_", "-")
            raise UsageError(f"--{name} has no counterpart in vLLM", remedy=remedy)
    memory, drain = options.cache_memory, options.drain_timeout
    if memory is not None and share_of(memory) is not None:
        raise UsageError(
            "a share of free memory has no counterpart in vLLM, which counts weights in its own",
            remedy="give bytes: --cache-memory 2GiB, or --gpu-memory-utilization after --",
        )
    origins = list(options.cors_origin)
    words: list[Any] = ["vllm", "serve", model]
    for option, value in (
        ("--host", options.host),
        ("--port", options.port),
        ("--served-model-name", options.called(model)),
        ("--max-num-seqs", options.max_batch_size),
        ("--kv-cache-memory-bytes", None if memory is None else parse_bytes(memory)),
        ("--max-model-len", options.max_tokens),
        ("--dtype", options.dtype),
        ("--chat-template", options.chat_template),
        ("--allowed-origins", json.dumps(origins) if origins else None),
        ("--shutdown-timeout", None if drain is None else round(drain)),
    ):
        words += [] if value is None else [option, value]
    environment = {} if options.key is None else {KEY: options.key}
    return Handover(tuple(map(str, (*words, *extra))), environment)
