"""The benchmarks run, and say what they should; no test looks at a time."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.gpu_suite import trials
from benchmarks.gpu_suite.__main__ import Suite
from benchmarks.gpu_suite.cases import SHARES, cases
from benchmarks.gpu_suite.correctness import try_case
from benchmarks.gpu_suite.lines import Ending, listen

from mlakit.ops import mla_decode

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a benchmark module from the repository's root."""
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_gpu_suite_runs_its_steps_on_the_cpu(tmp_path):
    output = tmp_path / "suite.json"
    done = run("benchmarks.gpu_suite", "--device", "cpu", "--quick", "--output", str(output))
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    for found in result["correctness"].values():
        assert found["right"] > 300 and not found["failures"] and not found["refused"]
        assert set(found["groups"]) == {"features", "dense", "quantised", "sparse", "prefill"}
    assert result["ceilings"]["copy_gb_per_s"] > 0 and not result["failures"]
    assert {p["contender"] for s in result["shapes"] for p in s["points"]} == {
        "cpu", "torch", "torch SDPA",
    }  # fmt: skip
    assert result["end_to_end"][0]["latent"]["at_fixed_batch"]["tokens_per_s"] > 0
    assert result["environment"]["torch"] and (tmp_path / "suite.png").stat().st_size > 10_000


def suite(monkeypatch, tmp_path, say) -> Suite:
    """A suite whose parts are ``say(module, arguments, hear)`` instead of processes."""

    def listen(module, arguments, seconds, hear, environment=None):
        return say(module, arguments, hear)

    monkeypatch.setattr("benchmarks.gpu_suite.__main__.listen", listen)
    options = {"device": "cpu", "quick": True, "seconds": 9.0, "output": tmp_path / "suite.json"}
    return Suite(argparse.Namespace(**options, kernels=["cpu", "torch", "reference"]))


def test_gpu_suite_goes_on_without_a_wrong_kernel(monkeypatch, tmp_path):
    """One kernel is wrong, one hangs: the third is timed, and everything is written."""
    timed = []

    def say(module, arguments, hear):
        if module.endswith("correctness"):
            kernel = arguments[1]
            hear({"group": "dense", "total": 2})
            hear({"now": "dense: a"})
            if kernel == "torch":
                return Ending(-9, True, "")
            status = "wrong" if kernel == "cpu" else "right"
            hear({"group": "dense", "case": "a", "status": status, "why": "off", "error": 0.5})
            hear({"finished": True})
        if module.endswith("kernels"):
            timed.append(arguments[1 : arguments.index("--skip")])
            if len(timed) == 1:
                hear({"lost": "flashinfer", "why": "flashinfer broke the device"})
            return Ending(3, False, "RuntimeError: sticky")
        return Ending(0, False, "")

    found = suite(monkeypatch, tmp_path, say)
    found.run()
    assert timed == [["reference", "--without"], ["reference", "--without", "flashinfer"]]
    result = json.loads((tmp_path / "suite.json").read_text())
    assert result["failures"] == found.result["failures"]
    assert sorted(result["failures"]) == [
        "cpu: dense: a: off",
        "kernels: broke with status 3 at after 0 results: RuntimeError: sticky",
        "torch: ended at its time limit, at dense: a",
    ]
    assert result["notes"] == [
        "timing: flashinfer broke the device", "end to end ran with reference",
    ]  # fmt: skip
    assert (tmp_path / "suite.png").exists()


def test_gpu_suite_knows_a_hang_from_a_crash():
    heard = []
    sleep = listen("timeit", ["-n1", "-r1", "import time; time.sleep(60)"], 0.5, heard.append)
    assert sleep.out_of_time and sleep.code < 0 and not heard
    options = ["--kernel", "cpu", "--device", "cpu", "--seconds", "nonsense"]
    crash = listen("benchmarks.gpu_suite.correctness", options, 60, heard.append)
    assert crash.code == 2 and not crash.out_of_time and "invalid float" in crash.errors


def test_gpu_suite_has_the_whole_matrix():
    found = cases("cuda", quick=False)
    count = {group: len(several) for group, several in found.items()}
    # 16 head pairs x 4 batches x 3 queries x 3 lengths x varlen x causal x 2 dtypes, and 4 more
    assert count["dense"] == 16 * 4 * 3 * 3 * 2 * 2 * 2 + 4
    assert set(count) == set(SHARES) and sum(SHARES.values()) == pytest.approx(1)
    labels = [case.label for several in found.values() for case in several]
    assert len(labels) == len(set(labels)) and any("CUDA graph" in label for label in labels)


def test_a_correctness_case_tells_right_from_wrong(monkeypatch):
    case = cases("cpu", quick=True)["quantised"][0]
    assert try_case(case)["status"] == "right"
    monkeypatch.setattr(trials, "mla_decode", lambda *a, **k: [2 * t for t in mla_decode(*a, **k)])
    assert "out is off" in try_case(case)["why"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_suite_without_a_gpu_says_so():
    done = run("benchmarks.gpu_suite")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("gpu_suite: torch sees no CUDA device")


@pytest.mark.slow
def test_cpu_benchmark_compares_equal_models(tmp_path):
    output = tmp_path / "decode.json"
    done = run("benchmarks.decode_cpu", "--length", "70", "--rounds", "1", "--output", str(output))
    assert done.returncode == 0, done.stderr
    for row in json.loads(output.read_text())["decode"]:
        # bfloat16 rounds differently in the two forms: 2^-8 of logits of up to about 4.
        limit = 1e-4 if row["dtype"] == "float32" else 0.05
        assert row["largest_logit_difference"] < limit


@pytest.mark.slow
def test_engine_benchmark_compares_equal_texts(tmp_path):
    output, quick = tmp_path / "engine.json", ("--rounds", "1", "--new-tokens", "4")
    done = run("benchmarks.engine_throughput", *quick, "--output", str(output))
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["throughput"]
    assert [row["requests"] for row in rows] == [1, 8, 32]
    assert all(row["engine_tokens_per_second"] > 0 for row in rows)
