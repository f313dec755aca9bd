"""Conversion end to end: what is exact, what resumes, and what is refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mlakit.checkpoint import open_checkpoint
from mlakit.conversion.apply import convert
from mlakit.conversion.calibrate import (
    Moment,
    layer_weights,
    partial_rope_layer,
)
from mlakit.conversion.plan import ConversionPlan
from mlakit.conversion.rotate import rorope
from mlakit.conversion.stream import LayerReader, run_layer
from mlakit.conversion.windows import WindowChoice
from mlakit.data import named_sources
from mlakit.errors import MlakitError, UnsupportedModelError, UsageError
from mlakit.families import read_model
from mlakit.nn.hf import load
from tiny_models import TEXT, save_tiny, use_old_config_style

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "attention_factor": 1.0,
    "original_max_position_embeddings": 16,
}
SOURCES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied-sharded-bf16": {
        "tie_word_embeddings": True,
        "sharded": True,
        "dtype": torch.bfloat16,
    },
    "llama-bias-llama3": {
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": LLAMA3,
        "sharded": True,
    },
    "llama-mha-fp16": {"num_key_value_heads": 4, "dtype": torch.float16},
    "llama-wide-head-yarn": {"head_dim": 16, "rope_parameters": YARN},
    "mistral-mqa-window": {"num_key_value_heads": 1, "sliding_window": 12},
    "mistral-bf16": {"sliding_window": None, "dtype": torch.bfloat16},
    "qwen2-windows": {
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
        "sharded": True,
    },
    "qwen2-tied-bf16": {"tie_word_embeddings": True, "dtype": torch.bfloat16},
}
MODES: dict[str, dict[str, Any]] = {
    "equal-cache": {"equal_cache": True},
    "article": {"equal_cache": True, "form": "article"},
    "full rank": {"cache_ratio": 1.0, "method": "transmla", "freqfold": 1},
    "half, published": {"cache_ratio": 0.5, "qk_rope_head_dim": 4, "method": "transmla"},
    "half": {"cache_ratio": 0.5, "qk_rope_head_dim": 6, "refine_steps": 0},
    "half, refined": {"cache_ratio": 0.5, "qk_rope_head_dim": 6, "refine_steps": 3},
    "half, stock layout": {
        "cache_ratio": 0.5,
        "qk_rope_head_dim": 4,
        "without": ["frequencies", "means"],
        "refine_steps": 0,
    },
}

IDS = torch.arange(2 * 40).view(2, 40) * 7 % 50


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module", params=SOURCES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny(folder, request.param.split("-")[0], **SOURCES[request.param])
    if "llama3" in request.param or request.param == "llama":
        use_old_config_style(folder)
    return folder


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny")


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return load(folder, dtype=torch.float32)(input_ids=IDS).logits


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@torch.no_grad()
def partial_rope_logits(source: Path, plan: ConversionPlan, text: Path) -> torch.Tensor:
    """What the source computes when RoPE stays on the rotation's first components alone."""
    checkpoint = open_checkpoint(source)
    reader = LayerReader(checkpoint, read_model(checkpoint.config), torch.device("cpu"))
    texts = WindowChoice(
        checkpoint, reader.spec, plan.calibration, named_sources(text), device="cpu"
    )
    windows = texts.choose(source, lambda *step: None).ids
    seen, hidden = list(reader.embed(windows, 8)), list(reader.embed(IDS, 2))
    for index, spec in enumerate(reader.spec.layers):
        layer, weights = reader.layer(index), layer_weights(reader, index)
        moment = Moment(weights)
        moment.watch(layer.layers[0].self_attn)
        seen = list(run_layer(layer, seen, reader.device))
        keys = weights.keys @ moment.value @ weights.keys.mT
        rotation = rorope(keys, spec.num_key_value_heads, spec.head_dim, 1)
        layer = partial_rope_layer(reader, index, weights, rotation)
        hidden = list(run_layer(layer, hidden, reader.device))
    norm, output = reader.head()
    return norm(hidden[0]) @ output.float().mT


def with_text(options: dict[str, Any], text: Path) -> dict[str, Any]:
    """The options with a text to calibrate on, where one is of use."""
    return options if "equal_cache" in options else {**options, "calibration": text}


@pytest.mark.parametrize("mode", MODES)
def test_every_source_in_every_mode(source: Path, mode: str, text: Path, tmp_path: Path) -> None:
    options = MODES[mode]
    spec = read_model(json.loads((source / "config.json").read_text()))
    if mode == "half, published" and spec.layers[0].rope.rope_type == "yarn":
        options = {"cache_ratio": 0.5, "method": "transmla"}
    before = contents(source)
    plan = convert(source, tmp_path / "out", **with_text(options, text))
    assert contents(source) == before

    result = open_checkpoint(tmp_path / "out")
    assert read_model(result.config).layers == plan.layers
    assert {t.name: (t.shape, t.dtype, t.nbytes) for t in plan.tensors} == {
        name: (result.shape(name), result.dtype(name), result.nbytes(name)) for name in result.names
    }
    original = open_checkpoint(source)
    for tensor in plan.tensors:
        if tensor.copied:
            assert torch.equal(result.read(tensor.name), original.read(tensor.name))
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not (tmp_path / "out" / ".work").exists()

    # Relative rounding of weights (2^-24, 2^-11, 2^-8), times about ten for the sharp attention of
    # these random models; measured 9e-7, 1e-3 and 8e-3.
    rounding = {"float32": 5e-6, "float16": 5e-3, "bfloat16": 4e-2}[plan.dtype]
    exact = logits(source)
    if mode == "full rank":
        exact = partial_rope_logits(source, plan, text)
        if spec.layers[0].num_key_value_heads == 1:  # nothing to drop
            assert relative_error(exact, logits(source)) < 5e-6
    if not mode.startswith("half"):
        assert relative_error(logits(tmp_path / "out"), exact) < rounding
    if plan.goal.equal_cache and plan.dtype != "float32":
        convert(source, tmp_path / "wide", dtype="float32", **options)
        assert relative_error(logits(tmp_path / "wide"), exact) < 5e-6


@pytest.mark.parametrize("method", ["mlakit", "transmla"])
def test_ranks_trade_bytes_for_energy(tiny: Path, text: Path, tmp_path: Path, method: str) -> None:
    kept, ratios = [], []
    for rank in (4, 12, 24):
        plan = convert(tiny, tmp_path / f"{method}{rank}", kv_lora_rank=rank, calibration=text,
                       method=method, refine_steps=0)  # fmt: skip
        kept.append(min(layer["kept"] for layer in plan.measured["layers"]))
        ratios.append(plan.cache_ratio)
    assert kept == sorted(kept) and kept[-1] == pytest.approx(1)
    assert ratios == [(rank + 8) / 32 for rank in (4, 12, 24)]


def test_freqfold_auto_is_judged_on_held_out_text(tiny: Path, text: Path, tmp_path: Path) -> None:
    plan = convert(tiny, tmp_path / "out", cache_ratio=0.5, calibration=text, method="transmla")
    tried = plan.measured["held_out_perplexity"]
    assert plan.measured["freqfold"] == int(min(tried, key=lambda fold: tried[fold]))
    assert "1" in tried and "2" in tried


class Stop(Exception):
    """Stands for a killed process."""


COMPRESS = {"cache_ratio": 0.5, "calibration_tokens": 1024, "refine_steps": 0}
RUNS = {
    "equal": {"equal_cache": True},
    "compress": COMPRESS,
    "one theta": {**COMPRESS, "without": ["frequencies"]},
    "refined": {**COMPRESS, "refine_steps": 3},
    "published": {**COMPRESS, "method": "transmla"},
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_run_cut_off_anywhere_resumes_bit_for_bit(
    tiny: Path, text: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    calls: list[tuple[str, int, int]] = []
    options = with_text(options, text)
    convert(tiny, tmp_path / "whole", **options,
            progress=lambda *call: calls.append(call))  # fmt: skip
    whole = contents(tmp_path / "whole")
    for last in range(0, len(calls) - 1, 3):
        seen = 0

        def stop_at(*call: Any, last: int = last) -> None:
            nonlocal seen
            seen += 1
            if seen > last:
                raise Stop

        out = tmp_path / f"cut{last}"
        with pytest.raises(Stop):
            convert(tiny, out, **options, progress=stop_at)
        assert json.loads((out / "plan.json").read_text())["status"] == "running"
        with pytest.raises(MlakitError, match="not finished"):
            load(out)
        convert(tiny, out, **options)
        assert contents(out) == whole


def test_a_killed_process_resumes_bit_for_bit(tiny: Path, text: Path, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "whole", calibration=text, **COMPRESS)
    program = (
        "import os, signal, sys\n"
        "from mlakit.conversion.apply import convert\n"
        "def progress(stage, done, total):\n"
        "    if (stage, done) == ('convert', 1): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"convert(sys.argv[1], sys.argv[2], calibration=sys.argv[3], progress=progress,"
        f" **{COMPRESS!r})\n"
    )
    out = tmp_path / "killed"
    arguments = [sys.executable, "-c", program, str(tiny), str(out), str(text)]
    threads = str(torch.get_num_threads())
    done = subprocess.run(arguments, env={**os.environ, "OMP_NUM_THREADS": threads}, timeout=120)
    assert done.returncode == -signal.SIGKILL
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert shards == ["model-00001-of-00003.safetensors"]
    convert(tiny, out, calibration=text, **COMPRESS)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_finished_folder_is_left_alone_and_a_damaged_one_made_again(
    tiny: Path, tmp_path: Path
) -> None:
    first = convert(tiny, tmp_path / "out", equal_cache=True)
    before = contents(tmp_path / "out")
    again = convert(tiny, tmp_path / "out", equal_cache=True, progress=lambda *call: 1 / 0)
    assert again == first and contents(tmp_path / "out") == before
    (tmp_path / "out" / "model-00002-of-00003.safetensors").unlink()
    convert(tiny, tmp_path / "out", equal_cache=True)
    assert contents(tmp_path / "out") == before


def test_a_full_disk_leaves_a_run_that_goes_on(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(tiny, tmp_path / "whole", calibration=text, **COMPRESS)
    out = tmp_path / "out"
    real, calls = os.fsync, 0

    def full_after_a_while(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_after_a_while)
        with pytest.raises(MlakitError, match="disk is full"):
            convert(tiny, out, calibration=text, **COMPRESS)
    assert not list(out.rglob("*.partial"))
    convert(tiny, out, calibration=text, **COMPRESS)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_disk_too_small_is_refused_before_anything_is_written(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(MlakitError, match="Not enough disk space"):
        convert(tiny, tmp_path / "out", equal_cache=True)
    assert not (tmp_path / "out").exists()


def test_outputs_in_use_are_refused(tiny: Path, text: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="not made by mlakit convert"):
        convert(tiny, foreign, equal_cache=True)
    with pytest.raises(UsageError, match="is a file"):
        convert(tiny, foreign / "thesis.txt", equal_cache=True)
    with pytest.raises(UsageError, match="never written to"):
        convert(tiny, tiny, equal_cache=True)
    convert(tiny, tmp_path / "out", equal_cache=True)
    before = contents(tmp_path / "out")
    for other in ({"cache_ratio": 0.5}, {"equal_cache": True, "form": "article"}):
        with pytest.raises(UsageError, match="another plan"):
            convert(tiny, tmp_path / "out", **with_text(other, text))
    (tmp_path / "out" / "plan.json").write_text("{}")
    with pytest.raises(UsageError, match="cannot be read"):
        convert(tiny, tmp_path / "out", equal_cache=True)
    (tmp_path / "out" / "plan.json").unlink()
    assert contents(tmp_path / "out") == {k: v for k, v in before.items() if k != "plan.json"}


@pytest.mark.parametrize(
    "damage,error,message",
    [
        ("missing shard", MlakitError, "model-00002"),
        ("truncated shard", MlakitError, "damaged or cut short"),
        ("unknown family", UnsupportedModelError, "'mamba'"),
        ("known but not convertible", UnsupportedModelError, "q_norm"),
        ("wrong config", UnsupportedModelError, "shape"),
        ("more heads than groups allow", UnsupportedModelError, "multiple"),
        ("no config", MlakitError, "config.json"),
        ("no tokenizer", MlakitError, "tokenizer"),
        ("not finite", MlakitError, "not finite"),
    ],
)
def test_bad_sources(
    tmp_path: Path, text: Path, damage: str, error: type[MlakitError], message: str
) -> None:
    folder = save_tiny(tmp_path / "source", sharded=True)
    shards = sorted(folder.glob("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    if damage == "missing shard":
        shards[1].unlink()
    elif damage == "truncated shard":
        shards[1].write_bytes(shards[1].read_bytes()[:-8])
    elif damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    elif damage == "not finite":
        for path in shards:
            raw = bytearray(path.read_bytes())
            raw[-4:] = b"\x00\x00\xc0\x7f"  # a float32 NaN
            path.write_bytes(raw)
    else:
        config |= {
            "unknown family": {"model_type": "mamba"},
            "known but not convertible": {"model_type": "qwen3"},
            "wrong config": {"num_key_value_heads": 4},
            "more heads than groups allow": {"num_key_value_heads": 3},
        }[damage]
        (folder / "config.json").write_text(json.dumps(config))
    before = contents(folder)
    out = tmp_path / "out"
    with pytest.raises(error, match=message):
        convert(folder, out, cache_ratio=0.5, calibration=text)
    assert contents(folder) == before
    assert not out.exists() or damage == "not finite"


def test_calibration_text_that_is_too_short(tiny: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    for content, message in (("", "empty"), ("Once upon a time.", "window")):
        short.write_text(content)
        with pytest.raises(MlakitError, match=message):
            convert(tiny, tmp_path / "out", cache_ratio=0.5, calibration=short)
    with pytest.raises(MlakitError, match=r"neither a file nor|be loaded"):
        convert(tiny, tmp_path / "out", cache_ratio=0.5, calibration=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()
    short.write_text("Once upon a time.")
    plan = convert(
        tiny, tmp_path / "out", cache_ratio=0.5, calibration=short, calibration_tokens=16
    )
    assert plan.measured["calibration_windows"] == 2
    assert any("few" in warning for warning in plan.warnings)


def test_a_device_that_is_not_there(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be used"):
        convert(tiny, tmp_path / "out", equal_cache=True, device="cuda:99")
    assert not (tmp_path / "out").exists()
