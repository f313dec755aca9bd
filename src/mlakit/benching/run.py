"""``bench decode``: settings into shapes, shapes into figures, figures into files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import torch

from mlakit.benching.clock import Clock, measure_ceilings
from mlakit.benching.contenders import RIVALS
from mlakit.benching.environment import environment
from mlakit.benching.problem import Shape
from mlakit.benching.published import PUBLISHED
from mlakit.benching.result import Bench
from mlakit.benching.roofline import roofline
from mlakit.benching.sweep import (
    Progress,
    default_batch,
    default_rounds,
    run_sweep,
    standard_sweeps,
)
from mlakit.errors import UsageError
from mlakit.ops.cache_format import QUANTISED
from mlakit.ops.choose import FILES
from mlakit.reporting.files import write_file
from mlakit.reporting.style import as_png

DTYPES = ("bfloat16", "float16", "float32")
CUSTOM_HEADS, CUSTOM_QUERIES = (128,), (1,)


def bench(
    what: str = "decode",
    *,
    device: str | None = None,
    heads: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    batch: int | None = None,
    queries: Sequence[int] | None = None,
    varlen: bool | None = None,
    dtype: str = "bfloat16",
    page_size: int = 64,
    kv_lora_rank: int = 512,
    qk_rope_head_dim: int = 64,
    rope_scores: bool = False,
    cache_format: str | None = None,
    kernel: Sequence[str] | None = None,
    rivals: bool = True,
    quick: bool = False,
    seed: int = 0,
    output: str | Path | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> Bench:
    """Times the decode operator beside the machine's ceilings and every rival installed.

    Without ``heads``, ``lengths``, ``queries`` and ``varlen``: the two standard sweeps. With any of
    them: every combination of what is given, at 128 heads, one length, 1 query, fixed lengths for
    what is not. Each contender is first compared with float64 on the very tensors, and a wrong one
    is not timed.

    Args:
        what: ``decode``, the only thing there is so far.
        device: ``cpu``, ``cuda`` ...; by default a GPU if there is one.
        heads: query head counts.
        lengths: cached tokens per sequence.
        batch: sequences; 128 on a GPU, 4 on a CPU by default.
        queries: new tokens per sequence.
        varlen: ragged lengths, as FlashMLA's tests draw them.
        dtype: ``bfloat16``, ``float16`` or ``float32``.
        page_size: tokens per page.
        kv_lora_rank: columns of a cache row that are its value.
        qk_rope_head_dim: columns beside them.
        rope_scores: scores over those columns only, as in the equal-cache mode.
        cache_format: ``bf16``, ``fp16`` or ``fp32``, which must be the dtype's own, or ``fp8``,
            ``model1``, ``int8``, ``int4``.
        kernel: our implementations; by default those that are for this device.
        rivals: measure other people's kernels too.
        quick: two small shapes and few runs, to see that it works.
        seed: of lengths and numbers.
        output: folder for ``bench.json`` and ``roofline.png``.
        command: what was typed, for the record.
        progress: told about every shape.

    Raises:
        UsageError: an option makes no sense.
        MlakitError: the folder cannot be written.
    """
    if what != "decode":
        raise UsageError(f"There is no benchmark named {what!r}", remedy="mlakit bench decode")
    place = _device(device)
    on_cuda = place.type == "cuda"
    names = _kernels(kernel, on_cuda)
    base: dict[str, Any] = {
        "batch": default_batch(on_cuda, quick) if batch is None else batch,
        "dtype": dtype,
        "page_size": page_size,
        "kv_lora_rank": kv_lora_rank,
        "qk_rope_head_dim": qk_rope_head_dim,
        "rope_scores": rope_scores,
        "cache_format": _format(cache_format, dtype),
        "seed": seed,
    }
    cases = _cases(heads, lengths, queries, varlen, on_cuda, quick)
    _check(base, cases)
    shapes = [
        Shape(heads=h, length=length, queries=s, varlen=ragged, **base)
        for h, length, s, ragged in cases
    ]
    rounds = default_rounds(on_cuda, quick)
    found = []
    with torch.cuda.device(place) if on_cuda else nullcontext():
        clock, where = Clock(place), environment(place.index or 0)
        ceilings = measure_ceilings(clock, dtype, quick)
        others = RIVALS if rivals else {}
        for result in run_sweep(shapes, names, clock, ceilings, rounds, rivals=others):
            found.append(result)
            if progress:
                progress("shapes", len(found), len(shapes))
    done = Bench(
        settings={"what": what, "command": command, "device": str(place), "kernels": list(names),
                  "rounds": rounds, "quick": quick, **base},
        environment=where,
        ceilings=ceilings,
        shapes=tuple(found),
        published=PUBLISHED if on_cuda else (),
        notes=_notes(base["batch"], rounds, on_cuda),
    )  # fmt: skip
    if output is not None:
        write_bench(done, output)
    return done


def write_bench(done: Bench, folder: str | Path) -> None:
    """Writes ``roofline.png`` and, last, ``bench.json``; both are made before either is written."""
    text = json.dumps(done.as_dict(), indent=1) + "\n"
    picture = as_png(roofline(done))
    write_file(Path(folder) / "roofline.png", picture)
    write_file(Path(folder) / "bench.json", text.encode())


def _device(device: str | None) -> torch.device:
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"{name!r} is no device", remedy="use cpu, cuda or cuda:1") from error
    if place.type not in ("cpu", "cuda"):
        raise UsageError(f"There are no clocks for {place.type}", remedy="use cpu or cuda")
    if place.type == "cuda" and not (
        torch.cuda.is_available() and (place.index or 0) < torch.cuda.device_count()
    ):
        raise UsageError(f"torch sees no device {name}", remedy="use --device cpu")
    return place


def _kernels(kernel: Sequence[str] | None, on_cuda: bool) -> tuple[str, ...]:
    """Names asked for, or those made for the device; whether they can run is found out later."""
    if kernel:
        for name in kernel:
            if name not in FILES:
                raise UsageError(
                    f"There is no kernel named {name!r}", remedy=f"use one of {', '.join(FILES)}"
                )
        return tuple(dict.fromkeys(kernel))
    wanted = ("gluon", "triton") if on_cuda else ("cpu", "torch")
    return tuple(name for name in wanted if name in FILES)


def _format(cache_format: str | None, dtype: str) -> str:
    """The quantised format's name, or nothing for plain numbers."""
    if dtype not in DTYPES:
        raise UsageError(f"{dtype!r} is no dtype to measure", remedy=f"use {', '.join(DTYPES)}")
    plain = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[dtype]
    if cache_format is None or cache_format == plain:
        return ""
    if cache_format not in QUANTISED:
        raise UsageError(
            f"{cache_format!r} is no cache format for queries in {dtype}",
            remedy=f"use {plain}, {', '.join(QUANTISED)}",
        )
    return cache_format


def _cases(
    heads: Sequence[int] | None,
    lengths: Sequence[int] | None,
    queries: Sequence[int] | None,
    varlen: bool | None,
    on_cuda: bool,
    quick: bool,
) -> list[tuple[int, int, int, bool]]:
    if not heads and not lengths and not queries and varlen is None:
        return standard_sweeps(on_cuda, quick)
    middle = (256 if quick else 4096 if on_cuda else 2048,)
    axes = (heads or CUSTOM_HEADS, lengths or middle, queries or CUSTOM_QUERIES)
    return [(h, length, s, bool(varlen)) for h, s, length in product(axes[0], axes[2], axes[1])]


def _check(base: dict[str, Any], cases: list[tuple[int, int, int, bool]]) -> None:
    sizes = {name: base[name] for name in ("batch", "page_size", "kv_lora_rank")}
    for index, name in enumerate(("heads", "lengths", "queries")):
        sizes[name] = min(int(case[index]) for case in cases)
    for name, size in sizes.items():
        if size < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {size}; it should be at least 1")
    least = 1 if base["rope_scores"] else 0
    if base["qk_rope_head_dim"] < least:
        raise UsageError(
            f"--qk-rope-head-dim is {base['qk_rope_head_dim']}; it should be at least {least}"
        )
    for _, length, queries, _ in cases:
        if length < queries:
            raise UsageError(
                f"{queries} new tokens do not fit in a length of {length}",
                remedy="the new tokens are part of the length",
            )


def _notes(batch: int, rounds: int, on_cuda: bool) -> tuple[str, ...]:
    counted = "FLOP = 2 B S H mean(T) (W + C), bytes = queries + cache rows + outputs, once each"
    if on_cuda:
        timed = (
            f"medians of up to {rounds} runs in turn, L2 cache overwritten between them; whole "
            "call by device events; kernels: TFLOPS by the device time of all kernels of a call, "
            "planning and combine included; main: of the longest kernel alone, as FlashMLA's tests "
            "count; rivals' schedules are made beforehand, ours is part of the call"
        )
    else:
        timed = (
            f"batch {batch}; medians of up to {rounds} runs in turn, wall clock, caches not "
            "flushed; the roof is a matrix product that takes its turn among them"
        )
    return (counted, timed)
