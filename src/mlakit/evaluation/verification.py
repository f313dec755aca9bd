"""A quick check that a result does what its source does, in one pass and through its cache."""

from __future__ import annotations

from pathlib import Path

import torch

from mlakit.errors import UsageError
from mlakit.evaluation.memory import measure_memory, whole_pages
from mlakit.evaluation.quality import Windows, continuation_logits, cut_windows, kl_divergence
from mlakit.evaluation.subject import ModelLike, Subject, open_pair
from mlakit.nn.hf import attention_specs
from mlakit.reporting.schema import Difference, Verification

ROUNDING = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 0.06, "float16": 0.01}
"""Largest logit difference, over the largest logit, that rounding alone explains.

About 2^10 units in the last place of float32, where hundreds of roundings add up over tens of
layers; about ten units of bfloat16 and float16, whose products are summed in float32.
"""

PROMISES = {
    "own_cache": "through its cache the result computes what it computes in one pass",
    "one_pass": "in one pass the result equals the source",
    "through_cache": "through its cache the result equals the source",
}


def verify(
    source: ModelLike,
    result: ModelLike,
    *,
    max_kl: float | None = None,
    text: str | Path | None = None,
    windows: int = 2,
    dtype: torch.dtype | str | None = None,
    device: str = "cpu",
) -> Verification:
    """Checks a result against its source and raises when it breaks a promise.

    Same arguments as `check`.

    Raises:
        VerificationError: a promise was not kept; the message names each with its number.
    """
    found = check(
        source, result, max_kl=max_kl, text=text, windows=windows, dtype=dtype, device=device
    )
    found.require()
    return found


def check(
    source: ModelLike,
    result: ModelLike,
    *,
    max_kl: float | None = None,
    text: str | Path | None = None,
    windows: int = 2,
    dtype: torch.dtype | str | None = None,
    device: str = "cpu",
) -> Verification:
    """Compares logits of source and result, in one pass and through their caches.

    Promises checked: the result's cached logits equal its own one-pass logits to rounding; an
    equal-cache (or article) conversion equals its source to rounding; the mean KL is at most
    ``max_kl`` where that is given.

    Args:
        source: folder, hub id or (name, model, tokenizer).
        result: the model to check against it.
        max_kl: largest mean KL(source || result) allowed, nats per token.
        text: file, folder or dataset name; the package's own evaluation text by default.
        windows: how many windows of the text are read.
        dtype: dtype to load folders in; the checkpoints' own by default.
        device: device to load folders on.
    """
    if max_kl is not None and max_kl < 0:
        raise UsageError(f"a KL divergence is never below 0: max_kl={max_kl} cannot be met")
    ours, theirs = open_pair(source, result, dtype=dtype, device=device)
    if theirs is None:
        raise UsageError("verify needs a source and a result")
    cut = cut_windows(ours, theirs, text=text, count=windows)
    one_pass = _one_pass_logits(ours, cut), _one_pass_logits(theirs, cut)
    cached = _cached_logits(ours, cut), _cached_logits(theirs, cut)
    kl = torch.stack([kl_divergence(a, b) for a, b in zip(*cached, strict=True)])
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(*cached, strict=True)])
    memory = measure_memory(ours, theirs, length=whole_pages(cut.ids.shape[1] - 1))
    found = {
        "one_pass": _difference(*one_pass),
        "through_cache": _difference(*cached),
        "own_cache": _difference(one_pass[1], cached[1]),
    }
    tolerance = max(ROUNDING[s.dtype] for s in (ours, theirs))
    mean = float(kl.mean())
    judged = list(PROMISES) if _promises_equality(theirs) else ["own_cache"]
    promises, failures = _judge({name: found[name] for name in judged}, tolerance, mean, max_kl)
    return Verification(
        source=ours.name,
        result=theirs.name,
        **found,
        kl_mean=mean,
        kl_max=float(kl.max()),
        top1=float(same.double().mean()),
        source_bytes=memory.source.measured_bytes / memory.length,
        result_bytes=memory.result.measured_bytes / memory.length if memory.result else 0.0,
        tolerance=tolerance,
        tokens=kl.numel(),
        promises=promises,
        failures=failures,
    )


def _judge(
    found: dict[str, Difference], tolerance: float, mean_kl: float, max_kl: float | None
) -> tuple[list[str], list[str]]:
    """What was promised, and each promise that was not kept with its number.

    Compared as ``not x <= limit``, so that a NaN keeps no promise.
    """
    promises, failures = [], []
    for name, difference in found.items():
        promises.append(f"{PROMISES[name]} to rounding ({tolerance:g} of the largest logit)")
        if not difference.relative <= tolerance:
            failures.append(f"{promises[-1]}: off by {difference.relative:.2g}")
    if max_kl is not None:
        promises.append(f"mean KL at most {max_kl:g} nats per token")
        if not mean_kl <= max_kl:
            failures.append(f"{promises[-1]}: it is {mean_kl:.3g}")
    return promises, failures


def _promises_equality(subject: Subject) -> bool:
    forms = {spec.mla_form for spec in attention_specs(subject.model)}
    return forms <= {"equal-cache", "article"}


@torch.inference_mode()
def _one_pass_logits(subject: Subject, cut: Windows) -> list[torch.Tensor]:
    """Continuation logits [S, vocabulary] of each window, read in one call without a cache."""
    device = subject.model.device
    return [
        subject.model(input_ids=ids[None, :-1].to(device), use_cache=False).logits[
            0, cut.prefix_length :
        ]
        for ids in cut.ids
    ]


def _cached_logits(subject: Subject, cut: Windows) -> list[torch.Tensor]:
    """The same through the cache of the prefix."""
    return [continuation_logits(subject.model, ids[:-1], cut.prefix_length) for ids in cut.ids]


def _difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> Difference:
    pairs = list(zip(ours, theirs, strict=True))
    absolute = max(float((a.double() - b.double()).abs().max()) for a, b in pairs)
    largest = max(float(a.double().abs().max()) for a, _ in pairs)
    relative = absolute / largest if largest else absolute
    return Difference(absolute=absolute, relative=relative)
