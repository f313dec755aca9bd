"""The verb: a checkpoint behind an OpenAI-compatible server."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlakit.errors import UsageError
from mlakit.serving.handover import Handover, hand_over
from mlakit.serving.options import ServeOptions
from mlakit.serving.plan import CachePlan, plan_cache

LOG = logging.getLogger("mlakit.serve")


def serve(
    model: str | Path,
    *,
    engine: str = "mlakit",
    engine_options: Sequence[str] = (),
    dry_run: bool = False,
    **options: Any,
) -> CachePlan | Handover | None:
    """Serves a converted checkpoint over HTTP until a signal ends it.

    Args:
        model: folder or hub id.
        engine: ``mlakit``, or ``vllm`` for vLLM's server in place of this one.
        engine_options: for ``vllm``: more of its own options.
        dry_run: only check the model and return what the cache holds, or vLLM's command.
        **options: fields of ``ServeOptions``, such as ``port`` and ``max_batch_size``.

    Returns:
        The cache's plan or vLLM's command for a dry run, else None.

    Raises:
        UsageError: an option makes no sense, or the model was not converted.
        MlakitError: the model or the address cannot be had, or requests were cut off at the end.
    """
    wishes = ServeOptions(**options)
    if engine == "vllm":
        command = hand_over(model, wishes, engine_options)
        if not dry_run:
            LOG.info("%s", command)
            command.run()
        return command
    if engine != "mlakit":
        raise UsageError(f"there is no engine '{engine}'", remedy="use mlakit or vllm")
    if engine_options:
        raise UsageError(
            f"{' '.join(engine_options)}: options after -- are for --engine vllm",
            remedy="leave them out",
        )
    if dry_run:
        return plan_cache(model, wishes)
    from mlakit.serving.http.run import run  # torch and the server, which vLLM's turn needs not

    run(model, wishes)
    return None
