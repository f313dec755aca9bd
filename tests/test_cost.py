"""What a plan says it needs: sums of what is held, times that follow the work. No times here."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlakit.checkpoint import open_checkpoint
from mlakit.conversion.cost import machine, operations
from mlakit.conversion.cost.dimensions import Dimensions, dimensions
from mlakit.conversion.cost.memory import LIBRARIES, footprint, peak
from mlakit.conversion.goal import Goal
from mlakit.conversion.plan import ConversionPlan, make_plan
from mlakit.families import read_model
from tiny_models import save_tiny


def planned(folder: Path, tokens: int = 4096, **goal: Any) -> ConversionPlan:
    goal.setdefault("cache_ratio", 0.5)
    texts = {} if goal.get("equal_cache") else {"calibration_tokens": tokens}
    return make_plan(open_checkpoint(folder), Goal(**goal), **texts)


def sizes(folder: Path, **goal: Any) -> Dimensions:
    model = read_model(open_checkpoint(folder).config)
    return dimensions(planned(folder, **goal), model, "cpu")


def test_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    shallow, deep = (
        planned(save_tiny(tmp_path / str(layers), num_hidden_layers=layers)).estimate
        for layers in (2, 8)
    )
    assert deep.memory_bytes == shallow.memory_bytes > LIBRARIES
    assert deep.disk_bytes > shallow.disk_bytes


def test_the_peak_is_the_largest_sum_of_named_parts(tmp_path: Path) -> None:
    size = sizes(save_tiny(tmp_path))
    phases = footprint(size, survey=True, sensed=True, refined=True)
    assert set(phases) == {"write", "moments", "judge", "choose", "sensitivity", "refine"}
    assert peak(phases) == max(sum(parts.values()) for parts in phases.values())
    assert all(value >= 0 for parts in phases.values() for value in parts.values())
    fewer = footprint(size, survey=True, sensed=False, refined=False)
    assert set(phases) - set(fewer) == {"sensitivity", "refine"}
    assert all(phases[name] == fewer[name] for name in fewer)


def test_many_words_cost_little(tmp_path: Path) -> None:
    """The vocabulary is looked at in slices of so many logits."""
    size = replace(sizes(save_tiny(tmp_path)), window=2048, tokens=8192, vocabulary=2**13)
    few, many = (
        footprint(replace(size, vocabulary=count), survey=True, sensed=True, refined=True)
        for count in (2**13, 2**17)
    )
    assert few == many


def test_stored_matrices_are_no_memory_of_ours(tmp_path: Path) -> None:
    size = replace(sizes(save_tiny(tmp_path)), stored=False)
    for name, parts in footprint(size, survey=True, sensed=True, refined=True).items():
        if "layer" in parts:
            assert parts["layer"] == 4 * (size.source + size.block), name
    stored = footprint(replace(size, stored=True), survey=True, sensed=True, refined=True)
    assert not any(parts.get("layer") for parts in stored.values())


def test_dimensions_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    size = sizes(save_tiny(tmp_path, "mixtral", num_local_experts=4, num_experts_per_tok=2))
    assert (size.hidden, size.heads, size.groups, size.head) == (32, 4, 2, 8)
    assert size.source == 2 * 32 * 32 + 2 * 32 * 16 and size.shared == size.source - 32 * 32
    experts = 4 * 3 * 32 * 48
    assert size.block == experts + 4 * 32 + 2 * 32  # a router and two norms
    assert size.active == size.block - experts // 2
    assert size.tokens == 4096 and size.held_out == 8 * 64


@pytest.mark.parametrize("goal", [{}, {"method": "transmla"}, {"refine_steps": 0}])
def test_time_follows_depth_text_and_steps(
    goal: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "cpu_flops", lambda: 1e7)
    monkeypatch.setattr(operations, "cpu_bytes_per_second", lambda: 1e9)
    one = planned(save_tiny(tmp_path / "2", num_hidden_layers=2), **goal).estimate.seconds
    two = planned(save_tiny(tmp_path / "4", num_hidden_layers=4), **goal).estimate.seconds
    assert 1.5 * one < two < 2.1 * one
    assert planned(tmp_path / "2", tokens=8192, **goal).estimate.seconds > one
    more = {**goal, "refine_steps": 400}
    assert planned(tmp_path / "2", **more).estimate.seconds > one


def test_equal_cache_needs_no_text(tmp_path: Path) -> None:
    exact = planned(save_tiny(tmp_path), cache_ratio=None, equal_cache=True).estimate
    assert exact.memory_bytes < planned(tmp_path).estimate.memory_bytes
    assert exact.seconds < planned(tmp_path).estimate.seconds


def test_every_way_of_predicting_takes_time(tmp_path: Path) -> None:
    size = sizes(save_tiny(tmp_path))
    judged, sensed, tried = (
        operations.predictions(size, *how).float32 for how in ((False, 0), (True, 0), (False, 3))
    )
    assert 0 < judged < min(sensed, tried)


def test_the_processor_says_whether_it_multiplies_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text, answer in {
        "flags\t\t: fpu sse2 avx512_bf16 avx512f\n": True,
        "flags\t\t: fpu sse2 avx2\n": False,
        "Features\t: fp asimd bf16\n": True,
    }.items():
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
        machine.cpu_multiplies_bfloat16.cache_clear()
        assert machine.cpu_multiplies_bfloat16() is answer
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "nothing")
    machine.cpu_multiplies_bfloat16.cache_clear()
    assert not machine.cpu_multiplies_bfloat16()
    machine.cpu_multiplies_bfloat16.cache_clear()


def test_a_dry_run_measures_the_processor_without_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from mlakit.cli import app\n"
        f"app(['convert', {str(save_tiny(tmp_path))!r}, '--cache-ratio', '0.5', '--dry-run',"
        " '--json'], standalone_mode=False)\n"
        "assert 'numpy' in sys.modules and 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["estimate"]["seconds"] > 0


def test_another_device_is_a_guess_and_says_so(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_tiny(tmp_path))
    for device, guessed in (("cpu", False), ("cuda", True)):
        plan = make_plan(checkpoint, Goal(cache_ratio=0.5), device=device)
        assert any("guesses" in warning for warning in plan.warnings) is guessed
        assert plan.estimate.seconds > 0
