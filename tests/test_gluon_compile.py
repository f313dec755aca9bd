"""The Hopper kernels compile for sm_90a without a GPU, keep their registers and fit."""

from __future__ import annotations

import pytest

pytest.importorskip("triton.experimental.gluon", reason="Triton 3.6 or later is not installed")

from benchmarks.compile_gluon import PROBLEMS, compile_problem, complaints

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("problem", PROBLEMS)
def test_kernels_fit(problem):
    used = compile_problem(problem)
    assert {"plan", "combine"} < used.keys() and len(used) == 3
    assert not {name: wrong for name, each in used.items() if (wrong := complaints(name, each))}
