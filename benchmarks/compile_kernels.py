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
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mlakit.ops import CacheFormat, triton_decode
from mlakit.ops.call import DenseCall, SparseCall, dense_call, selection

RESULTS = Path(__file__).parent / "results"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.uint8: "*u8",
}  # fmt: skip
BATCH, PROCESSORS = 128, 132

SHARED_LIMIT = {
    "sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64,
}  # fmt: skip
"""KiB of shared memory that one program may have."""

FP8, MODEL1, INT8, INT4 = (
    CacheFormat("fp8", 512, 64), CacheFormat("model1", 448, 64), CacheFormat("int8", 512, 64),
    CacheFormat("int4", 512, 64),
)  # fmt: skip


def dense(
    heads: int,
    rank: int = 512,
    rope: int = 64,
    *,
    width: int | None = None,
    page: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    cache_format: CacheFormat | None = None,
    queries: int = 1,
    ragged: bool = False,
    **options: Any,
) -> DenseCall:
    """A call of tensors without memory."""
    row = cache_format.width if cache_format else rank + rope
    q = torch.empty(BATCH, queries, heads, width or row, dtype=dtype, device="meta")
    if cache_format:
        pages = cache_format.allocate(4096, page, "meta")
    else:
        pages = torch.empty(4096, page, 1, row, dtype=dtype, device="meta")
    table = torch.empty(BATCH, 64, dtype=torch.int32, device="meta")
    if ragged:
        starts = torch.empty(BATCH + 1, dtype=torch.int32, device="meta")
        q, options = q.flatten(0, 1), {**options, "cu_seqlens_q": starts, "max_seqlen_q": queries}
    return dense_call(
        q, pages, table, table[:, 0], rank, softmax_scale=1.0, cache_format=cache_format, **options
    )


def sparse(
    heads: int, cache_format: CacheFormat | None, *, rank: int = 512, caches: int = 1
) -> SparseCall:
    """A sparse call of tensors without memory: 2048 rows of each of one or two caches."""
    row = cache_format.width if cache_format else 576
    q = torch.empty(BATCH, 1, heads, row, dtype=torch.bfloat16, device="meta")
    some = torch.empty(BATCH, 1, 2048, dtype=torch.int32, device="meta")
    if cache_format:
        pages = cache_format.allocate(4096, 64, "meta")
    else:
        pages = torch.empty(4096, 64, 1, row, dtype=torch.bfloat16, device="meta")
    one = selection(q, pages, some, some[:, 0, 0], cache_format, rank)
    return SparseCall(q.flatten(0, 1), (one,) * caches, rank, 1.0, False)


PROBLEMS: dict[str, DenseCall | SparseCall] = {
    "512+64, 16 rows": dense(16),
    "512+64, 128 rows": dense(128),
    "512+64, 128 rows, pages of 16": dense(128, page=16),
    "512+64, 24 rows, window, cap, ragged": dense(
        24, queries=4, ragged=True, sliding_window=4096, soft_cap=50.0
    ),
    "512+64, 16 rows, window, cap, ragged": dense(
        16, queries=4, ragged=True, sliding_window=4096, soft_cap=50.0, batch_invariant=True
    ),
    "1024+1024 apart, 32 rows": dense(32, 1024, 1024, width=1024),
    "512+64 in float32, 16 rows": dense(16, dtype=torch.float32),
    "256+32, 32 rows": dense(32, 256, 32),
    "256+128, 128 rows": dense(128, 256, 128),
    "128+16, 128 rows, pages of 16": dense(128, 128, 16, page=16),
    "500+20, 128 rows": dense(128, 500, 20),
    "5+2, 1 row, pages of 24": dense(1, 5, 2, page=24),
    "fp8 512+64, 16 rows": dense(16, cache_format=FP8),
    "fp8 512+64, 128 rows": dense(128, cache_format=FP8),
    "model1 448+64, 128 rows": dense(128, cache_format=MODEL1),
    "int8 512+64, 128 rows": dense(128, cache_format=INT8),
    "int4 512+64, 128 rows": dense(128, cache_format=INT4),
    "fp8 256+64, 16 rows": dense(16, 256, cache_format=CacheFormat("fp8", 256, 64)),
    "fp8 1024+1024 apart, 32 rows": dense(
        32, 1024, width=1024, cache_format=CacheFormat("fp8", 1024, 1024)
    ),
    "fp8 512+64 in float32, 16 rows": dense(16, dtype=torch.float32, cache_format=FP8),
    "sparse bf16 512+64, 128 heads": sparse(128, None),
    "sparse fp8 512+64, 128 heads": sparse(128, FP8),
    "sparse bf16 512+64, 64 heads, two caches": sparse(64, None, caches=2),
    "sparse int4 512+64, 64 heads, two caches": sparse(64, INT4, caches=2),
    "sparse model1 448+64, 64 heads, two caches": sparse(64, MODEL1, rank=512, caches=2),
}
"""Calls that between them use every kind of tile, format and feature."""


def launches(target: str, call: DenseCall | SparseCall) -> dict[str, tuple[Any, dict, dict]]:
    """What a call launches on a target: per kernel's name itself, its arguments, its options."""
    found = {}

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            return self.record

        def record(self, *values: Any, **named: Any) -> None:
            arguments = dict(zip(self.kernel.arg_names, values))
            arguments |= {n: named.pop(n) for n in list(named) if n in self.kernel.arg_names}
            found[self.kernel.__name__] = (self.kernel, arguments, named)

    name = target if target.startswith("sm_") else "hip"
    with ExitStack() as stack:
        for kernel in ("plan", "attend", "combine"):
            recorder = Recorder(getattr(triton_decode, kernel))
            stack.enter_context(mock.patch.object(triton_decode, kernel, recorder))
        device = mock.patch.object(triton_decode, "_device", lambda _: (name, PROCESSORS))
        stack.enter_context(device)
        decode = triton_decode.decode if isinstance(call, DenseCall) else (
            triton_decode.decode_selected
        )  # fmt: skip
        decode(call)  # type: ignore[arg-type]
    return found


def compile_for(target: str, kernel: Any, arguments: dict[str, Any], **options: Any) -> Any:
    """Compile a kernel as a launch with these arguments would.

    Args:
        target: ``sm_90`` ..., or an AMD architecture.
        kernel: a ``triton.jit`` function.
        arguments: per name a pointer type such as ``*bf16``, a scalar type, an int (a divisor
            by 16 is told to the compiler and 1 built in, as a launch does), or a constexpr value.
        options: ``num_warps``, ``num_stages`` ...
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


def compile_kernel(target: str, problem: str, kernel: str = "attend") -> dict[str, Any]:
    """What a kernel that one of ``PROBLEMS`` launches occupies, and the tile chosen for it."""
    function, arguments, options = launches(target, PROBLEMS[problem])[kernel]
    arguments = {
        name: POINTERS[value.dtype] if isinstance(value, torch.Tensor)
        else "fp32" if isinstance(value, float) else value
        for name, value in arguments.items()
    }  # fmt: skip
    tile = {"tile": vars(arguments["TILE"])} if kernel == "attend" else {}
    return tile | resources(compile_for(target, function, arguments, **options))


def compile_all(target: str, problems: Iterable[str] = PROBLEMS) -> Iterator[tuple[str, dict]]:
    """Per kernel, what it occupies and whether it fits."""
    for problem in problems:
        yield problem, compile_kernel(target, problem)
    for kernel in ("plan", "combine"):
        for problem in ("512+64, 24 rows, window, cap, ragged", "sparse bf16 512+64, 128 heads"):
            yield f"{kernel} of {problem}", compile_kernel(target, problem, kernel)


def main() -> None:
    """Compile everything, write the JSON, and fail if a kernel spills or does not fit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=SHARED_LIMIT, action="append")
    parser.add_argument("--output", type=Path, default=RESULTS / "triton_compile.json")
    arguments = parser.parse_args()
    kernels: dict[str, dict[str, Any]] = {}
    bad = []
    for target in arguments.target or SHARED_LIMIT:
        kernels[target] = {}
        for name, used in compile_all(target):
            kernels[target][name] = used
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
