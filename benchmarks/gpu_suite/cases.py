"""Which cases there are: the matrices of FlashMLA's tests, and what ours can do beyond them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, product

import torch
from benchmarks.gpu_suite import trials
from benchmarks.gpu_suite.trials import Trial

HEADS = (1, 3, 9, 63, 64, 126, 128)
SPARSE_SIZES = (
    (512, 64, 2), (512, 64, 64), (512, 64, 69), (1024, 576, 2), (1024, 576, 61),
    (2046, 2048, 2), (2046, 2048, 64), (2046, 2048, 576),
)  # fmt: skip
PREFILL_SIZES = (
    (592, 128), (1840, 256), (1592, 384), (1521, 512), (95, 128), (153, 256), (8192, 2048),
    (16384, 8192),
)  # fmt: skip
FEATURES = ((), ("topk_length",), ("sink",), ("topk_length", "sink", "extra"))
RANKS = ((256, 64), (256, 32), (128, 16), (512, 0), (448, 128), (96, 32))

SHARES = {"features": 0.12, "dense": 0.48, "quantised": 0.12, "sparse": 0.18, "prefill": 0.10}
"""Of the time given; what a group does not use goes to the next."""


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        group: a key of ``SHARES``.
        label: what it is, in words.
        make: builds it.
    """

    group: str
    label: str
    make: Callable[[], Trial]


def cases(device: str, quick: bool) -> dict[str, list[Case]]:
    """Every case by group, each group in one fixed random order.

    The order makes whatever time allows an even sample of the whole.
    """
    found: dict[str, list[Case]] = {}
    for make in (_features, _dense, _quantised, _sparse, _prefill):
        for case in make(device, quick):
            found.setdefault(case.group, []).append(case)
    for group, several in found.items():
        if group != "features":
            random.Random(group).shuffle(several)
    return found


def _dense(device: str, quick: bool) -> Iterator[Case]:
    batches, queries, lengths = (1, 2, 6, 64), (1, 2, 4), (20, 140, 4096)
    heads, groups = HEADS, (1, 2, 3, 8)
    if quick:
        batches, queries, lengths, heads, groups = (1, 3), (1, 2), (20, 140), (1, 9, 16), (1, 3)
    axes = product(
        (torch.bfloat16, torch.float16), batches, queries, lengths, heads, groups,
        (False, True), (False, True),
    )  # fmt: skip
    for dtype, b, s, length, h, g, varlen, causal in axes:
        if h % g:
            continue
        label = f"{_name(dtype)} b{b} s{s} L{length} h{h}/{g} varlen={varlen} causal={causal}"
        sizes = trials.lengths_of(b, length, s, varlen)
        yield Case("dense", label, partial(_dense_case, sizes, s, h, g, dtype, causal, device))
    for dtype, causal in product((torch.bfloat16, torch.float16), (False, True)):
        b, length, h = (8, 100, 16) if quick else (128, 4096, 128)
        sizes = [
            n if i % 2 else 0 for i, n in enumerate(trials.lengths_of(b, length, 2, varlen=True))
        ]
        label = f"{_name(dtype)} b{b} s2 L{length} h{h}/1 half empty causal={causal}"
        yield Case("dense", label, partial(_dense_case, sizes, 2, h, 1, dtype, causal, device))


def _dense_case(
    lengths: list[int], s: int, h: int, g: int, dtype: torch.dtype, causal: bool, device: str
) -> Trial:
    tensors = trials.dense_tensors(lengths, s, h, kv_heads=g, dtype=dtype, device=device)
    return trials.dense_trial(tensors, 512, causal)


def _features(device: str, quick: bool) -> Iterator[Case]:
    """What FlashMLA does not have; and graphs, compilation, batch invariance."""
    add = partial(Case, "features")
    if device == "cuda":
        yield add("CUDA graph replayed with other lengths", partial(trials.graph_trial, device))
    yield add("torch.compile(fullgraph=True)", partial(trials.compile_trial, device))
    yield add("batch invariant", partial(trials.alone_trial, device))
    yield add("ragged queries", partial(trials.packed_trial, device))
    for window, cap in ((64, None), (1, None), (None, 5.0), (100, 30.0)):
        options = {"sliding_window": window, "soft_cap": cap}
        yield add(f"window {window}, soft cap {cap}", partial(_wide_case, device, **options))
    for rank, rope in RANKS[: 2 if quick else None]:
        yield add(f"rank {rank} + {rope}", partial(_wide_case, device, rank, rope))
    yield add("1024 + 1024, rope scores", partial(_wide_case, device, 1024, 1024, width=1024))
    for page in (16, 32, 128, 1):
        yield add(f"pages of {page}", partial(_wide_case, device, page=page))
    yield add("float32", partial(_wide_case, device, dtype=torch.float32))


def _wide_case(
    device: str,
    rank: int = 512,
    rope: int = 64,
    *,
    width: int | None = None,
    page: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    **options: float | None,
) -> Trial:
    row = rank + rope
    tensors = trials.dense_tensors(
        [300, 0, 1, 1025, 64], 2, 16, row=row, width=width or row, page_size=page, dtype=dtype,
        device=device,
    )  # fmt: skip
    return trials.dense_trial(tensors, rank, True, **options)


def _quantised(device: str, quick: bool) -> Iterator[Case]:
    axes = product(
        ("fp8", "model1", "int8", "int4"), (1, 6), (1, 2), (20, 140, 1024), (1, 16, 64, 128),
        (False, True),
    )  # fmt: skip
    for kind, b, s, length, h, varlen in axes:
        if quick and (b, length, h) != (6, 140, 16):
            continue
        label = f"{kind} b{b} s{s} L{length} h{h} varlen={varlen}"
        make = partial(trials.quantised_trial, kind, b, s, length, h, varlen, device)
        yield Case("quantised", label, make)


def _sparse(device: str, quick: bool) -> Iterator[Case]:
    """FlashMLA's own matrix, and what only ours reads at a smaller one."""
    theirs = product(("fp8", "model1"), (64, 128), SPARSE_SIZES, (4, 74, 321), (1, 3), FEATURES)
    beyond = product(
        ("bf16", "int8", "int4", "fp8"), (1, 16, 48), SPARSE_SIZES[1::3], (4,), (1, 3), FEATURES
    )
    for kind, h, sizes, b, s, features in chain(theirs, beyond):
        if quick and (sizes, h, s) != (SPARSE_SIZES[1], 16, 1):
            continue
        label = f"{kind} h{h} L{sizes[0]} topk{sizes[1]} page{sizes[2]} b{b} s{s} {[*features]}"
        make = partial(trials.sparse_trial, kind, h, sizes, b, s, features, device)
        yield Case("sparse", label, make)


def _prefill(device: str, quick: bool) -> Iterator[Case]:
    for h, s, (tokens, topk), features in product(
        (64, 128), (1, 62, 213), PREFILL_SIZES, ((), ("topk_length",), ("sink",))
    ):
        if quick and (h, s, tokens) != (64, 1, 95):
            continue
        label = f"h{h} s{s} L{tokens} topk{topk} {[*features]}"
        make = partial(trials.prefill_trial, h, s, tokens, topk, features, device)
        yield Case("prefill", label, make)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
