"""Is the operator right on this card, how fast is it, and how fast is a model on top of it?

    python -m benchmarks.gpu_suite                         # a CUDA device, under eight minutes
    python -m benchmarks.gpu_suite --device cpu --quick    # the same steps in half a minute

Three parts, each in processes of its own with a time limit: correctness of every kernel against
float64, the two sweeps of ``mlakit bench decode``, and GQA models against latent ones. A kernel
that is wrong is not timed; the others are, and the exit code is 1. The JSON is written again
whenever something is known, so that what was found survives whatever happens next.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu_suite.lines import Ending, listen
from benchmarks.gpu_suite.picture import draw

from mlakit.benching.environment import environment
from mlakit.ops.choose import FILES
from mlakit.reporting.files import write_file

RESULTS = Path(__file__).resolve().parents[1] / "results"
KERNELS = {"cuda": ["gluon", "triton", "flash_mla"], "cpu": ["cpu", "torch"]}
SHARES = {"correctness": 0.40, "kernels": 0.34, "end_to_end": 0.26}
GRACE = 35.0
"""Seconds beyond its own limit after which a part is ended: it may be compiling, or hang."""


class Suite:
    """One run: what was found so far, and the file it is in."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device, self.quick = arguments.device, arguments.quick
        self.kernels = arguments.kernels or KERNELS[self.device]
        self.seconds, self.output = arguments.seconds, arguments.output
        self.lock = threading.Lock()
        self.result: dict[str, Any] = {
            "environment": environment(),
            "device": self.device,
            "quick": self.quick,
            "seconds": {},
            "correctness": {},
            "ceilings": None,
            "shapes": [],
            "end_to_end": [],
            "notes": [],
            "failures": [],
        }

    def save(self) -> None:
        """Writes the JSON as it is now, whole or not at all."""
        write_file(self.output, (json.dumps(self.result, indent=1) + "\n").encode())

    def run(self) -> None:
        """All parts in order."""
        self.timed("correctness", self.correctness)
        right = [name for name in self.kernels if self.is_right(name)]
        self.timed("kernels", lambda: self.time_kernels(right))
        self.timed("end_to_end", lambda: self.time_models(right))
        try:
            write_file(self.output.with_suffix(".png"), draw(self.result))
        except Exception as error:  # a picture must not cost the figures
            self.note(f"no picture: {type(error).__name__}: {error}")
        self.save()

    def timed(self, part: str, work: Any) -> None:
        """Runs a part, and records how long it took."""
        start = time.perf_counter()
        work()
        self.result["seconds"][part] = round(time.perf_counter() - start, 1)
        self.save()
        print(f"{part}: {self.result['seconds'][part]} s", file=sys.stderr)

    def note(self, text: str) -> None:
        """Something the reader should know."""
        self.result["notes"].append(text)

    def limit(self, part: str) -> float:
        """Seconds a part may take."""
        return self.seconds * SHARES[part]

    def options(self, seconds: float) -> list[str]:
        """What every part is told."""
        quick = ["--quick"] if self.quick else []
        return ["--device", self.device, "--seconds", f"{seconds:.0f}", *quick]

    def correctness(self) -> None:
        """Every kernel at the same time, each in its process: nothing is timed here."""
        threads = [threading.Thread(target=self.check, args=(name,)) for name in self.kernels]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def check(self, kernel: str) -> None:
        """One kernel; a failure, a hang or a crash is its own and nobody else's."""
        found: dict[str, Any] = {
            "right": 0, "refused": {}, "failures": [], "largest_error": 0.0, "groups": {},
        }  # fmt: skip
        self.result["correctness"][kernel] = found
        last: dict[str, Any] = {"now": "the start", "finished": False, "absent": ""}

        def hear(line: dict[str, Any]) -> None:
            if "now" in line or "finished" in line:
                last.update(line)
                return
            with self.lock:
                _count(found, line)
                if line.get("status") == "wrong":
                    self.fail(f"{kernel}: {line['group']}: {line['case']}: {line['why']}")

        arguments = ["--kernel", kernel, *self.options(self.limit("correctness"))]
        limit = self.limit("correctness") + GRACE
        ending = listen("benchmarks.gpu_suite.correctness", arguments, limit, hear)
        with self.lock:
            found["finished"], found["absent"] = bool(last["finished"]), last["absent"]
            if not found["finished"]:
                found["failures"].append(_obituary(ending, str(last["now"])))
                self.fail(f"{kernel}: {found['failures'][-1]}")
            self.save()

    def fail(self, text: str) -> None:
        """Something that makes the exit code 1."""
        self.result["failures"].append(text)
        print(f"FAILED: {text}", file=sys.stderr)
        self.save()

    def is_right(self, kernel: str) -> bool:
        """Whether a kernel may be timed: it ran, and nothing was wrong."""
        found = self.result["correctness"][kernel]
        return found["finished"] and found["right"] > 0 and not found["failures"]

    def time_kernels(self, right: list[str]) -> None:
        """The sweeps, with the kernels that are right and every rival installed.

        Whoever breaks the device is left out, and the others go on at the shape where it was.
        """
        # flash_mla is among the rivals already, without our checks around it.
        ours = [name for name in right if name != "flash_mla"]
        rivals_out: list[str] = []
        end = time.perf_counter() + self.limit("kernels")
        while (left := end - time.perf_counter()) > 0:
            lost: list[str] = []
            hear = partial(self.hear_kernels, ours, lost)
            arguments = [
                "--kernels", *ours, "--without", *rivals_out,
                "--skip", str(len(self.result["shapes"])), *self.options(left),
            ]  # fmt: skip
            module = "benchmarks.gpu_suite.kernels"
            ending = listen(module, arguments, left + GRACE, hear)
            if not lost:
                self.expect("kernels", ending)
                return
            ours = [name for name in ours if name not in lost]
            rivals_out += lost

    def hear_kernels(self, ours: list[str], lost: list[str], line: dict[str, Any]) -> None:
        """One line of the sweeps; ``lost`` takes the name of who broke the device."""
        if "ceilings" in line:
            self.result["ceilings"] = line["ceilings"]
        elif "shape" in line:
            self.result["shapes"].append(line["shape"])
            for gone in line["shape"]["missing"]:
                if gone["failed"] and gone["contender"] in ours:
                    self.fail(f"{gone['contender']}: timing: {gone['reason']}")
        elif "lost" in line:
            lost.append(line["lost"])
            tell = self.fail if line["lost"] in ours else self.note
            tell(f"timing: {line['why']}")
        self.save()

    def time_models(self, right: list[str]) -> None:
        """GQA against MLA, with the kernel that would be chosen or the first that is right."""
        environment = dict(os.environ)
        if right and right[0] != self.kernels[0]:
            environment["MLAKIT_KERNEL"] = right[0]
            self.note(f"end to end ran with {right[0]}")
        elif not right:
            self.note("end to end was not run: no kernel is right")
            return

        def hear(line: dict[str, Any]) -> None:
            if "row" in line:
                self.result["end_to_end"].append(line["row"])
            elif "skipped" in line:
                self.note(f"end to end: {line['skipped']}: {line['reason']}")
            self.save()

        module = "benchmarks.gpu_suite.end_to_end"
        options = self.options(self.limit("end_to_end"))
        limit = self.limit("end_to_end") + GRACE
        self.expect("end_to_end", listen(module, options, limit, hear, environment))

    def expect(self, part: str, ending: Ending) -> None:
        """A part that did not end well is a failure."""
        if ending.code:
            done = self.result["shapes" if part == "kernels" else "end_to_end"]
            self.fail(f"{part}: {_obituary(ending, f'after {len(done)} results')}")


def _count(found: dict[str, Any], line: dict[str, Any]) -> None:
    """Adds one line of a kernel's correctness to what is known of it."""
    group = found["groups"].setdefault(line["group"], {"total": 0, "tried": 0})
    if "total" in line:
        group["total"] = line["total"]
    if "left_out" in line:
        group["left_out_for_time"] = line["left_out"]
    if "status" not in line:
        return
    group["tried"] += 1
    found["largest_error"] = max(found["largest_error"], line.get("error", 0.0))
    if line["status"] == "right":
        found["right"] += 1
    elif line["status"] == "refused":
        found["refused"][line["why"]] = found["refused"].get(line["why"], 0) + 1
    else:
        found["failures"].append(f"{line['group']}: {line['case']}: {line['why']}")


def _obituary(ending: Ending, where: str) -> str:
    """How a process ended that should not have."""
    if ending.out_of_time:
        return f"ended at its time limit, at {where}"
    last = (ending.errors.strip().splitlines() or ["no words on stderr"])[-1]
    return f"broke with status {ending.code} at {where}: {last}"


def main() -> None:
    """Runs the suite; exit code 1 if anything of ours was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--kernels", nargs="+", choices=tuple(FILES), help="default: all there are")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to test the suite")
    parser.add_argument("--seconds", type=float, default=360.0, help="for all parts together")
    parser.add_argument("--output", type=Path, help="the JSON; a PNG is written beside it")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_suite: torch sees no CUDA device; --device cpu --quick runs its steps on CPU")
    arguments.output = arguments.output or RESULTS / f"gpu_suite_{arguments.device}.json"
    suite = Suite(arguments)
    suite.run()
    for kernel, found in suite.result["correctness"].items():
        if found["absent"]:
            print(f"{kernel}: not here: {found['absent']}")
            continue
        refused = sum(found["refused"].values())
        print(f"{kernel}: {found['right']} right, {len(found['failures'])} wrong, "
              f"{refused} refused")  # fmt: skip
    print(f"written to {arguments.output} and {arguments.output.with_suffix('.png').name}")
    if suite.result["failures"]:
        sys.exit(f"gpu_suite: {len(suite.result['failures'])} failures, the first: "
                 f"{suite.result['failures'][0]}")  # fmt: skip


if __name__ == "__main__":
    main()
