"""What a task is: problems, a prompt for each, and a way to mark what the model writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mlakit.evaluation.tasks.problems import Row


@dataclass(frozen=True)
class TaskOptions:
    """How tasks are asked.

    Attributes:
        limit: the first so many problems of each; all by default.
        shots: worked examples before each problem; by default what is usual for the task.
        samples: programs per HumanEval problem; pass@k is given for k up to this.
        temperature: of the sampling; by default 0 for one program and 0.8 for several.
        chat: wrap prompts in the tokenizer's chat template.
        batch_size: prompts at a time.
        run_generated_code: allow HumanEval to run the programs that the model writes.
        generations: folder for one JSONL of texts and marks per task and model, from which a run
            that was cut off goes on; None keeps none.
    """

    limit: int | None = None
    shots: int | None = None
    samples: int = 1
    temperature: float | None = None
    chat: bool = False
    batch_size: int = 8
    run_generated_code: bool = False
    generations: Path | None = None


class Grade(NamedTuple):
    """The marks of one problem.

    Attributes:
        marks: one between 0 and 1 for each measure, by its name.
        found: what was read out of each text, or why it failed; for the record.
    """

    marks: dict[str, float]
    found: list[str]


@dataclass(frozen=True)
class Task:
    """A task that mlakit asks and marks itself.

    Attributes:
        name: as on the command line.
        rows: the problems.
        write_prompt: the prompt of a problem, with so many examples.
        grade: marks the texts written for a problem.
        stop: strings that end a text.
        shots: worked examples before each problem.
        samples: texts per problem.
        temperature: 0 for the most likely text.
        chat: whether prompts go through the chat template.
        max_new_tokens: longest text.
        warnings: what a reader of the scores must know, one sentence each.
    """

    name: str
    rows: tuple[Row, ...]
    write_prompt: Callable[[Row, int], str]
    grade: Callable[[Row, Sequence[str]], Grade]
    stop: tuple[str, ...]
    shots: int = 0
    samples: int = 1
    temperature: float = 0.0
    chat: bool = False
    max_new_tokens: int = 512
    warnings: tuple[str, ...] = ()

    def prompt(self, row: Row) -> str:
        """What the model is given."""
        return self.write_prompt(row, self.shots)

    @property
    def top_p(self) -> float:
        """Of the sampling (Chen et al. 2021, section 2.2)."""
        return 0.95 if self.temperature else 1.0

    @property
    def settings(self) -> str:
        """How it is asked, in words."""
        how = "greedy"
        if self.temperature:
            count = "1 sample" if self.samples == 1 else f"{self.samples} samples"
            how = f"{count} at temperature {self.temperature:g}"
        count = "1 example" if self.shots == 1 else f"{self.shots} examples"
        examples = f"{count}, " if self.shots else ""
        return f"{examples}{'chat template, ' if self.chat else ''}{how}"
