"""Compile the Hopper kernels on a machine without a GPU, and read what they would occupy.

    python -m benchmarks.compile_gluon

Every kernel that a few typical calls launch, compiled with the arguments of the launch, for
sm_90a. It has to fit in shared memory, use the tensor cores without being serialised (what ptxas
warns of), and keep its registers in the loops over pages; ``local`` counts the instructions that
touch spilled ones.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver

from mlakit.ops import gluon_decode
from mlakit.ops.call import DenseCall, dense_call

RESULTS = Path(__file__).parent / "results"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PROCESSORS, SHARED_LIMIT = 132, 227 * 1024

PRODUCTS = {"seesaw": 44, "swapped": 52}
"""Instructions of matrix products in a loop over pages: one step's."""

LOCAL_LIMIT, STACK_LIMIT = 1, 64
"""Of a loop over pages, in the branch for pages that need masking; and bytes, mostly per item."""

KERNELS = ("plan", "seesaw", "swapped", "combine")
PROBLEMS: dict[str, dict[str, Any]] = {
    "128 heads": {},
    "128 heads, fp16": {"dtype": torch.float16},
    "64 heads, 2 queries, causal": {"heads": 64, "queries": 2},
    "64 heads, 2 queries": {"heads": 64, "queries": 2, "causal": False},
    "160 heads of 2 kv heads, 3 queries, causal": {"heads": 160, "kv_heads": 2, "queries": 3},
    "8 heads of 8 kv heads, 40 queries, causal": {"heads": 8, "kv_heads": 8, "queries": 40},
    "16 heads": {"heads": 16},
    "16 heads, fp16": {"heads": 16, "dtype": torch.float16},
    "32 heads": {"heads": 32},
    "16 heads, 2 queries, causal": {"heads": 16, "queries": 2},
    "9 heads of 3 kv heads, batch-invariant": {"heads": 9, "kv_heads": 3, "invariant": True},
}


class Hopper:
    """As much of a driver as compiling needs."""

    class utils:
        """What Triton asks of a device."""

        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": SHARED_LIMIT, "multiprocessor_count": PROCESSORS}

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


def call(
    *, heads: int = 128, kv_heads: int = 1, queries: int = 1, causal: bool = True,
    dtype: torch.dtype = torch.bfloat16, invariant: bool = False, batch: int = 4,
) -> DenseCall:  # fmt: skip
    """A call on the CPU, for its shapes."""
    q = torch.zeros(batch, queries, heads, 576, dtype=dtype)
    cache = torch.zeros(2, 64, kv_heads, 576, dtype=dtype)
    table = torch.zeros(batch, 64, dtype=torch.int32)
    return dense_call(
        q, cache, table, table[:, 0].contiguous(), 512, softmax_scale=0.1, causal=causal,
        batch_invariant=invariant,
    )  # fmt: skip


def compile_call(of: DenseCall) -> dict[str, Any]:
    """Each kernel that a call launches, compiled as the launch would."""
    found: dict[str, Any] = {}

    def compiling(name: str) -> Any:
        kernel = getattr(gluon_decode, name)

        def at(grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*arguments: Any, **options: Any) -> None:
                found[name] = kernel.warmup(*arguments, grid=grid, **options)

            return launch

        launcher = mock.MagicMock()
        launcher.__getitem__.side_effect = at
        return launcher

    stand_ins = {name: compiling(name) for name in KERNELS}
    with (
        mock.patch.object(driver, "_active", Hopper()),
        mock.patch.multiple(gluon_decode, _processors=lambda device: PROCESSORS, **stand_ins),
    ):
        gluon_decode.decode(of)
    return found


def occupied(compiled: Any) -> dict[str, Any]:
    """What a compiled kernel occupies, what it consists of, and what ptxas warns of."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        usage, listing = (
            subprocess.run(
                [TOOLS / "cuobjdump", what, cubin], capture_output=True, text=True, check=True
            ).stdout
            for what in ("-res-usage", "-sass")
        )
        again = subprocess.run(
            [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", ptx, "-o", cubin],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    lines = re.findall(r"/\*([0-9a-f]{4,6})\*/ +(.*?);", listing)
    code = [(int(address, 16), text) for address, text in lines]
    return {
        "registers": int(registers), "stack": int(stack), "shared": int(compiled.metadata.shared),
        "loops": page_loops(code, PRODUCTS.get(compiled.name, 0)), **count(code),
        "warnings": [line for line in again.splitlines() if re.search(r"warning|\(C7", line)],
    }  # fmt: skip


def count(code: list[tuple[int, str]]) -> dict[str, int]:
    """Instructions, and some kinds of them."""
    found = Counter(re.findall(r"\b(LDL|STL|HGMMA|UTMALDG|BAR)\b", " ".join(t for _, t in code)))
    return {
        "instructions": len(code), "local": found["LDL"] + found["STL"], "matrix": found["HGMMA"],
        "fetches": found["UTMALDG"], "syncs": found["BAR"],
    }  # fmt: skip


def page_loops(code: list[tuple[int, str]], products: int) -> list[dict[str, int]]:
    """What the loops over pages consist of: the shortest with so many products, without overlap.

    A loop is what lies between a branch backwards and where it goes. (Waiting, which the compiler
    moves out of the way, also branches back, over more than a loop.)
    """
    jumps = [
        (int(target[1], 16), address)
        for address, text in code
        if (target := re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)) and int(target[1], 16) < address
    ]
    found: list[tuple[int, int]] = []
    for start, end in sorted(jumps, key=lambda jump: jump[1] - jump[0]):
        inside = [(address, text) for address, text in code if start <= address <= end]
        overlaps = any(start <= other_end and other <= end for other, other_end in found)
        if products and not overlaps and count(inside)["matrix"] == products:
            found.append((start, end))
    return [count([(a, t) for a, t in code if start <= a <= end]) for start, end in found]


def compile_problem(problem: str) -> dict[str, dict[str, Any]]:
    """Per kernel of one of ``PROBLEMS``, what it occupies."""
    compiled = compile_call(call(**PROBLEMS[problem]))
    return {name: occupied(kernel) for name, kernel in compiled.items()}


def complaints(kernel: str, used: dict[str, Any]) -> list[str]:
    """What is wrong with a kernel."""
    found = list(used["warnings"])
    if used["shared"] > SHARED_LIMIT:
        found.append("does not fit in shared memory")
    if used["stack"] > STACK_LIMIT or any(loop["local"] > LOCAL_LIMIT for loop in used["loops"]):
        found.append("spills registers")
    if len(used["loops"]) != {"seesaw": 2, "swapped": 1}.get(kernel, 0):
        found.append("has other loops than expected")
    if kernel in ("seesaw", "swapped") and not (used["matrix"] and used["fetches"]):
        found.append("does not use the tensor cores and the accelerator")
    return found


def main() -> None:
    """Compile everything, write the JSON, and fail if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "gluon_compile.json")
    arguments = parser.parse_args()
    kernels: dict[str, Any] = {}
    bad = False
    for problem in PROBLEMS:
        kernels[problem] = compile_problem(problem)
        for name, used in kernels[problem].items():
            wrong = complaints(name, used)
            bad |= bool(wrong)
            print(f"{problem}: {name} {used}", *wrong, flush=True)
    found: dict[str, Any] = {}
    if arguments.output.exists():
        found = json.loads(arguments.output.read_text(encoding="utf-8"))
    found[triton.__version__] = kernels
    arguments.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if bad:
        sys.exit("compile_gluon: something is wrong, see above")


if __name__ == "__main__":
    main()
