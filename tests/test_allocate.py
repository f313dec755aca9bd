"""Sizes from predicted loss: the best division, the search, and what a conversion makes of them."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mlakit
from mlakit.checkpoint import open_checkpoint
from mlakit.conversion.allocate import (
    CLEARLY,
    SEARCH_ROUNDS,
    Losses,
    all_sizes,
    next_size,
    sizes_at,
    some_of,
)
from mlakit.conversion.apply import convert
from mlakit.conversion.card import size_words
from mlakit.conversion.goal import Goal
from mlakit.errors import UsageError
from mlakit.families import read_model
from mlakit.inspection import inspect
from mlakit.nn.hf import cache_nbytes, load, new_cache
from tiny_models import LETTERS, TEXT, save_tiny

IDS = torch.tensor(
    [[2 + (i * i + 7 * i) % len(LETTERS) for i in range(row, row + 20)] for row in (0, 9)]
)

descending = st.lists(st.floats(0, 9), min_size=6, max_size=6).map(
    lambda values: tuple(sorted(values, reverse=True))
)


def losses(*axes: tuple[float, ...], full: int = 8, rope: int = 2) -> Losses:
    return Losses((0.5,) * len(axes), axes, rope, full)


@settings(max_examples=60, deadline=None)
@given(axes=st.lists(descending, min_size=1, max_size=3), mean=st.integers(1, 6))
def test_no_division_loses_less(axes: list[tuple[float, ...]], mean: int) -> None:
    found = losses(*axes)
    total = mean * len(axes)
    ranks = found.measured(total)
    assert sum(ranks) == total
    every = itertools.product(range(1, 7), repeat=len(axes))
    best = min(found.predicted(r) for r in every if sum(r) <= total)
    assert found.predicted(ranks) == pytest.approx(best, abs=1e-9)


def test_ranks_of_large_layers_are_multiples_of_16() -> None:
    steep = tuple(2.0**-i for i in range(224))
    flat = tuple(0.1 for _ in range(224))
    ranks = losses(steep, flat, full=256, rope=32).measured(2 * 100)
    assert ranks == (16, 176)  # 200 numbers hold twelve whole steps
    assert losses(steep, flat, full=256, rope=8).measured(2 * 248) == (248, 248)
    found = losses(steep, flat, full=256, rope=32)
    assert all_sizes([found], measured=False, allowed=None, own=32)[-1].ranks == (224, 224)
    narrow = sizes_at([found], 32 + 7, measured=True, own=32)
    assert narrow[0].ranks == (7, 7)  # no more cache than was asked for


def test_a_curve_falls_and_has_a_dozen_points() -> None:
    found = losses(*(tuple(1.0 / (i + 1) for i in range(60)) for _ in range(3)), full=64, rope=4)
    points = some_of(all_sizes([found], measured=True, allowed=None, own=4))
    assert len(points) == 12
    kl = [point.predicted_kl for point in points]
    assert kl == sorted(kl, reverse=True)
    assert points[-1].cache_ratio == 1
    assert kl[-1] == pytest.approx(1.5)  # the dropped rotations
    engine = all_sizes([found], measured=False, allowed=[8, 28], own=4)
    assert [point.ranks for point in engine] == [(8, 8, 8), (28, 28, 28)]


@settings(max_examples=60, deadline=None)
@given(
    axes=st.lists(st.lists(descending, min_size=2, max_size=2), min_size=1, max_size=3),
    dropped=st.lists(st.floats(0, 5), min_size=3, max_size=3),
    measured=st.booleans(),
)
def test_of_several_rotary_widths_the_best_is_taken(
    axes: list[list[tuple[float, ...]]], dropped: list[float], measured: bool
) -> None:
    """No width loses clearly less, and by none but the source's own is the best one passed over."""
    every = [
        Losses((dropped[i],) * 2, tuple(layers), rope, 8)
        for i, (rope, layers) in enumerate(zip((2, 4, 6), axes))
    ]
    sizes = all_sizes(every, measured, None, own=4)
    assert sizes[-1].cache_ratio == 1
    for width, size in zip(range(3, 9), sizes, strict=True):
        each = [losses.at(width, measured) for losses in every]
        fitting = [point for point in each if point is not None]
        least = min(point.predicted_kl for point in fitting)
        assert size.predicted_kl <= (least * CLEARLY if size.rope_dim == 4 else least)
        own = [point for point in fitting if point.rope_dim == 4]
        assert not own or size.predicted_kl <= own[0].predicted_kl
        assert size == sizes_at(every, width, measured, own=4)[0] and size in fitting
        assert sum(size.ranks) + 2 * size.rope_dim <= 2 * width
    kl = [size.predicted_kl for size in sizes]
    assert all(later <= CLEARLY * earlier + 1e-9 for earlier, later in itertools.pairwise(kl))


@settings(max_examples=200, deadline=None)
@given(
    predicted=st.lists(st.floats(1e-3, 5), min_size=1, max_size=60),
    tilt=st.floats(-2, 2),
    scale=st.floats(0.1, 5),
    limit=st.floats(1e-3, 5),
)
def test_search_ends_within_the_limit(
    predicted: list[float], tilt: float, scale: float, limit: float
) -> None:
    predicted.sort(reverse=True)
    count, tried = len(predicted), []
    truth = [value * scale * math.exp(tilt * i / count) for i, value in enumerate(predicted)]
    truth = [min(truth[: i + 1]) for i in range(count)]
    while (index := next_size(predicted, tried, limit)) is not None:
        tried.append((index, truth[index]))
        assert len(tried) <= SEARCH_ROUNDS
    index, found = tried[-1]
    within = [i for i in range(count) if truth[i] <= limit]
    if not within:
        assert index == count - 1 and found > limit
    else:
        assert found <= limit


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("allocate")
    (folder / "text.txt").write_text(TEXT)
    return save_tiny(folder / "tiny", num_hidden_layers=3)


def converted(tiny: Path, out: Path, **goal: Any) -> Any:
    options = {"refine_steps": 0, "calibration": tiny.parent / "text.txt", **goal}
    return convert(tiny, out, **options)


def test_layers_of_their_own_ranks(tiny: Path, tmp_path: Path) -> None:
    """One pass, step by step through a cache, and from disk: the same logits; all bytes counted."""
    plan = converted(tiny, tmp_path / "out", cache_ratio=0.5, ranks="measured")
    assert len(set(plan.ranks)) > 1
    assert sum(plan.ranks) <= 3 * 8
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["kv_lora_ranks"] == plan.ranks
    assert config["kv_lora_rank"] == max(plan.ranks)
    spec = read_model(config)
    assert [layer.kv_lora_rank for layer in spec.layers] == plan.ranks
    shapes = open_checkpoint(tmp_path / "out").shapes
    assert {tensor.name: tensor.shape for tensor in plan.tensors} == dict(shapes)
    model = load(tmp_path / "out")
    with torch.no_grad():
        whole = model(input_ids=IDS).logits
        cache = new_cache(model, 2, 64)
        parts = [
            model(input_ids=ids, past_key_values=cache, use_cache=True).logits
            for ids in (IDS[:, :7], IDS[:, 7:8], IDS[:, 8:])
        ]
    # float32 in another order of sums, logits up to 4.5; measured 6e-6
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=5e-5)
    per_token = sum(layer.cache_width for layer in spec.layers) * 4
    assert cache_nbytes(cache) == 2 * 64 * per_token
    assert plan.cache_bytes == per_token
    assert inspect(tmp_path / "out").variants[0].cache_bytes_per_token == per_token
    model.save_pretrained(tmp_path / "again")
    for path in (tmp_path / "out").glob("tokenizer*"):
        shutil.copy(path, tmp_path / "again")
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "again")(input_ids=IDS).logits, whole)
    texts = [
        mlakit.generate(tmp_path / path, ["abc"], max_new_tokens=5).texts
        for path in ("out", "again")
    ]
    assert texts[0] == texts[1] and texts[0][0]


def test_who_gets_ranks_of_their_own() -> None:
    assert Goal(cache_ratio=0.5).layer_ranks
    assert not Goal(cache_ratio=0.5, ranks="even").layer_ranks
    assert not Goal(kv_lora_rank=8).layer_ranks
    assert Goal(kv_lora_rank=8, ranks="measured").layer_ranks
    assert not Goal(cache_ratio=0.5, method="transmla").layer_ranks
    assert not Goal(cache_ratio=0.5, without=("downstream",)).layer_ranks
    assert not Goal(cache_ratio=0.5, engine="transformers").layer_ranks
    with pytest.raises(UsageError, match="one rank for all layers"):
        Goal(cache_ratio=0.5, engine="transformers", ranks="measured")
    with pytest.raises(UsageError, match="what each layer's errors do"):
        Goal(max_kl=0.1, without=("metric",))
    with pytest.raises(UsageError, match="what each layer's errors do"):
        Goal(max_kl=0.1, method="transmla")
    with pytest.raises(UsageError, match="once"):
        Goal(max_kl=0.1, cache_ratio=0.5)
    with pytest.raises(UsageError, match="above 0"):
        Goal(max_kl=0.0)


@pytest.mark.parametrize("ranks", ["even", "measured"])
def test_a_loss_that_is_asked_for_is_met(tiny: Path, tmp_path: Path, ranks: str) -> None:
    largest = converted(tiny, tmp_path / "full", cache_ratio=0.9, ranks=ranks)
    smallest = converted(tiny, tmp_path / "least", kv_lora_rank=1)
    limit = math.sqrt(largest.measured["held_out_kl"] * smallest.measured["held_out_kl"])
    plan = converted(tiny, tmp_path / "out", max_kl=limit, ranks=ranks)
    assert plan.measured["held_out_kl"] <= limit
    assert plan.cache_ratio < 1
    assert len(plan.measured["search"]) <= SEARCH_ROUNDS
    assert plan.measured["search"][-1] == (plan.cache_ratio, plan.measured["held_out_kl"])
    above = [kl for ratio, kl in plan.measured["search"] if ratio < plan.cache_ratio]
    assert all(kl > limit for kl in above)
    again = converted(tiny, tmp_path / "out", max_kl=limit, ranks=ranks)
    assert again.ranks == plan.ranks and again.cache_bytes == plan.cache_bytes
    other = converted(tiny, tmp_path / "same", cache_ratio=plan.cache_ratio, ranks=ranks)
    for shard in range(1, 5):
        name = f"model-{shard:05d}-of-00004.safetensors"
        first, second = (tmp_path / f / name for f in ("out", "same"))
        assert other.ranks != plan.ranks or first.read_bytes() == second.read_bytes()


def test_a_loss_out_of_reach_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be met") as refusal:
        converted(tiny, tmp_path / "out", max_kl=1e-9, qk_rope_head_dim=8)
    assert "--max-kl" in str(refusal.value.remedy) and "--equal-cache" in str(refusal.value.remedy)
    assert not list((tmp_path / "out").iterdir())
    nearest = float(str(refusal.value.remedy).split("--max-kl ")[1].split()[0])
    plan = converted(tiny, tmp_path / "out", max_kl=nearest, qk_rope_head_dim=8)
    assert plan.measured["held_out_kl"] <= nearest
    exact = converted(tiny, tmp_path / "exact", max_kl=1e-9)  # with all rotations kept
    assert exact.target.qk_rope_head_dim == 16 and exact.measured["held_out_kl"] <= 1e-9


class Killed(Exception):
    pass


@pytest.mark.parametrize("goal", [{"max_kl": 0.5, "refine_steps": 2}, {"cache_ratio": 0.5}])
def test_a_run_killed_in_any_phase_ends_in_the_same_bits(
    tiny: Path, tmp_path: Path, goal: dict[str, Any]
) -> None:
    """Killed whenever it reports: during the pass down, survey, layers, judging and search."""
    stages: list[str] = []
    whole = converted(
        tiny, tmp_path / "whole", **goal, progress=lambda stage, done, of: stages.append(stage)
    )
    assert {"sensitivity", "survey", "convert", "judge"} <= set(stages)
    killed = []
    for limit in range(1, len(stages) + 2):
        left = limit

        def kill(stage: str, done: int, of: int) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                killed.append(stage)
                raise Killed

        try:
            converted(tiny, tmp_path / "cut", **goal, progress=kill)
            break
        except Killed:
            continue
    assert {"sensitivity", "survey", "convert", "judge"} <= set(killed)
    plan = converted(tiny, tmp_path / "cut", **goal)
    assert plan.ranks == whole.ranks
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_plan_says_what_is_open(tiny: Path) -> None:
    plan = convert(tiny, "", max_kl=0.3, dry_run=True, calibration=tiny.parent / "text.txt")
    assert plan.open and "smallest within 0.3 nats" in size_words(plan)
    assert "rope 2, 4, 8 or 16, by calibration" in size_words(plan)
    assert not any("full rank" in warning for warning in plan.warnings)
