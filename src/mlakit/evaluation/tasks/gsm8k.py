"""GSM8K: school problems, answered with a chain of thought (Cobbe et al. 2021, arXiv 2110.14168).

The prompt is the usual one: worked examples as ``Question: ... Answer: ...``, each answer in steps
and closed by ``####`` and the number (Wei et al. 2022, arXiv 2201.11903, for why steps are shown).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from functools import partial

from mlakit.errors import MlakitError, UsageError
from mlakit.evaluation.tasks.gsm8k_examples import EXAMPLES
from mlakit.evaluation.tasks.problems import Dataset, Row, read_problems
from mlakit.evaluation.tasks.task import Grade, Task, TaskOptions

HUB = Dataset("openai/gsm8k", "main", "test")
KEYS = ("question", "answer")
NUMBER = re.compile(
    r"\$?(?:(?<![\w)])[-−])?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
)
"""A minus sign counts only where nothing stands before it that it could subtract from."""
INSTRUCTION = (
    "Solve the last problem step by step. End with a line that holds #### and the number.\n\n"
)


def open_gsm8k(place: str | None, options: TaskOptions) -> Task:
    """The task on the problems of a file, or of the hub.

    Raises:
        UsageError: more examples are asked for than there are.
        MlakitError: the problems cannot be read, or one has no answer.
    """
    shots = len(EXAMPLES) if options.shots is None else options.shots
    if not 0 <= shots <= len(EXAMPLES):
        raise UsageError(f"gsm8k has {len(EXAMPLES)} worked examples, not {shots}")
    rows = read_problems("gsm8k", place, HUB, KEYS, options.limit)
    for number, row in enumerate(rows, start=1):
        if marked_number(row["answer"]) is None:
            raise MlakitError(f"problem {number} of gsm8k has no number after #### in its answer")
    return Task(
        name="gsm8k",
        rows=tuple(rows),
        write_prompt=partial(write_prompt, chat=options.chat),
        grade=grade,
        # A base model goes on with a problem of its own; a chat model ends its turn.
        stop=() if options.chat else ("Question:",),
        shots=shots,
        chat=options.chat,
    )


def write_prompt(row: Row, shots: int, *, chat: bool = False) -> str:
    """Examples, then the question; for a chat model the instruction before them."""
    shown = [f"Question: {q}\nAnswer: {a}\n\n" for q, a in EXAMPLES[:shots]]
    return "".join([INSTRUCTION if chat else "", *shown, f"Question: {row['question']}\nAnswer:"])


def grade(row: Row, texts: Sequence[str]) -> Grade:
    """Both matches of the one text."""
    (text,) = texts
    wanted = marked_number(row["answer"])
    strict, flexible = marked_number(text), final_number(text)
    marks = {"strict match": float(strict == wanted), "flexible match": float(flexible == wanted)}
    return Grade(marks, ["" if flexible is None else str(flexible)])


def marked_number(text: str) -> Decimal | None:
    """The number right after the first ``####``: what a strict match compares."""
    _, mark, rest = text.partition("####")
    found = NUMBER.match(rest.lstrip(" ")) if mark else None
    return None if found is None else _decimal(found[0])


def final_number(text: str) -> Decimal | None:
    """The number after ``####`` if there is one, else the last number of the text."""
    marked = marked_number(text)
    numbers = NUMBER.findall(text) if marked is None else []
    return _decimal(numbers[-1]) if numbers else marked


def _decimal(number: str) -> Decimal:
    """Without dollar signs and commas; 18.00 equals 18."""
    return Decimal(re.sub("[$,]", "", number).replace("−", "-"))
