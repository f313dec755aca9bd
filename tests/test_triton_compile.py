"""The tiles that are chosen compile for GPUs that are not here, without spilling a register."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks.compile_kernels import (
    PROBLEMS,
    SHARED_LIMIT,
    compile_attend,
    compile_combine,
    compile_plan,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_kernels_fit(target):
    used = [compile_attend(target, problem) for problem in PROBLEMS]
    used += [compile_plan(target), compile_combine(target)]
    assert not any(kernel["spilled"] for kernel in used)
    assert max(kernel["shared"] for kernel in used) <= SHARED_LIMIT[target] * 1024
