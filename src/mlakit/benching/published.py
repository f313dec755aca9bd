"""Figures that others have published: reference lines, never measurements of this machine."""

from __future__ import annotations

from typing import Any

from mlakit.benching.clock import Ceilings

H100 = Ceilings(
    copy_gb_per_s=3350.0,
    read_gb_per_s=3350.0,
    matmul_tflops=989.0,
    matmul_dtype="bfloat16",
    matmul_size=0,
)
"""An H100 SXM as its maker's data sheet states it, dense and without sparsity."""

PUBLISHED: tuple[dict[str, Any], ...] = (
    {
        "kernel": "FlashMLA, April 2025",
        "gpu": "H800 SXM",
        "shape": "compute bound, 128 heads",
        "tflops": 660,
        "gb_per_s": None,
        "source": "its README",
    },
    {
        "kernel": "FlashMLA, February 2025",
        "gpu": "H800 SXM",
        "shape": "compute bound / memory bound",
        "tflops": 580,
        "gb_per_s": 3000,
        "source": "its README of then",
    },
)
"""github.com/deepseek-ai/FlashMLA."""
