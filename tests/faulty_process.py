"""mlakit with a fault in one of several processes: ``KIND:RANK:STEP`` before its own words."""

import os
import sys
from typing import Any

import torch

from mlakit.cli import main
from mlakit.healing.pair import Pair

kind, rank, step = sys.argv.pop(1).split(":")
losses, seen = Pair.losses, 0


def faulty(self: Pair, *args: Any, **kwargs: Any) -> Any:
    """The losses, but for one."""
    global seen
    seen += 1
    here = os.environ["RANK"] == rank and seen == int(step)
    if here and kind == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
    if here and kind == "error":
        raise RuntimeError("a kernel failed")
    loss, facts = losses(self, *args, **kwargs)
    return (loss * torch.nan, facts * torch.nan) if here and kind == "nan" else (loss, facts)


if __name__ == "__main__":
    Pair.losses = faulty  # type: ignore[method-assign]
    main()
