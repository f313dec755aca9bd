"""What is computed once per layer equals what the converted layer itself computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mlakit.checkpoint import open_checkpoint
from mlakit.conversion import closed_form, stream, trial
from mlakit.conversion.adapt import stored_tensors
from mlakit.conversion.calibrate import layer_weights
from mlakit.conversion.card import converted_config
from mlakit.conversion.goal import Goal
from mlakit.conversion.observe import Observer, felt_output
from mlakit.conversion.plan import make_plan
from mlakit.conversion.stream import LayerReader
from mlakit.conversion.student import Student
from mlakit.conversion.trial import Trial
from mlakit.families import FAMILIES, read_model
from test_family_matrix import CASES, FIRST, save
from tiny_models import TEXT


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize(
    "case",
    ["llama-llama3-bias", "qwen2-window-tied", "qwen3-tied", "gemma2", "smollm3", "phi3-partial"],
)
@torch.no_grad()
def test_a_trial_errs_as_the_uncut_student_does(
    case: str, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(save(tmp_path / "source", case))
    goal = Goal(kv_lora_rank=16, qk_rope_head_dim=4, without=("downstream",))
    plan = make_plan(
        checkpoint, goal, calibration=text, calibration_tokens=512, seed=0, dtype=None, device="cpu"
    )
    reader = LayerReader(checkpoint, read_model(checkpoint.config), torch.device("cpu"))
    spec, weights = reader.spec.layers[1], layer_weights(reader, 1)
    frequencies, factor = reader.frequencies(1)
    felt = felt_output(weights, None)
    observer, model = Observer(weights, spec, frequencies, factor, 3, felt), reader.layer(1)
    observer.watch(model.layers[0].self_attn)
    torch.manual_seed(0)
    model(inputs_embeds=torch.randn(5, 24, spec.hidden_size), use_cache=False)
    seen = observer.statistics()
    rope = closed_form.choose_rope(
        weights, seen, frequencies, factor, 4,
        schedule=None, shrinkage=0.5, unitary=True, sensitive=True,
    )  # fmt: skip
    uncut = closed_form.whole(closed_form.unrotated_keys(weights, rope.kept), weights.values)
    new = closed_form.latent_tensors(weights, spec, rope, uncut)
    tensors = stored_tensors(new, reader.attention(1), spec, plan.layers[1])
    config: dict[str, Any] = converted_config(checkpoint.config, plan, reader.spec, 0)
    student = Student(config, 1, tensors, rope.kept.frequencies.tolist(), reader.device)
    expected = student.error(observer.held_out).share
    assert len(observer.held_out) == 2 and (expected > 1e-3 or spec.rope is None)
    whole = Trial(weights, spec, factor, observer.held_out)
    found = whole.error(rope).share
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-9)  # float32, differently summed
    monkeypatch.setattr(trial, "TRIAL_QUERIES", 10)  # of 48: every fourth
    some = Trial(weights, spec, factor, observer.held_out)
    monkeypatch.setattr(trial, "TRIAL_QUERIES", 1)
    ends = Trial(weights, spec, factor, observer.held_out)
    assert [part.rows.tolist() for part in ends.windows] == [[23], [23]]
    assert ends.error(rope).share >= 0
    for part, all_of_it in zip(some.windows, whole.windows, strict=True):
        assert part.rows.tolist() == [3, 7, 11, 15, 19, 23]
        read, rest = some._attend(part, rope), whole._attend(all_of_it, rope)
        limit = 1e-6 * float(rest.abs().max())  # float32 sums in another order: 2e-7 was seen
        torch.testing.assert_close(read, rest[part.rows], rtol=0, atol=limit)


@pytest.mark.parametrize("case", FIRST)
@torch.no_grad()
def test_a_bfloat16_layer_is_within_its_rounding_of_float32(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices are the same numbers either way; what they take and give rounds to 2^-9."""
    checkpoint = open_checkpoint(save(tmp_path, case, dtype=torch.bfloat16))
    reader = LayerReader(checkpoint, read_model(checkpoint.config), torch.device("cpu"))
    torch.manual_seed(0)
    hidden, found = torch.randn(2, 24, reader.spec.hidden_size), {}
    for narrow in (False, True):
        monkeypatch.setattr(stream, "cpu_multiplies_bfloat16", lambda narrow=narrow: narrow)
        model = reader.layer(0)
        dtypes = {part.dtype for part in model.layers[0].parameters() if part.dim() > 1}
        assert dtypes == {torch.bfloat16 if narrow else torch.float32}
        out = model(inputs_embeds=hidden, use_cache=False).last_hidden_state
        assert out.dtype == torch.float32
        found[narrow] = out
    error = float((found[True] - found[False]).norm() / found[False].norm())
    assert 0 < error < 0.03, "a few roundings of 2^-9; attention of these models is sharp"
    assert FAMILIES[case.split("-")[0]] is reader.family and case in CASES
