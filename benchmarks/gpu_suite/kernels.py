"""``mlakit bench decode`` in a process of its own: the same code, a JSON line per shape.

python -m benchmarks.gpu_suite.kernels --device cuda --kernels gluon triton --seconds 150
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

import torch
from benchmarks.gpu_suite.lines import say

from mlakit.benching.clock import Clock, DeviceLost, measure_ceilings
from mlakit.benching.contenders import RIVALS
from mlakit.benching.problem import Shape
from mlakit.benching.sweep import (
    default_batch,
    default_rounds,
    run_sweep,
    standard_sweeps,
)


def main() -> None:
    """Ceilings first, then the two standard sweeps until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--kernels", nargs="*", default=[])
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--without", nargs="*", default=[], help="rivals that stay out")
    parser.add_argument("--skip", type=int, default=0, help="shapes that are done already")
    arguments = parser.parse_args()
    on_cuda, quick = arguments.device == "cuda", arguments.quick
    clock = Clock(torch.device(arguments.device))
    ceilings = measure_ceilings(clock, "bfloat16", quick)
    batch = default_batch(on_cuda, quick)
    say(ceilings=asdict(ceilings))
    shapes = [
        Shape(heads, length, batch, queries, varlen)
        for heads, length, queries, varlen in standard_sweeps(on_cuda, quick)
    ]
    rounds = default_rounds(on_cuda, quick)
    rivals = {name: rival for name, rival in RIVALS.items() if name not in arguments.without}
    sweep = run_sweep(
        shapes[arguments.skip :], arguments.kernels, clock, ceilings, rounds, rivals=rivals,
        seconds=arguments.seconds,
    )  # fmt: skip
    try:
        for found in sweep:
            say(shape=found.as_dict())
    except DeviceLost as loss:
        say(lost=loss.contender, why=loss.message)
        sys.exit(3)
    say(finished=True)


if __name__ == "__main__":
    main()
