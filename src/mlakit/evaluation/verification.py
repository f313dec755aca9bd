"""A quick check that a result does what its source does, in one pass and through its cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from mlakit.errors import UsageError
from mlakit.evaluation.memory import measure_cache, whole_pages
from mlakit.evaluation.quality import (
    TextLike,
    continuation_logits,
    cut_windows,
    kl_divergence,
    open_texts,
    token_nll,
)
from mlakit.evaluation.subject import ModelLike, Subject, open_pair
from mlakit.nn.hf import attention_specs, new_cache
from mlakit.reporting.verified import Difference, Verification

ROUNDING = {"float64": 1e-6, "float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}
"""Root mean square logit difference, over the logits' deviation, that rounding alone explains.

Conversions that are exact in real numbers measured 1e-6 in float32, 3e-3 in float16 and 2e-2 in
bfloat16 on five layers (10, 3 and 3 units in the last place); the rest is room for depth. In
float64 the weights are still those of a checkpoint, float32 at best.
"""

FLIPS = 0.5
"""Of what a quantised cache's rounding does to the logits, the share that two ways of computing may
differ by: where they differ in the last place, a cached number may go to the next step up or down.
Measured: 0.00001 to 0.16 in float32, int8 and int4; a wrong row is as large as all rounding."""

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
    text: TextLike = None,
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
    text: TextLike = None,
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
        text: one text or several, as `evaluate` takes them; the package's own by default.
        windows: how many windows of each text are read.
        dtype: dtype to load folders in; the checkpoints' own by default.
        device: device to load folders on.
    """
    if max_kl is not None and max_kl < 0:
        raise UsageError(f"a KL divergence is never below 0: max_kl={max_kl} cannot be met")
    open_texts(text)  # a text that cannot be read is refused before any weight is
    ours, theirs = open_pair(source, result, dtype=dtype, device=device)
    if theirs is None:
        raise UsageError("verify needs a source and a result")
    cut = cut_windows(ours, theirs, text=text, count=windows)
    compared = [_compare(ours, theirs, ids, cut.prefix_length) for ids in cut.ids]
    found = {name: _worst([window.differences[name] for window in compared]) for name in PROMISES}
    kl = torch.cat([window.kl for window in compared])
    length = whole_pages(cut.ids.shape[1] - 1)
    tolerance = max(ROUNDING[s.dtype] for s in (ours, theirs))
    limits = dict.fromkeys(PROMISES if _promises_equality(theirs) else ("own_cache",), tolerance)
    limits["own_cache"] = max(tolerance, FLIPS * max(window.rounding for window in compared))
    promises, failures = _judge(found, limits, float(kl.mean()), max_kl)
    return Verification(
        source=ours.name,
        result=theirs.name,
        **found,
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        top1=float(torch.cat([window.same_top1 for window in compared]).double().mean()),
        source_bytes=measure_cache(ours, length).measured_bytes / length,
        result_bytes=measure_cache(theirs, length).measured_bytes / length,
        tolerance=tolerance,
        tokens=len(kl),
        domains=_by_domain(cut.domains, compared),
        promises=promises,
        failures=failures,
    )


def _by_domain(names: tuple[str, ...], found: list[_Compared]) -> dict[str, tuple[float, float]]:
    """Mean KL and source loss of each text where there are several."""
    if len(set(names)) == 1:
        return {}
    windows = {name: [w for n, w in zip(names, found, strict=True) if n == name] for name in names}
    return {
        name: (
            float(torch.cat([window.kl for window in several]).mean()),
            float(torch.cat([window.loss for window in several]).mean()),
        )
        for name, several in windows.items()
    }


class _Compared(NamedTuple):
    """One window: differences by the names of `PROMISES`, and what a quantised cache changes.

    Then [S] each: KL, equal top tokens, and the source's loss.
    """

    differences: dict[str, Difference]
    rounding: float
    kl: torch.Tensor
    same_top1: torch.Tensor
    loss: torch.Tensor


@torch.inference_mode()
def _compare(source: Subject, result: Subject, ids: torch.Tensor, prefix_length: int) -> _Compared:
    ids, targets = ids[:-1], ids[prefix_length + 1 :]
    kept = len(ids) - prefix_length
    one_pass = [_one_pass(subject.model, ids, kept) for subject in (source, result)]
    cached = [
        continuation_logits(subject.model, ids, prefix_length).double().cpu()
        for subject in (source, result)
    ]
    rounding = 0.0
    if _rounds(result.model):
        plain = _one_pass(result.model, ids, kept, through_cache=False)
        rounding = _difference(plain, one_pass[1]).rms
    differences = {
        "own_cache": _difference(one_pass[1], cached[1]),
        "one_pass": _difference(*one_pass),
        "through_cache": _difference(*cached),
    }
    same_top1 = cached[0].argmax(-1) == cached[1].argmax(-1)
    kl, loss = kl_divergence(*cached), token_nll(cached[0], targets)
    return _Compared(differences, rounding, kl, same_top1, loss)


def _rounds(model: Any) -> bool:
    return getattr(model.config, "cache_format", None) is not None


def _one_pass(
    model: Any, ids: torch.Tensor, kept: int, *, through_cache: bool | None = None
) -> torch.Tensor:
    """The last ``kept`` logits of a window read in one call, float64.

    Through a cache where that is quantised: it rounds what a prompt is read through.
    """
    rounds = _rounds(model) if through_cache is None else through_cache
    output = model(
        input_ids=ids[None].to(model.device),
        past_key_values=new_cache(model, 1, len(ids)) if rounds else None,
        use_cache=rounds,
        logits_to_keep=kept,
    )
    return output.logits[0].double().cpu()


def _difference(reference: torch.Tensor, other: torch.Tensor) -> Difference:
    gap = reference - other
    return Difference(
        absolute=float(gap.abs().max()),
        relative=float(gap.abs().max() / reference.abs().max()),
        rms=float(gap.square().mean().sqrt() / reference.std()),
    )


def _worst(differences: list[Difference]) -> Difference:
    """The largest of each number; a NaN is the worst of all."""
    rows = [[d.absolute, d.relative, d.rms] for d in differences]
    absolute, relative, rms = torch.tensor(rows, dtype=torch.float64).amax(0).tolist()
    return Difference(absolute=absolute, relative=relative, rms=rms)


def _judge(
    found: dict[str, Difference], limits: dict[str, float], mean_kl: float, max_kl: float | None
) -> tuple[list[str], list[str]]:
    """What was promised, and each promise that was not kept with its number.

    Compared as ``not x <= limit``, so that a NaN keeps no promise.
    """
    promises, failures = [], []
    for name, limit in limits.items():
        promises.append(f"{PROMISES[name]} to rounding (rms at most {limit:.2g})")
        if not found[name].rms <= limit:
            failures.append(f"{promises[-1]}: it is {found[name].rms:.2g}")
    if max_kl is not None:
        promises.append(f"mean KL at most {max_kl:g} nats per token")
        if not mean_kl <= max_kl:
            failures.append(f"{promises[-1]}: it is {mean_kl:.3g}")
    return promises, failures


def _promises_equality(subject: Subject) -> bool:
    forms = {spec.mla_form for spec in attention_specs(subject.model)}
    healed = (getattr(subject.model.config, "mlakit", None) or {}).get("healed")
    if healed and healed["steps"]:  # training makes it another function, on purpose
        return False
    return forms <= {"equal-cache", "article"}
