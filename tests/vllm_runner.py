"""Run by a Python that has vLLM: greedy tokens of several models, one after another.

``python vllm_runner.py JOBS RESULTS`` reads a JSON object of jobs, each with the arguments of
``vllm.LLM``, the prompts, as texts or as ids, and how many tokens to write; it writes texts,
tokens, their log probabilities and how many tokens the cache holds, or the error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.inputs import TokensPrompt

    texts = isinstance(job["prompts"][0], str)
    llm = LLM(
        skip_tokenizer_init=not texts,
        enforce_eager=True,
        max_num_seqs=4,
        # vLLM 0.32's rotary kernel for CPUs takes a query of several heads for one head
        compilation_config={"custom_ops": ["all", "-rotary_embedding"]},
        attention_backend="CPU_MLA",  # the one for AMX, where that is, takes bfloat16 alone
        **job["llm"],
    )
    prompts = (
        job["prompts"] if texts else [TokensPrompt(prompt_token_ids=p) for p in job["prompts"]]
    )
    how = SamplingParams(
        temperature=0, max_tokens=job["count"], ignore_eos=True, detokenize=texts, logprobs=1
    )
    found = [written.outputs[0] for written in llm.generate(prompts, how, use_tqdm=False)]
    tokens = [list(one.token_ids) for one in found]
    logprobs = [[step[one].logprob for one, step in zip(*pair)] for pair in
                ((one.token_ids, one.logprobs) for one in found)]  # fmt: skip
    config = llm.llm_engine.vllm_config.cache_config
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    return {
        "tokens": tokens,
        "texts": [one.text for one in found],
        "logprobs": logprobs,
        "cache_tokens": (config.num_gpu_blocks or 0) * config.block_size,
    }


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    results: dict[str, Any] = {}
    for name, job in jobs.items():
        try:
            results[name] = run(job)
        except Exception as error:  # whatever vLLM raises is what a test looks at
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
