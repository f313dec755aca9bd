"""One function per verb, with the same argument names as the command line.

Verbs that live in one room are found there on first use; those that combine rooms are here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlakit.benching import bench
    from mlakit.comparison import compare
    from mlakit.conversion.apply import convert
    from mlakit.engines.export import export
    from mlakit.evaluation import evaluate, verify
    from mlakit.generation import GenerationResult
    from mlakit.healing.run import heal
    from mlakit.inspection import inspect
    from mlakit.nn.hf import load, register
    from mlakit.nn.journey import LayerJourney
    from mlakit.nn.trace import track_shapes
    from mlakit.serving.http.serve import serve
    from mlakit.spec import CacheKind
    from mlakit.theorem import prove

__all__ = [
    "bench",
    "compare",
    "convert",
    "doctor",
    "evaluate",
    "export",
    "generate",
    "heal",
    "inspect",
    "load",
    "prove",
    "register",
    "serve",
    "trace",
    "track_shapes",
    "verify",
]

HOMES = {
    "bench": "mlakit.benching",
    "compare": "mlakit.comparison",
    "convert": "mlakit.conversion.apply",
    "evaluate": "mlakit.evaluation",
    "export": "mlakit.engines.export",
    "heal": "mlakit.healing.run",
    "inspect": "mlakit.inspection",
    "load": "mlakit.nn.hf",
    "prove": "mlakit.theorem",
    "register": "mlakit.nn.hf",
    "serve": "mlakit.serving.http.serve",
    "track_shapes": "mlakit.nn.trace",
    "verify": "mlakit.evaluation",
}


def __getattr__(name: str) -> Any:
    """A verb from its home room."""
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    raise AttributeError(f"module 'mlakit.api' has no attribute {name!r}")


def generate(
    model: str | Path,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: Sequence[str] = (),
    seed: int = 0,
    batch_size: int | None = None,
    chat: bool = False,
    dtype: str | None = None,
    device: str = "cpu",
    cache_format: CacheKind | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> GenerationResult:
    """Text from a checkpoint, converted or ordinary: folder in, text out.

    Args:
        model: folder or hub id.
        prompts: one prompt or several; each is continued as if it were alone.
        max_new_tokens: most tokens written per prompt.
        temperature: 0 for the most likely token, else the logits are divided by it.
        top_p: samples from the most likely tokens that reach this probability.
        top_k: samples from this many tokens; 0 for all.
        stop: strings that end a text and are not part of it.
        seed: seed of the sampling.
        batch_size: prompts at a time; all together by default.
        chat: wrap each prompt in the tokenizer's chat template as one user message.
        dtype: ``float32``, ``bfloat16``, ``float16``; the checkpoint's own by default.
        device: ``cpu``, ``cuda`` ...
        cache_format: ``fp8``, ``int8`` or ``int4`` quantise the latents of a converted model.
        on_text: called with a prompt's index and the next piece of its text.

    Raises:
        MlakitError: the checkpoint cannot be loaded.
        UsageError: an option makes no sense, or a prompt does not fit the context.
    """
    from mlakit.evaluation import open_subject
    from mlakit.generation import generate as write

    subject = open_subject(model, dtype=dtype, device=device, cache_format=cache_format)
    return write(
        subject.model,
        subject.tokenizer,
        [prompts] if isinstance(prompts, str) else prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop=stop,
        seed=seed,
        batch_size=batch_size,
        chat=chat,
        on_text=on_text,
    )


def trace(
    model: str | Path | None = None,
    text: str = "Once upon a time",
    *,
    heads: bool = False,
    dtype: str | None = None,
    device: str = "cpu",
) -> tuple[list[LayerJourney], list[str]]:
    """Every tensor that a text goes through in the attention layers, then one token more.

    Args:
        model: folder or hub id; the lesson's layer by default, 128 → 4 × 32 → 128.
        text: what the model reads.
        heads: keep what every head looked at, ``LayerJourney.weights``.
        dtype: ``float32``, ``bfloat16``, ``float16``; the checkpoint's own by default.
        device: ``cpu``, ``cuda`` ...

    Returns:
        One journey per layer for the text, then one per layer for the token; the text's tokens.

    Raises:
        UsageError: the text holds no token.
        MlakitError: the checkpoint cannot be loaded.
    """
    from mlakit.errors import UsageError
    from mlakit.nn.trace import trace_example, trace_model

    if model is None:
        return trace_example(keep_weights=heads).journeys, [f"token {k}" for k in range(6)]
    from mlakit.evaluation import open_subject

    subject = open_subject(model, dtype=dtype, device=device)
    token_ids = subject.tokenizer(text)["input_ids"]
    if not token_ids:
        raise UsageError("--text holds no token", remedy='--text "Once upon a time"')
    tracker = trace_model(subject.model, token_ids, keep_weights=heads)
    return tracker.journeys, [str(subject.tokenizer.decode([token])) for token in token_ids]


def doctor() -> dict[str, str]:
    """What is installed here and which decode implementation would run, with the reason."""
    import os
    import platform
    from importlib import metadata

    import torch

    from mlakit.errors import UsageError
    from mlakit.ops.choose import choose, deepseek_call

    findings = {"python": platform.python_version(), "platform": platform.platform()}
    for package in (
        "mlakit",
        "torch",
        "transformers",
        "triton",
        "flash_mla",
        "datasets",
        "lm_eval",
    ):
        try:
            findings[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            findings[package] = "not installed"
    findings["cpu threads"] = str(torch.get_num_threads())
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        findings[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        try:
            choice = choose(deepseek_call(device), os.environ.get("MLAKIT_KERNEL"))
            findings[f"decode on {device}"] = f"{choice.name} ({choice.reason})"
        except UsageError as error:
            findings[f"decode on {device}"] = f"refused: {error.message}"
    return findings
