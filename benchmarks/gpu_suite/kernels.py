"""``mlakit bench decode`` in a process of its own: the same code, a JSON line per shape.

python -m benchmarks.gpu_suite.kernels --device cuda --kernels gluon triton --seconds 150
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

import torch
from benchmarks.gpu_suite.lines import say

from mlakit.benching.clock import Clock, measure_ceilings
from mlakit.benching.problem import Shape
from mlakit.benching.sweep import default_batch, default_rounds, run_sweep, standard_sweeps


def main() -> None:
    """Ceilings first, then the two standard sweeps until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--kernels", nargs="*", default=[])
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    on_cuda, quick = arguments.device == "cuda", arguments.quick
    clock = Clock(torch.device(arguments.device))
    ceilings = measure_ceilings(clock, quick)
    batch = default_batch(on_cuda, quick)
    say(ceilings=asdict(ceilings))
    shapes = [
        Shape(heads, length, batch, queries, varlen)
        for heads, length, queries, varlen in standard_sweeps(on_cuda, quick)
    ]
    rounds = default_rounds(on_cuda, quick)
    sweep = run_sweep(shapes, arguments.kernels, clock, ceilings, rounds, seconds=arguments.seconds)
    for found in sweep:
        say(shape=found.as_dict())
    say(finished=True)


if __name__ == "__main__":
    main()
