"""What a benchmark ran on; the package's own ``bench`` records the same."""

from mlakit.benching.environment import environment

__all__ = ["environment"]
