"""Compile the Triton kernels for GPUs that are not here, and read what they would occupy.

    python -m benchmarks.compile_kernels                 # all targets, some minutes
    python -m benchmarks.compile_kernels --target sm_90

Every tile of the fixed table has to compile without spilling registers and within the target's
shared memory; the exit status says whether all do. No GPU and no driver is needed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mlakit.ops.triton_decode import COMBINE_ITEMS, PLAN_BLOCK, choose_tile
from mlakit.ops.triton_kernels import attend, combine, plan

RESULTS = Path(__file__).parent / "results"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}

SHARED_LIMIT = {
    "sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64,
}  # fmt: skip
"""KiB of shared memory that one program may have."""

PROBLEMS: dict[str, tuple[torch.dtype, int, int, int, int, int]] = {
    "512+64, 16 rows": (torch.bfloat16, 16, 512, 576, 576, 64),
    "512+64, 128 rows": (torch.bfloat16, 128, 512, 576, 576, 64),
    "512+64, 128 rows, pages of 16": (torch.bfloat16, 128, 512, 576, 576, 16),
    "1024+1024 apart, 32 rows": (torch.bfloat16, 32, 1024, 1024, 2048, 64),
    "512+64 in float32, 16 rows": (torch.float32, 16, 512, 576, 576, 64),
    "256+32, 32 rows": (torch.bfloat16, 32, 256, 288, 288, 64),
    "256+128, 128 rows": (torch.bfloat16, 128, 256, 384, 384, 64),
    "128+16, 128 rows, pages of 16": (torch.bfloat16, 128, 128, 144, 144, 16),
    "500+20, 128 rows": (torch.bfloat16, 128, 500, 520, 520, 64),
    "5+2, 1 row, pages of 24": (torch.bfloat16, 1, 5, 7, 7, 24),
}
"""Name: dtype, query rows of a kv head, C, W, columns of a cache row, page size."""


def compile_for(target: str, kernel: Any, arguments: dict[str, Any], **options: int) -> Any:
    """Compile a kernel as a launch with these arguments would.

    Args:
        target: ``sm_90`` ..., or an AMD architecture.
        kernel: a ``triton.jit`` function.
        arguments: per name a pointer type such as ``*bf16``, a scalar type, an int (a divisor
            by 16 is told to the compiler and 1 built in, as a launch does), or a constexpr value.
        options: ``num_warps`` and ``num_stages``.
    """
    signature, constants, divisible = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        special = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or (special and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = value if isinstance(value, str) else "i32"
        if str(value).startswith("*") or (special and value % 16 == 0):
            divisible[(index,)] = [["tt.divisibility", 16]]
    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    return triton.compile(
        ASTSource(kernel, signature, constants, divisible), target=gpu, options=options
    )


def resources(compiled: Any) -> dict[str, int]:
    """Registers per thread, bytes of spills per thread, and shared memory in bytes."""
    shared = int(compiled.metadata.shared)
    if "amdgcn" in compiled.asm:
        found = dict(
            re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", compiled.asm["amdgcn"])
        )
        spilled = 4 * int(found["vgpr_spill_count"])
        return {"registers": int(found["vgpr_count"]), "spilled": spilled, "shared": shared}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    used = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    if used is None:
        sys.exit(f"compile_kernels: cuobjdump names no registers: {listing}")
    return {"registers": int(used[1]), "spilled": int(used[2]), "shared": shared}


def compile_attend(target: str, problem: str, *, batch: int = 128) -> dict[str, Any]:
    """The tile chosen for one of ``PROBLEMS`` on a target, and what it occupies."""
    dtype, rows, rank, width, row, page = PROBLEMS[problem]
    tile = choose_tile(
        target if target.startswith("sm_") else "hip", dtype, rows, rank, width, row, row % 16 == 0
    )
    arguments: dict[str, Any] = dict.fromkeys(("q", "cache", "out"), f"*{NAMES[dtype]}")
    arguments |= dict.fromkeys(("table", "lengths", "first", "owner"), "*i32")
    arguments |= dict.fromkeys(("lse", "partial_out", "partial_lse"), "*fp32")
    arguments |= {
        "scale": "fp32", "batch": batch, "queries": 1, "group": rows, "kv_heads": 1,
        "row_tiles": -(-rows // tile.rows), "capacity": 64 * page, "q_batch_stride": rows * width,
        "q_query_stride": rows * width, "q_head_stride": width, "page_stride": page * row,
        "token_stride": row, "kv_head_stride": row, "table_stride": 64, "entry_stride": 1,
        "length_stride": 1, "RANK": rank, "WIDTH": width, "KEY_START": row - width, "CAUSAL": True,
        "PAGE": page, "SHARED": tile.shared, "ROWS": tile.rows, "TOKENS": tile.tokens,
        "VALUES": tile.values, "KEYS": tile.keys,
    }  # fmt: skip
    compiled = compile_for(target, attend, arguments, num_warps=tile.warps, num_stages=tile.stages)
    return {"tile": vars(tile), **resources(compiled)}


def compile_plan(target: str, *, batch: int = 128) -> dict[str, int]:
    """What ``plan`` occupies."""
    arguments: dict[str, Any] = dict.fromkeys(("lengths", "first", "owner"), "*i32")
    arguments |= {"batch": batch, "parts": batch, "capacity": 4096, "length_stride": 1}
    arguments |= {"TOKENS": 32, "BLOCK": PLAN_BLOCK}
    return resources(compile_for(target, plan, arguments))


def compile_combine(target: str, *, heads: int = 128) -> dict[str, int]:
    """What ``combine`` occupies."""
    arguments: dict[str, Any] = dict.fromkeys(("lse", "partial_out", "partial_lse"), "*fp32")
    arguments |= {"out": "*bf16", "first": "*i32", "queries": 1, "heads": heads, "group": heads}
    arguments |= {"RANK": 512, "COLUMNS": 512, "ITEMS": COMBINE_ITEMS}
    return resources(compile_for(target, combine, arguments))


def main() -> None:
    """Compile everything, write the JSON, and fail if a kernel spills or does not fit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=SHARED_LIMIT, action="append")
    parser.add_argument("--output", type=Path, default=RESULTS / "triton_compile.json")
    arguments = parser.parse_args()
    kernels: dict[str, dict[str, Any]] = {}
    bad = []
    for target in arguments.target or SHARED_LIMIT:
        row: dict[str, Any] = {problem: compile_attend(target, problem) for problem in PROBLEMS}
        row |= {"plan": compile_plan(target), "combine": compile_combine(target)}
        kernels[target] = row
        for name, used in row.items():
            fits = used["shared"] <= SHARED_LIMIT[target] * 1024 and not used["spilled"]
            bad += [] if fits else [f"{target} {name}"]
            print(f"{target} {name}: {used}", "" if fits else "DOES NOT FIT", flush=True)
    found: dict[str, Any] = {}
    if arguments.output.exists():
        found = json.loads(arguments.output.read_text(encoding="utf-8"))
    found.setdefault(triton.__version__, {}).update(kernels)
    arguments.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if bad:
        sys.exit(f"compile_kernels: spilled or too large: {', '.join(bad)}")


if __name__ == "__main__":
    main()
