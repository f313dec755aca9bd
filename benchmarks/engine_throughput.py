"""Tokens per second of the serving engine at 1, 8 and 32 requests, and of one after the other.

    python -m benchmarks.engine_throughput     # writes benchmarks/results/engine_throughput.json

A model of random weights at a small real shape: what counts is the work, not the words. The engine
and ``generate``, which gets one prompt at a time, take turns, so that a busy machine slows both,
and their tokens are compared. With one torch thread (the default) the clock is the CPU time of
that thread.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.decode_cpu import take_turns
from benchmarks.random_checkpoint import DEMO
from transformers import AutoTokenizer

from mlakit.benching.environment import environment
from mlakit.generation import generate
from mlakit.nn.configs import MLALlamaConfig
from mlakit.nn.models import MLALlamaForCausalLM
from mlakit.serving.engine import Engine
from mlakit.serving.request import Piece, Sampling

RESULT = Path(__file__).parent / "results" / "engine_throughput.json"
BATCHES = (1, 8, 32)
ALONE = 4
"""Requests that ``generate`` writes one by one; more of them take as long each."""


def random_model(vocabulary: int) -> MLALlamaForCausalLM:
    """Latent attention of 256 + 64 columns in four layers of 1024 dimensions, float32."""
    torch.manual_seed(0)
    config = MLALlamaConfig(
        vocab_size=vocabulary, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4,
        num_attention_heads=16, kv_lora_rank=256, qk_rope_head_dim=64, qk_nope_head_dim=64,
        v_head_dim=64, latent_norm_eps=4.0**14, softmax_scale=64**-0.5,
        max_position_embeddings=4096, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    return MLALlamaForCausalLM(config).eval()


def measure(model: Any, tokenizer: Any, prompts: list[str], count: int, rounds: int) -> Any:
    """Tokens per second of both on the same prompts, prompts included in the time."""
    heard: dict[int, list[int]] = {}
    alone: dict[int, list[int]] = {}
    first: list[float] = []

    def serve() -> None:
        engine = Engine(model, tokenizer)
        first.clear()
        begun = time.thread_time()
        for index, prompt in enumerate(prompts):
            heard[index] = []

            def listen(piece: Piece, index: int = index) -> None:
                if not heard[index]:
                    first.append(time.thread_time() - begun)
                heard[index].extend(piece.token_ids)

            ids = tokenizer(prompt)["input_ids"]
            engine.submit(ids, Sampling(count, temperature=0.0, ignore_eos=True), listen)
        while engine.step():
            pass

    def one_by_one() -> None:
        for index, prompt in enumerate(prompts[:ALONE]):
            result = generate(model, tokenizer, [prompt], max_new_tokens=count)
            alone[index] = result.token_ids[0]

    seconds = take_turns({"engine": serve, "generate": one_by_one}, rounds, torch.get_num_threads())
    for index, tokens in alone.items():
        if heard[index] != tokens:
            raise SystemExit(f"request {index} differs from generate's text")
    engine = len(prompts) * count / seconds["engine"]
    one = len(alone) * count / seconds["generate"]
    return {
        "requests": len(prompts),
        "engine_tokens_per_second": round(engine, 1),
        "generate_tokens_per_second": round(one, 1),
        "speedup": round(engine / one, 2),
        "seconds_to_last_first_token": round(max(first), 3),
    }


def main() -> None:
    """Measure, print and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-length", type=int, default=96, help="characters")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.eos_token = None
    model = random_model(len(tokenizer))
    model.generation_config.eos_token_id = None
    text = "There was a little dog who liked to play in the park with all of his friends. " * 20
    before, rows = environment(), []
    for batch in BATCHES:
        prompts = [f"{n} {text[n : n + arguments.prompt_length]}" for n in range(batch)]
        rows.append(measure(model, tokenizer, prompts, arguments.new_tokens, arguments.rounds))
        print(rows[-1], flush=True)
    result = {
        "environment": before,
        "load_average_after": environment()["load_average"],
        "clock": "CPU time of one thread" if arguments.threads == 1 else "wall clock",
        "prompt_characters": arguments.prompt_length,
        "new_tokens": arguments.new_tokens,
        "throughput": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
