"""Runs triton_cases.py: in Triton's interpreter wherever Triton is installed, and on a GPU.

A process of its own each time, because Triton decides when it is imported which of the two it is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent

try:
    TRITON = tuple(int(part) for part in version("triton").split("+")[0].split(".")[:2])
except PackageNotFoundError:
    pytest.skip("Triton is not installed", allow_module_level=True)


def run_cases(*options, interpret):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "triton_cases.py", "-p", "no:cacheprovider", *options],
        cwd=TESTS,
        env={**os.environ, "TRITON_INTERPRET": str(int(interpret)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


interpreter = pytest.mark.skipif(
    TRITON < (3, 9), reason="the interpreter of Triton before 3.9 fails on numpy 2.4 and later"
)


FEW = [
    "deepseek_shape and dtype0 and True", "without_a_key", "strided", "features and dtype0",
    "small and quantised_caches and dtype0", "selected_rows and (small or int4)", "refused",
]  # fmt: skip


@interpreter
def test_a_few_cases_in_the_interpreter():
    """Every dtype, format and feature once, cut and empty sequences, selections of two caches."""
    run_cases("-k", " or ".join(f"({few})" for few in FEW), interpret=True)


@interpreter
@pytest.mark.slow
def test_all_cases_in_the_interpreter():
    run_cases("-m", "", interpret=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_the_gpu():
    run_cases("-m", "", interpret=False)
