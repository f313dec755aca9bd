"""The rotary width chosen by calibration: what it gives, what is kept of the source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from converted import check_rounding, check_saved
from mlakit.checkpoint import open_checkpoint
from mlakit.conversion.apply import convert
from mlakit.conversion.card import size_words
from mlakit.nn.hf import load
from tiny_models import TEXT, save_tiny

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_key_value_heads": 4}),
    "biases": ("qwen2", {}),
    "fused, a window": ("phi3", {"sliding_window": 20, "pad_token_id": 0}),
    "norms on heads": ("qwen3", {}),
    "partly rotated": ("stablelm", {"partial_rotary_factor": 0.5, "use_qkv_bias": True}),
    "soft caps": ("gemma2", {"sliding_window": 20}),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("case", FAMILIES)
def test_every_family_keeps_its_queries(case: str, tmp_path: Path, text: Path) -> None:
    """Loaded, decoded and saved alike; the source's query projection is there bit for bit."""
    family, options = FAMILIES[case]
    source = save_tiny(tmp_path / "source", family, **options)
    plan = convert(source, tmp_path / "out", cache_ratio=0.75, refine_steps=0, calibration=text)
    assert len(plan.rope_dims) > 1
    assert plan.target.qk_rope_head_dim in plan.rope_dims
    assert plan.target.maps_queries and plan.target.query_up == (family != "qwen3")
    check_saved(tmp_path / "out", plan, tmp_path)
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    queries = [t for t in plan.tensors if ".q_proj." in t.name]
    reordered = case in ("fused, a window", "partly rotated")
    assert queries and all(tensor.copied != reordered for tensor in queries)
    for tensor in queries if not reordered else ():
        assert torch.equal(before.read(tensor.name), after.read(tensor.name)), tensor.name


def test_with_all_rotations_kept_nothing_is_lost(tmp_path: Path, text: Path) -> None:
    """The widest of all, in a cache of the source's size, is the source itself."""
    source = save_tiny(tmp_path / "source", rough=True)
    plan = convert(source, tmp_path / "out", max_kl=1e-8, refine_steps=0, calibration=text)
    assert plan.target.qk_rope_head_dim == 16 and plan.cache_ratio == 1
    check_rounding(source, tmp_path / "out", times=20)


def test_a_refined_one_resumes_and_says_what_was_chosen(tmp_path: Path, text: Path) -> None:
    source = save_tiny(tmp_path / "source")
    goal = {"cache_ratio": 0.75, "refine_steps": 3, "calibration": text}
    planned = convert(source, tmp_path / "out", **goal, dry_run=True)
    assert planned.open and "rope 4, 8 or 12, by calibration" in size_words(planned)
    plan = convert(source, tmp_path / "out", **goal)
    tried = {width: kl for width, kind, kl in plan.measured["considered"]}
    assert set(tried) == {4, 8, 12}
    assert not plan.open and f"rope {plan.target.qk_rope_head_dim}" in size_words(plan)
    assert plan.nbytes <= planned.nbytes and plan.cache_bytes <= planned.cache_bytes
    assert tried[plan.target.qk_rope_head_dim] == plan.measured["predicted_kl"]
    again = convert(source, tmp_path / "out", **goal)
    assert again.layers == plan.layers and again.tensors == plan.tensors
    assert all(point["rope_dim"] in tried for point in plan.measured["curve"])


def test_a_layout_without_query_maps_gets_two_heads_at_most(tmp_path: Path, text: Path) -> None:
    source = save_tiny(tmp_path / "source", num_key_value_heads=4, num_attention_heads=4)
    plan = convert(
        source, tmp_path / "out", cache_ratio=0.75, refine_steps=0, calibration=text,
        engine="transformers",
    )  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert plan.rope_dims == (8, 12, 16) and not config["query_up"]
    assert config["rope_parameters"]["rope_theta"] == plan.measured["rope_theta"]
    check_saved(tmp_path / "out", plan, tmp_path)


@pytest.mark.slow
def test_a_real_model_loses_far_less(shared: Path, tmp_path: Path) -> None:
    """At three quarters of the cache the source's own width gives much away; at half it is met."""
    source = shared / "models" / "llama2xs280k"
    options: dict[str, Any] = {"refine_steps": 0, "calibration_tokens": 8192}
    for ratio, share in ((0.75, 0.2), (0.5, 1.0)):
        found = {}
        for name, width in (("own", {"qk_rope_head_dim": 8}), ("chosen", {})):
            out = tmp_path / f"{name}-{ratio}"
            plan = convert(source, out, cache_ratio=ratio, **width, **options)
            found[name] = plan.measured["held_out_kl"]
            assert plan.cache_ratio <= ratio
        assert found["chosen"] <= share * found["own"]
    assert load(tmp_path / "chosen-0.75").config.query_up
