"""The benchmarks run, and say what they should; no test looks at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
    assert result["correctness"]["cases"] == 48 and not result["correctness"]["failures"]
    assert result["kernel"]["name"] == "cpu"
    assert result["operator"][0]["tflops"] > 0 and result["ceilings"]["copy_gb_per_s"] > 0
    assert result["model"]["tokens_per_s"] > 0 and result["environment"]["torch"]


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
