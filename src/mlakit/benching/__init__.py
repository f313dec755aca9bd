"""``bench``: how fast the decode operator is, beside the machine's ceilings and its rivals."""

from mlakit.benching.result import Bench
from mlakit.benching.run import bench

__all__ = ["Bench", "bench"]
