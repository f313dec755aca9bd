"""Goals become sizes or refusals that help; a plan is complete before any weight is read."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlakit.checkpoint import open_checkpoint
from mlakit.conversion.budget import target_layer
from mlakit.conversion.domains import plan_texts
from mlakit.conversion.goal import Goal
from mlakit.conversion.plan import make_plan
from mlakit.conversion.rotary_sizes import (
    SCALE_FREE_ROPE,
    freqfold_candidates,
    freqfold_choices,
    open_sizes,
)
from mlakit.data import named_sources
from mlakit.errors import MlakitError, UsageError
from mlakit.families import read_model
from mlakit.spec import AttentionSpec, RopeSpec
from tiny_models import TEXT, save_tiny

SOURCE = AttentionSpec(
    hidden_size=512,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    softmax_scale=0.125,
    rope=RopeSpec(theta=10000.0, dim=64),
)
PUBLISHED = {"method": "transmla"}
FULL = 2 * 2 * 64  # numbers the source caches per token


@pytest.mark.parametrize(
    "goal,rank,rope",
    [
        (Goal(cache_ratio=0.5, qk_rope_head_dim=64), 64, 64),
        (Goal(cache_ratio=0.5, engine="llama.cpp", without=("metric",)), 64, 64),
        (Goal(cache_ratio=0.5, qk_rope_head_dim=32), 96, 32),
        (Goal(cache_ratio=1.0, qk_rope_head_dim=64), 192, 64),
        (Goal(cache_ratio=0.3, **PUBLISHED), 12, 64),
        (Goal(kv_lora_rank=1), 1, 64),
        (Goal(kv_lora_rank=192), 192, 64),
        (Goal(kv_lora_rank=16, qk_rope_head_dim=2, method="transmla", freqfold=32), 16, 2),
        (Goal(kv_lora_rank=8, qk_rope_head_dim=46), 8, 46),
        (Goal(kv_lora_rank=128, qk_rope_head_dim=128), 128, 128),
        (Goal(equal_cache=True), 128, 128),
        (Goal(equal_cache=True, form="article"), 256, 64),
    ],
)
def test_goals_that_can_be_met(goal: Goal, rank: int, rope: int) -> None:
    target = target_layer(SOURCE, goal)
    assert open_sizes(SOURCE, goal) == () and not target.query_up
    assert (target.kv_lora_rank, target.qk_rope_head_dim) == (rank, rope)
    assert target.kind == "mla" and target.softmax_scale == SOURCE.softmax_scale
    assert target.rope is not None and target.rope.width == (rope if goal.form != "article" else 64)
    if goal.equal_cache:
        assert target.cache_width == SOURCE.cache_width
    if goal.cache_ratio is not None:
        assert goal.cache_ratio * FULL - 1 < target.cache_width <= goal.cache_ratio * FULL


@pytest.mark.parametrize(
    "options,message",
    [
        ({"cache_ratio": 0.2, **PUBLISHED}, "keeps 51 of 256"),
        ({"cache_ratio": 0.2, "qk_rope_head_dim": 64}, "keeps 51 of 256"),
        ({"cache_ratio": 0.001}, "keeps 0 of 256"),
        ({"cache_ratio": 0.008}, "keeps 2 of 256"),
        ({"cache_ratio": 1.5}, "not between 0 and 1"),
        ({"cache_ratio": 0.0}, "not between 0 and 1"),
        ({"cache_ratio": 0.5, "qk_rope_head_dim": 48, **PUBLISHED}, "divide the head size 64"),
        ({"cache_ratio": 0.5, "qk_rope_head_dim": 1}, "must be even"),
        ({"kv_lora_rank": 8, "qk_rope_head_dim": 130}, "at most 128"),
        ({"cache_ratio": 0.5, "qk_rope_head_dim": 128, **PUBLISHED}, "divide the head size 64"),
        ({"kv_lora_rank": 193}, "not between 1 and 192"),
        ({"kv_lora_rank": 0}, "not between 1 and 192"),
        ({"cache_ratio": 0.5, "freqfold": 3, **PUBLISHED}, "--freqfold 3"),
        (
            {"cache_ratio": 0.5, "qk_rope_head_dim": 16, "freqfold": 2, **PUBLISHED},
            "--freqfold 2",
        ),
    ],
)
def test_goals_that_cannot_be_met_name_some_that_can(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        target_layer(SOURCE, Goal(**options))
    for wish in re.findall(r"--[a-z-]+ [\d.]+(?: --[a-z-]+ [\d.]+)*", caught.value.remedy):
        pairs = re.findall(r"--([a-z-]+) ([\d.]+)", wish)
        offered = {
            name.replace("-", "_"): float(value) if "ratio" in name else int(value)
            for name, value in pairs
        }
        target_layer(SOURCE, Goal(**offered, method=options.get("method", "mlakit")))
    for size in re.findall(r"nearest are (\d+) and (\d+)", caught.value.remedy):
        key = "freqfold" if "freqfold" in message else "qk_rope_head_dim"
        for value in size:
            target_layer(SOURCE, Goal(**{**options, key: int(value)}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qk_rope_head_dim": 32},
        {"cache_ratio": 0.5, "kv_lora_rank": 64},
        {"equal_cache": True, "cache_ratio": 0.5},
        {"equal_cache": True, "freqfold": 2},
        {"cache_ratio": 0.5, "form": "article"},
        {"equal_cache": True, "form": "other"},
        {"cache_ratio": 0.5, "method": "other"},
        {"cache_ratio": 0.5, "freqfold": 2},
        {"cache_ratio": 0.5, "without": ("wings",)},
        {"cache_ratio": 0.5, "without": ("phase",), **PUBLISHED},
        {"equal_cache": True, "without": ("phase",)},
    ],
)
def test_goals_that_say_too_little_or_too_much(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Goal(**options)


@given(st.floats(0.001, 1.0), st.sampled_from([2, 4, 8, 16, 32, 64]))
def test_any_ratio_is_met_from_below_or_refused(ratio: float, rope_dim: int) -> None:
    goal = Goal(cache_ratio=ratio, qk_rope_head_dim=rope_dim)
    try:
        target = target_layer(SOURCE, goal)
    except UsageError:
        assert ratio * FULL < rope_dim + 1
    else:
        assert ratio * FULL - 1 < target.cache_width <= ratio * FULL + 1e-6


@pytest.mark.parametrize(
    "shape,goal,expected",
    [
        ((8, 128), {"cache_ratio": 0.5}, (128, 256, 384, 512)),
        ((8, 128), {"cache_ratio": 0.5, "cache_bits": "auto"}, (128, 256, 384, 512, 640, 768)),
        ((8, 128), {"cache_ratio": 0.125}, (64, 128)),
        ((8, 128), {"cache_ratio": 1.0}, (128, 512, 768, 1024)),
        ((8, 128), {"max_kl": 0.1}, (128, 256, 512, 1024)),
        ((8, 128), {"cache_ratio": 0.5, "engine": "transformers"}, (128, 256)),
        ((8, 128), {"cache_ratio": 0.5, "engine": "vllm"}, ()),
        ((8, 128), {"cache_ratio": 0.5, "method": "transmla"}, ()),
        ((8, 128), {"cache_ratio": 0.5, "without": ("downstream",)}, ()),
        ((8, 128), {"kv_lora_rank": 512}, ()),
        ((2, 64), {"cache_ratio": 0.25}, (16, 24, 32)),  # a head's own leaves no room
        ((1, 64), {"cache_ratio": 0.75}, (24, 32, 64)),
    ],
)
def test_rotary_widths_to_choose_from(
    shape: tuple[int, int], goal: dict[str, Any], expected: tuple[int, ...]
) -> None:
    groups, dim = shape
    source = replace(SOURCE, num_key_value_heads=groups, head_dim=dim, rope=RopeSpec(1e4, dim))
    assert open_sizes(source, Goal(**goal)) == expected
    if expected and "cache_bits" not in goal:
        found = [target_layer(source, Goal(**goal, qk_rope_head_dim=size)) for size in expected]
        assert len({layer.cache_width for layer in found}) == 1
        planned = target_layer(source, Goal(**goal))
        assert planned.query_up == ("engine" not in goal)
        assert planned.cache_width == found[0].cache_width


@given(
    st.floats(0.001, 1.0),
    st.sampled_from([1, 2, 3, 8, 32]),
    st.sampled_from([4, 6, 10, 64, 128]),
    st.booleans(),
    st.sampled_from(["mlakit", "transformers"]),
)
def test_rotary_widths_leave_room_and_include_the_heads_own(
    ratio: float, groups: int, dim: int, partial: bool, engine: str
) -> None:
    turning = dim // 4 * 2 if partial else dim
    rope = RopeSpec(1e4, turning)
    source = replace(SOURCE, num_key_value_heads=groups, head_dim=dim, rope=rope)
    for goal in (Goal(cache_ratio=ratio, engine=engine), Goal(max_kl=0.1, engine=engine)):
        found = open_sizes(source, goal)
        full = source.cache_width
        width = full if goal.max_kl else int(ratio * full + 1e-9)
        assert len(found) <= 5 and list(found) == sorted(set(found))
        assert bool(found) == (width > 2)
        for size in found:
            assert size % 2 == 0 and 2 <= size < width
            assert size <= max(width // 2, turning) or size == 2
            assert size <= turning * (groups if engine == "mlakit" else 2)
            target_layer(source, replace(goal, qk_rope_head_dim=size))
        assert (turning in found) == (turning < width)


def test_freqfold_choices() -> None:
    assert freqfold_choices(64, 64) == [1, 2, 4, 8, 16, 32]
    assert freqfold_choices(96, 32) == [3, 6, 12, 24, 48]
    assert freqfold_candidates(96, 32) == [3, 6, 12, 24, 48]
    assert freqfold_candidates(12, 12) == [1, 2]
    assert freqfold_candidates(64, 2) == [32]


@pytest.mark.parametrize("rope_type", ["default", "linear", "llama3", "yarn"])
def test_kept_frequencies_are_the_schedule_of_the_smaller_dimension(rope_type: str) -> None:
    """What every c-th source frequency is, the result's own rotary embedding computes."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {
        "default": {},
        "linear": {"factor": 4.0},
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.0},
    }[rope_type]

    def frequencies(dim: int) -> torch.Tensor:
        rope = {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}
        config = LlamaConfig(head_dim=dim, rope_parameters=rope, max_position_embeddings=256)
        return LlamaRotaryEmbedding(config).inv_freq

    whole = frequencies(64)
    nests = all(
        torch.allclose(frequencies(dim), whole[:: 64 // dim], rtol=1e-6) for dim in (2, 16, 32)
    )
    assert nests == (rope_type in SCALE_FREE_ROPE)
    source = replace(SOURCE, rope=replace(SOURCE.rope, rope_type=rope_type))
    if nests:
        target_layer(source, Goal(cache_ratio=0.5, qk_rope_head_dim=32, **PUBLISHED))
    else:
        target_layer(source, Goal(cache_ratio=0.5, **PUBLISHED))
        with pytest.raises(UsageError, match="only all 64"):
            target_layer(source, Goal(cache_ratio=0.5, qk_rope_head_dim=32, **PUBLISHED))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def test_the_hash_covers_what_the_result_depends_on(tiny: Path, text: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    goal = Goal(cache_ratio=0.5)
    plan = make_plan(checkpoint, goal, calibration=text)
    assert plan.hash == make_plan(open_checkpoint(str(tiny)), goal, calibration=text).hash
    moved = tmp_path / "moved.txt"
    moved.write_text(TEXT)
    assert plan.hash == make_plan(checkpoint, goal, calibration=moved).hash
    assert plan.hash == make_plan(checkpoint, goal, calibration=text, dtype="float32").hash
    moved.write_text(TEXT + "x")
    others = [
        make_plan(checkpoint, goal, calibration=moved),
        make_plan(checkpoint, goal, calibration=text, seed=1),
        make_plan(checkpoint, goal, calibration=text, calibration_tokens=1000),
        make_plan(checkpoint, goal, calibration=text, dtype="bfloat16"),
        make_plan(checkpoint, replace(goal, method="transmla"), calibration=text),
        make_plan(checkpoint, replace(goal, without=("phase",)), calibration=text),
        make_plan(checkpoint, Goal(equal_cache=True)),
    ]
    assert len({plan.hash, *(other.hash for other in others)}) == 8
    other = open_checkpoint(save_tiny(tmp_path / "other", num_attention_heads=8))
    assert make_plan(other, goal, calibration=text).hash != plan.hash


def test_every_rotary_width_that_is_allowed_has_a_plan(tiny: Path, text: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    for rope_dim in (2, 6, 10, 16):  # a head has 8, both together 16
        goal = Goal(kv_lora_rank=4, qk_rope_head_dim=rope_dim)
        assert make_plan(checkpoint, goal, calibration=text).target.cache_width == 4 + rope_dim


def test_a_plan_is_plain_json_with_every_byte(tiny: Path, text: Path) -> None:
    plan = make_plan(open_checkpoint(tiny), Goal(cache_ratio=0.5), calibration=text)
    written = json.loads(json.dumps(plan.as_dict("planned")))
    assert written["status"] == "planned" and written["hash"] == plan.hash
    assert sum(tensor["nbytes"] for tensor in written["tensors"]) == plan.nbytes
    assert plan.estimate.disk_bytes > plan.nbytes and plan.estimate.memory_bytes > 0
    assert plan.cache_ratio == 0.5
    assert str(tiny.parent) not in json.dumps(written)  # no paths of this machine


@pytest.mark.parametrize("bits", [16, 8])
def test_dtypes_change_bytes_but_no_ratio(tiny: Path, text: Path, bits: Any) -> None:
    """Both caches are counted in the result's dtype, as the source too would run in it."""
    checkpoint, goal = open_checkpoint(tiny), Goal(cache_ratio=0.5, cache_bits=bits)
    plans = [
        make_plan(checkpoint, goal, calibration=text, dtype=dtype)
        for dtype in ("float32", "bfloat16")
    ]
    assert plans[0].source_cache_bytes == 2 * plans[1].source_cache_bytes
    for plan in plans:
        assert plan.cache_ratio <= 0.5
        assert plan.cache_ratio == plan.cache_bytes / plan.source_cache_bytes
        if bits == 16:
            assert plan.target.cache_width * 2 == plan.source_layer.cache_width
    with pytest.raises(UsageError, match="float8"):
        make_plan(checkpoint, Goal(equal_cache=True), dtype="float8")


def test_warnings_say_what_disappoints(tiny: Path, text: Path, tmp_path: Path) -> None:
    def warnings(folder: Path, goal: Goal) -> str:
        given = None if goal.equal_cache else text
        return " ".join(make_plan(open_checkpoint(folder), goal, calibration=given).warnings)

    assert "full rank saves no cache" in warnings(tiny, Goal(cache_ratio=1.0))
    assert "no multiple of 16" in warnings(tiny, Goal(kv_lora_rank=5))
    assert "little to gain" in warnings(tiny, Goal(kv_lora_rank=16))
    mha = save_tiny(tmp_path / "mha", num_key_value_heads=4, dtype=torch.bfloat16)
    assert "plain multi-head" in warnings(mha, Goal(kv_lora_rank=16))
    assert "above the hidden size" in warnings(mha, Goal(kv_lora_rank=40))
    assert "rounding of bfloat16" in warnings(mha, Goal(equal_cache=True))


def test_calibration_that_is_no_use(tiny: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(MlakitError, match="empty"):
        make_plan(checkpoint, Goal(cache_ratio=0.5), calibration=empty)
    with pytest.raises(UsageError, match="too few"):
        make_plan(checkpoint, Goal(cache_ratio=0.5), calibration=empty, calibration_tokens=3)


def test_windows_are_as_long_as_context_and_text_allow(
    tiny: Path, text: Path, tmp_path: Path
) -> None:
    long = tmp_path / "long.txt"
    long.write_text("a word " * 40_000)
    config = json.loads((tiny / "config.json").read_text())
    known = replace(read_model(config), max_position_embeddings=10_000)

    def window(*places: str, tokens: int = 32768, given: int | None = None) -> int:
        return plan_texts(known, named_sources(places), (), tokens, 0, given).window

    assert window(str(long)) == 2048
    assert window(str(text)) == 512
    assert window(str(long), f"again={long}", "own=self") == 32768 // 3 // 8
    assert window(f"{text}", str(long)) == 512
    assert window(str(long), given=4096) == 4096
    assert window(str(long), tokens=800) == 400
    assert window(str(long), tokens=800, given=100) == 100
    short = replace(known, max_position_embeddings=128)
    assert plan_texts(short, named_sources(str(long)), (), 32768, 0).window == 128


@pytest.mark.parametrize("options", [{"equal_cache": True}, {"cache_ratio": 0.5}])
def test_a_dry_run_imports_no_torch(
    tiny: Path, text: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    if "equal_cache" not in options:
        options = {**options, "calibration": str(text)}
    program = (
        "import sys\n"
        "from mlakit.conversion.apply import convert\n"
        f"plan = convert({str(tiny)!r}, {str(tmp_path / 'out')!r}, dry_run=True,"
        f" **{options!r})\n"
        "print(plan.hash, sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.endswith(" []\n"), done.stderr
    assert not (tmp_path / "out").exists()
