"""One kernel against float64, in a process of its own; JSON lines on stdout.

    python -m benchmarks.gpu_suite.correctness --kernel triton --device cuda --seconds 120

Before each case a line says what is tried, so that whoever reads them knows where a hang was.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch
from benchmarks.gpu_suite.cases import SHARES, Case, cases
from benchmarks.gpu_suite.lines import say

from mlakit.benching.clock import Clock
from mlakit.benching.contenders import only
from mlakit.errors import UsageError
from mlakit.ops.choose import deepseek_call, why_not

RUNS = 3
REFUSED = "cannot run this call"


def try_case(case: Case) -> dict[str, Any]:
    """Runs a case, judges it, and runs it again for the same bits."""
    trial = case.make()
    first = trial.run()
    judgement, why = trial.judge(first), ""
    for _ in range(RUNS - 1):
        if not all(torch.equal(a, b) for a, b in zip(first, trial.run())):
            why = "two runs differ in their bits"
    why = judgement.wrong or why
    return {"status": "wrong" if why else "right", "why": why, "error": judgement.largest_error}


@torch.inference_mode()
def run_group(several: list[Case], seconds: float, clock: Clock) -> None:
    """Cases in order until the time is up, each as a line."""
    start = time.perf_counter()
    for done, case in enumerate(several):
        if time.perf_counter() - start > seconds:
            say(group=case.group, left_out=len(several) - done)
            return
        say(now=f"{case.group}: {case.label}")
        torch.manual_seed(done)
        try:
            found = try_case(case)
        except UsageError as error:
            refused = REFUSED in error.message
            why = error.message.partition(f"{REFUSED}: ")[2] if refused else error.message
            found = {"status": "refused" if refused else "wrong", "why": why}
        except ImportError as error:
            found = {"status": "refused", "why": str(error)}
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            found = {"status": "refused", "why": "the case and its truth do not fit in memory"}
        except Exception as error:  # whatever a kernel does to itself is a result of this suite
            line = (str(error).strip().splitlines() or [""])[0]
            found = {"status": "wrong", "why": f"{type(error).__name__}: {line}"}
            say(group=case.group, case=case.label, **found)
            if not clock.alive():
                sys.exit(3)
            continue
        say(group=case.group, case=case.label, **found)


def absence(kernel: str, device: str) -> str:
    """Why a kernel cannot run even the plainest call here; empty if it can."""
    try:
        return why_not(kernel, deepseek_call(device))
    except ImportError as error:
        return str(error)


def main() -> None:
    """Every group in turn; time that a group leaves goes to the next."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    found = cases(arguments.device, arguments.quick)
    clock, start, share = Clock(torch.device(arguments.device)), time.perf_counter(), 0.0
    reason = absence(arguments.kernel, arguments.device)
    if reason:
        say(absent=reason, finished=True)
        return
    with only(arguments.kernel):
        for group, part in SHARES.items():
            share += part
            say(group=group, total=len(found[group]))
            left = share * arguments.seconds - (time.perf_counter() - start)
            run_group(found[group], left, clock)
    say(finished=True)


if __name__ == "__main__":
    main()
