"""Refinement: it helps on text it has not seen, keeps what it must, and repeats itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mlakit.checkpoint import open_checkpoint
from mlakit.conversion.apply import convert
from mlakit.conversion.goal import AUTO_STEPS, Goal
from mlakit.errors import UsageError
from mlakit.nn.hf import load
from tiny_models import TEXT, save_tiny

IDS = torch.tensor([[2 + (i * i + 7 * i) % 56 for i in range(row, row + 40)] for row in range(4)])
"""Text of the same rule as ``TEXT``, whose letters follow each other with a period of 56."""
SIZE: dict[str, Any] = {"kv_lora_rank": 8, "qk_rope_head_dim": 8}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refine")
    (folder / "text.txt").write_text(TEXT)
    return save_tiny(folder / "tiny")


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return load(folder, dtype=torch.float32)(input_ids=IDS).logits


@pytest.mark.parametrize("method", ["mlakit", "transmla"])
def test_refined_layers_err_less(tiny: Path, tmp_path: Path, method: str) -> None:
    source, errors = logits(tiny), []
    for steps in (0, 40):
        out = tmp_path / str(steps)
        plan = convert(
            tiny,
            out,
            **SIZE,
            method=method,
            refine_steps=steps,
            calibration=tiny.parent / "text.txt",
        )
        errors.append(float((logits(out) - source).norm() / source.norm()))
    assert errors[1] < 0.9 * errors[0]
    for layer in plan.measured["layers"]:
        assert layer["error"] <= layer["error_before"]
    spent = "40 steps of 2,048 calibration tokens in each layer, 163,840 in all"
    assert spent in (out / "README.md").read_text()


def test_only_attention_is_refined(tiny: Path, tmp_path: Path) -> None:
    plan = convert(
        tiny, tmp_path / "out", **SIZE, refine_steps=2, calibration=tiny.parent / "text.txt"
    )
    source, result = open_checkpoint(tiny), open_checkpoint(tmp_path / "out")
    copied = {tensor.name for tensor in plan.tensors if tensor.copied}
    assert copied == {name for name in source.names if ".self_attn." not in name}
    for name in copied:
        assert torch.equal(source.read(name), result.read(name))


def test_a_run_cut_off_while_refining_resumes_bit_for_bit(tiny: Path, tmp_path: Path) -> None:
    """Every stage report is a place to stop at: the last before the second layer's refinement."""
    options = {**SIZE, "refine_steps": 6, "calibration": tiny.parent / "text.txt"}
    convert(tiny, tmp_path / "whole", **options)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "refine" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tiny, tmp_path / "cut", **options, progress=stop)
    convert(tiny, tmp_path / "cut", **options)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes(), path.name


def test_refinement_holds_one_layer_and_its_optimiser(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam's two moments in float32, of one layer's attention alone."""
    held: list[int] = []

    class Watched(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            states = [value for state in self.state.values() for value in state.values()]
            held.append(sum(value.nbytes for value in states if value.ndim))
            return result

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    plan = convert(
        tiny, tmp_path / "out", **SIZE, refine_steps=2, calibration=tiny.parent / "text.txt"
    )
    shapes = plan.target.tensor_shapes()
    trained = sum(math.prod(s) for name, s in shapes.items() if "layernorm" not in name)
    assert set(held) == {2 * 4 * trained}


def test_a_step_too_long_is_taken_back(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a hundred times the rate no state is better at first; halving the rate finds one."""
    monkeypatch.setattr("mlakit.conversion.refine.LEARNING_RATE", 1.0)
    plan = convert(
        tiny, tmp_path / "out", **SIZE, refine_steps=40, calibration=tiny.parent / "text.txt"
    )
    layers = plan.measured["layers"]
    assert all(layer["error"] < 0.9 * layer["error_before"] for layer in layers)


def test_who_is_refined_by_default() -> None:
    assert Goal(cache_ratio=0.5).steps == AUTO_STEPS
    assert Goal(cache_ratio=0.5, method="transmla").steps == 0
    assert Goal(equal_cache=True).steps == 0
    with pytest.raises(UsageError, match="nothing to refine"):
        Goal(equal_cache=True, refine_steps=5)
    with pytest.raises(UsageError, match="below 0"):
        Goal(cache_ratio=0.5, refine_steps=-1)
