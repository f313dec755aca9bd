"""The tiles that are chosen compile for GPUs that are not here, without spilling a register."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks.compile_kernels import SHARED_LIMIT, compile_all

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_kernels_fit(target):
    used = dict(compile_all(target))
    assert not [name for name, kernel in used.items() if kernel["spilled"]]
    limit = SHARED_LIMIT[target] * 1024
    assert not [name for name, kernel in used.items() if kernel["shared"] > limit]
