"""Is the operator right on this card, how fast is it, and how fast is a model on top of it?

    python -m benchmarks.gpu_suite                         # a CUDA device, some minutes
    python -m benchmarks.gpu_suite --device cpu --quick    # the same steps in seconds, no figures

Three parts, one JSON: correctness against float64 (if it fails, nothing is timed), the operator at
FlashMLA's two standard shapes beside the copy and matmul ceilings of the card, and decoding with
a model of random weights. GB/s and TFLOPS are counted as FlashMLA's benchmark counts them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.environment import environment
from torch import Tensor

from mlakit.ops import mla_decode
from mlakit.ops.choose import choose
from mlakit.ops.reference import reference_decode

RESULTS = Path(__file__).parent / "results"
RANK, ROPE, BLOCK = 512, 64, 64
OUT_ABSOLUTE, OUT_RELATIVE, LSE_RELATIVE = 8e-4, 2.01 / 128, 8.01 / 65536  # FlashMLA's tests


def tensors(
    lengths: list[int], heads: int, queries: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random q, cache, table and lengths; pages shuffled, rows that no sequence uses NaN."""
    blocks = math.ceil(max(lengths) / BLOCK)
    q = torch.randn(len(lengths), queries, heads, RANK + ROPE, device=device) / 10
    k_cache = torch.randn(len(lengths) * blocks, BLOCK, 1, RANK + ROPE, device=device) / 10
    table = torch.randperm(len(lengths) * blocks, device=device).view(len(lengths), blocks)
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
    position = torch.arange(blocks * BLOCK, device=device).view(1, blocks, BLOCK)
    unused = torch.zeros(len(lengths) * blocks, BLOCK, dtype=torch.bool, device=device)
    unused[table] = position >= seqlens[:, None, None]
    k_cache[unused] = math.nan
    return q.clamp(-1, 1).to(dtype), k_cache.clamp(-1, 1).to(dtype), table.int(), seqlens


def check_correctness(device: str) -> dict[str, Any]:
    """A small matrix against float64 on the CPU, at FlashMLA's tolerances."""
    cases, failures, worst = 0, [], 0.0
    for heads, queries, dtype, causal in itertools.product(
        (1, 16, 128), (1, 2), (torch.bfloat16, torch.float16), (False, True)
    ):
        for lengths in ([20, 140], [0, 1, 577]):
            args = tensors(lengths, heads, queries, dtype, device)
            out, lse = mla_decode(*args, RANK, softmax_scale=0.04, causal=causal)
            true_out, true_lse = reference_decode(*(t.cpu() for t in args), RANK, 0.04, causal)
            out, lse = out.double().cpu(), lse.double().cpu()
            error = (out - true_out).abs()
            close = (error < OUT_ABSOLUTE) | (error < OUT_RELATIVE * true_out.abs())
            off = (lse - true_lse).abs().nan_to_num(nan=0.0, posinf=0.0)
            lse_close = (off < 1e-6) | (off < LSE_RELATIVE * true_lse.abs())
            same_empty = torch.equal(lse.isinf(), true_lse.isinf())
            cases, worst = cases + 1, max(worst, error.max().item())
            if not (close.all() and lse_close.all() and same_empty):
                failures.append({"heads": heads, "queries": queries, "lengths": lengths,
                                 "dtype": str(dtype), "causal": causal})  # fmt: skip
    return {"cases": cases, "failures": failures, "largest_output_error": worst}


def seconds_of(run: Callable[[], Any], device: str, repeats: int) -> float:
    """Median seconds of one call after two to warm up, by device events on CUDA."""
    run()
    run()
    values = []
    for _ in range(repeats):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            values.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            run()
            values.append(time.perf_counter() - begin)
    return statistics.median(values)


def measure_ceilings(device: str, quick: bool) -> dict[str, float]:
    """What the card can do: GB/s of a copy (read plus write), TFLOPS of a bfloat16 matmul."""
    count, size = (2**20, 256) if quick else (2**30, 8192)
    source = torch.empty(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    copy = seconds_of(lambda: target.copy_(source), device, 5 if quick else 20)
    matmul = seconds_of(lambda: matrix @ matrix, device, 5 if quick else 20)
    return {"copy_gb_per_s": 2 * count / copy / 1e9, "matmul_tflops": 2 * size**3 / matmul / 1e12}


def time_operator(heads: int, length: int, batch: int, device: str, repeats: int) -> dict[str, Any]:
    """One ``mla_decode`` call in bfloat16, one query per sequence.

    FLOP = 2 B H T (576 + 512); bytes = 2 (B H 576 + B T 576 + B H 512), each row once.
    """
    args = tensors([length] * batch, heads, 1, torch.bfloat16, device)
    seconds = seconds_of(lambda: mla_decode(*args, RANK, softmax_scale=0.04), device, repeats)
    width = RANK + ROPE
    flops = 2 * batch * heads * length * (width + RANK)
    moved = 2 * (batch * heads * width + batch * length * width + batch * heads * RANK)
    return {"heads": heads, "length": length, "batch": batch, "milliseconds": seconds * 1e3,
            "gb_per_s": moved / seconds / 1e9, "tflops": flops / seconds / 1e12}  # fmt: skip


@torch.inference_mode()
def time_model(device: str, quick: bool) -> dict[str, Any]:
    """Tokens per second of a latent Llama of random weights, greedy, on a LatentCache."""
    # Imported here: transformers is slow to load, and the two parts before do without it.
    from mlakit.nn.configs import MLALlamaConfig
    from mlakit.nn.hf import cache_nbytes, new_cache
    from mlakit.nn.models import MLALlamaForCausalLM

    hidden, layers, heads = (64, 2, 4) if quick else (2048, 8, 16)
    batch, prompt_length, steps = (2, 16, 4) if quick else (16, 2048, 32)
    config = MLALlamaConfig(
        vocab_size=32000 if not quick else 256, hidden_size=hidden, num_hidden_layers=layers,
        intermediate_size=3 * hidden, num_attention_heads=heads, kv_lora_rank=RANK,
        max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MLALlamaForCausalLM(config).to(device=device, dtype=torch.bfloat16).eval()
    cache = new_cache(model, batch, prompt_length + steps + 2)
    ids = torch.randint(0, config.vocab_size, (batch, prompt_length), device=device)

    def step() -> None:
        nonlocal ids
        output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids = output.logits.argmax(-1)

    step()  # reads the prompt
    seconds = seconds_of(step, device, steps)
    return {"hidden": hidden, "layers": layers, "heads": heads, "batch": batch,
            "prompt_length": prompt_length, "milliseconds_per_step": seconds * 1e3,
            "tokens_per_s": batch / seconds, "cache_bytes": cache_nbytes(cache)}  # fmt: skip


def main() -> None:
    """Run the parts in order and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to test the suite")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device, quick = arguments.device, arguments.quick
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_suite: torch sees no CUDA device; --device cpu --quick runs its steps on CPU")
    torch.manual_seed(0)
    choice = choose(device, torch.bfloat16, os.environ.get("MLAKIT_KERNEL"))
    result: dict[str, Any] = {
        "environment": environment(), "device": device, "quick": quick,
        "kernel": {"name": choice.name, "reason": choice.reason},
        "correctness": check_correctness(device),
    }  # fmt: skip
    if result["correctness"]["failures"]:
        sys.exit(f"gpu_suite: wrong results, not timed: {result['correctness']['failures']}")
    shapes = ((4, 128, 2),) if quick else tuple((h, 4096, 128) for h in (16, 128))
    result["ceilings"] = measure_ceilings(device, quick)
    result["operator"] = [time_operator(*shape, device, 3 if quick else 20) for shape in shapes]
    result["model"] = time_model(device, quick)
    output = arguments.output or RESULTS / f"gpu_suite_{device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
