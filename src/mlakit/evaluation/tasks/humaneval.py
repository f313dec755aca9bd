"""HumanEval: functions completed from their docstring, judged by running their tests.

Chen et al. 2021, arXiv 2107.03374: prompts as they are, their stop strings, the unbiased pass@k.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from mlakit.errors import UsageError
from mlakit.evaluation.tasks.intervals import pass_at_k
from mlakit.evaluation.tasks.problems import Dataset, Row, read_problems
from mlakit.evaluation.tasks.sandbox import require_limits, run_program
from mlakit.evaluation.tasks.task import Grade, Task, TaskOptions

HUB = Dataset("openai/openai_humaneval", None, "test")
KEYS = ("task_id", "prompt", "entry_point", "test")
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")
"""Those of the paper, and the end of a Markdown block."""
AT = (1, 10, 100)
"""The k of pass@k, as far as there are samples."""
SAMPLED_TEMPERATURE = 0.8
"""The paper's best for pass@100; for pass@1 alone one greedy program is asked."""
BLOCK = re.compile(r"```[\w+-]*[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)
INSTRUCTION = "Complete this Python function. Answer with the whole function in one code block."


def open_humaneval(place: str | None, options: TaskOptions) -> Task:
    """The task on the problems of a file, or of the hub.

    Raises:
        UsageError: running generated code was not granted, this platform cannot limit it, or
            several samples without a temperature would all be the same.
        MlakitError: the problems cannot be read.
    """
    if not options.run_generated_code:
        raise UsageError(
            "humaneval runs the programs that the model writes, on this machine; they are limited "
            "in time, memory and access, but no such limit is perfect",
            remedy="if you accept that, preferably in a container: --run-generated-code",
        )
    require_limits()
    temperature = options.temperature
    if temperature is None:
        temperature = 0.0 if options.samples == 1 else SAMPLED_TEMPERATURE
    if options.samples > 1 and not temperature:
        raise UsageError(
            f"{options.samples} samples at temperature 0 would all be the same",
            remedy="ask for one sample, or a temperature above 0",
        )
    return Task(
        name="humaneval",
        rows=tuple(read_problems("humaneval", place, HUB, KEYS, options.limit)),
        write_prompt=partial(write_prompt, chat=options.chat),
        grade=grade,
        stop=() if options.chat else STOP,  # a chat model ends its turn
        samples=options.samples,
        temperature=temperature,
        chat=options.chat,
    )


def write_prompt(row: Row, shots: int, *, chat: bool = False) -> str:
    """The beginning of the function, for a chat model in a code block; there are no examples."""
    if chat:
        return f"{INSTRUCTION}\n\n```python\n{row['prompt'].strip()}\n```"
    return row["prompt"]


def grade(row: Row, texts: Sequence[str]) -> Grade:
    """Runs every text's program; pass@k for each k that there are samples for."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = list(pool.map(run_program, (program(row, text) for text in texts)))
    passed = sum(outcome.passed for outcome in outcomes)
    marks = {f"pass@{k}": pass_at_k(len(texts), passed, k) for k in AT if k <= len(texts)}
    return Grade(marks, [outcome.reason for outcome in outcomes])


def program(row: Row, text: str) -> str:
    """What is run: the function as the text completes or repeats it, and the tests."""
    block = BLOCK.search(text)
    answer = block[1] if block else text
    # A whole function is defined after the prompt's, whose imports and helpers it may need.
    gap = "\n\n" if f"def {row['entry_point']}(" in answer else ""
    return f"{row['prompt']}{gap}{answer}\n\n{row['test']}\n\ncheck({row['entry_point']})\n"
