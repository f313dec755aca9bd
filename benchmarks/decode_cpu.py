"""Decode speed on the CPU, in one run: the operator against this machine's own GEMM, and a whole
decoding step against transformers' DeepSeek-V3 with the same weights.

    python -m benchmarks.decode_cpu                # writes benchmarks/results/decode_cpu.json

Rivals take turns, step by step, so that a busy machine slows both. With one torch thread (the
default) the clock is the CPU time of that thread, which others' load does not count into; with
more it is the wall clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache

from mlakit.benching.environment import environment
from mlakit.nn.configs import MLALlamaConfig
from mlakit.nn.hf import new_cache
from mlakit.nn.models import MLALlamaForCausalLM
from mlakit.ops import mla_decode

RESULT = Path(__file__).parent / "results" / "decode_cpu.json"
RANK, ROPE, NOPE, VALUE, BLOCK = 512, 64, 128, 128, 64


def take_turns(
    rivals: dict[str, Callable[[], Any]],
    rounds: int,
    threads: int,
    pick: Callable[[list[float]], float] = statistics.median,
) -> dict[str, float]:
    """Median seconds of each rival, or what ``pick`` says, over rounds of one call each."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(rounds + 1):
        for name, run in rivals.items():
            start = clock()
            run()
            if turn:  # the first round warms up
                seconds[name].append(clock() - start)
    return {name: pick(values) for name, values in seconds.items()}


def time_operator(
    heads: int, length: int, batch: int, dtype: torch.dtype, rounds: int, threads: int
) -> dict[str, Any]:
    """``mla_decode`` as a share of the rate of a float32 2048^3 GEMM of the same rounds.

    Two calls a round: right after the GEMM, which leaves nothing in the caches, and once more. The
    fastest of the rounds on each side: others' use of the memory only ever adds.
    """
    blocks = -(-length // BLOCK)
    q = (torch.randn(batch, 1, heads, RANK + ROPE) / 10).to(dtype)
    k_cache = (torch.randn(batch * blocks, BLOCK, 1, RANK + ROPE) / 10).to(dtype)
    table = torch.randperm(batch * blocks).view(batch, blocks).int()
    seqlens = torch.full((batch,), length, dtype=torch.int32)
    square = torch.randn(2048, 2048)
    decode = partial(mla_decode, q, k_cache, table, seqlens, RANK, softmax_scale=0.04)
    seconds = take_turns(
        {"after gemm": decode, "decode": decode, "gemm": lambda: square @ square},
        2 * rounds,
        threads,
        min,
    )
    flops = 2 * batch * heads * length * (RANK + ROPE + RANK)
    rate, gemm = flops / seconds["decode"], 2 * 2048**3 / seconds["gemm"]
    return {
        "heads": heads,
        "length": length,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "milliseconds": round(seconds["decode"] * 1e3, 3),
        "gflops": round(rate / 1e9, 1),
        "gemm_gflops": round(gemm / 1e9, 1),
        "share_of_gemm": round(rate / gemm, 3),
        "share_of_gemm_from_cold_caches": round(flops / seconds["after gemm"] / gemm, 3),
    }


def build_pair(dtype: torch.dtype) -> tuple[DeepseekV3ForCausalLM, MLALlamaForCausalLM]:
    """A dense DeepSeek-V3 of random weights and our latent model with the very same tensors.

    DeepSeek's latent norm is live; ours is the same norm at the same small epsilon.
    """
    sizes = {
        "vocab_size": 1024, "hidden_size": 1024, "intermediate_size": 2048,
        "num_hidden_layers": 2, "num_attention_heads": 16, "kv_lora_rank": RANK,
        "qk_rope_head_dim": ROPE, "qk_nope_head_dim": NOPE, "v_head_dim": VALUE,
        "q_lora_rank": None, "rms_norm_eps": 1e-6, "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    torch.manual_seed(0)
    stock = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **sizes, num_key_value_heads=16, first_k_dense_replace=2, rope_interleave=False
        )
    )
    ours = MLALlamaForCausalLM(
        MLALlamaConfig(**sizes, latent_norm_eps=1e-6, softmax_scale=(NOPE + ROPE) ** -0.5)
    )
    ours.load_state_dict(stock.state_dict())
    return stock.to(dtype).eval(), ours.to(dtype).eval()


def reader(model: Any, prompt: torch.Tensor, steps: int) -> Callable[[], torch.Tensor]:
    """Read the prompt and return a function that decodes one more token."""
    batch, length = prompt.shape
    stock = isinstance(model, DeepseekV3ForCausalLM)
    cache = DynamicCache(config=model.config) if stock else new_cache(model, batch, length + steps)

    def step(tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    step(prompt)
    return lambda: step(prompt[:, :1])


@torch.inference_mode()
def time_decoding(
    length: int, batch: int, dtype: torch.dtype, rounds: int, threads: int
) -> dict[str, Any]:
    """Seconds per decoded token (the whole step) after ``length`` cached tokens."""
    stock, ours = build_pair(dtype)
    prompt = torch.randint(0, 1024, (batch, length))
    theirs, mine = reader(stock, prompt, rounds + 2), reader(ours, prompt, rounds + 2)
    difference = (theirs().float() - mine().float()).abs().max().item()
    seconds = take_turns({"transformers": theirs, "mlakit": mine}, rounds, threads)
    return {
        "layers": 2,
        "heads": 16,
        "length": length,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "transformers_milliseconds": round(seconds["transformers"] * 1e3, 2),
        "mlakit_milliseconds": round(seconds["mlakit"] * 1e3, 2),
        "speedup": round(seconds["transformers"] / seconds["mlakit"], 2),
        "largest_logit_difference": difference,
    }


def main() -> None:
    """Measure, print and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = "CPU time of one thread" if arguments.threads == 1 else "wall clock"
    before = environment()
    dtypes = (torch.float32, torch.bfloat16)
    operator, decode = [], []
    for dtype in dtypes:
        for heads in (16, 128):
            operator.append(
                time_operator(
                    heads, arguments.length, 4, dtype, arguments.rounds, arguments.threads
                )
            )
            print(operator[-1], flush=True)
    for dtype in dtypes:
        for batch in (1, 4):
            decode.append(
                time_decoding(arguments.length, batch, dtype, arguments.rounds, arguments.threads)
            )
            print(decode[-1], flush=True)
    result = {
        "environment": before,
        "load_average_after": environment()["load_average"],
        "clock": clock,
        "operator": operator,
        "decode": decode,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
