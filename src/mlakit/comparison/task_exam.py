"""Tasks with right and wrong answers, asked of every variant as of the source."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from mlakit.baselines import Variant
from mlakit.comparison.writing import write
from mlakit.evaluation import Subject
from mlakit.evaluation.quality import Progress
from mlakit.evaluation.tasks import Asked, ChosenTasks, Way, ask_tasks, score_tasks
from mlakit.evaluation.tasks.task import Task, TaskOptions
from mlakit.generation import prompt_ids
from mlakit.generation.sampling import Sampling
from mlakit.reporting.schema import TaskScore


@dataclass(frozen=True)
class TaskExam:
    """The tasks of a comparison and the source's own answers.

    Attributes:
        source: the model that every variant is held against.
        chosen: what is asked; nothing where there is no task.
        seed: of sampling and intervals.
        progress: told (what, problems done, problems in all).
    """

    source: Subject
    chosen: ChosenTasks
    seed: int
    progress: Progress | None = None

    @property
    def identity(self) -> dict[str, object]:
        """All that answers depend on beside model and variant; empty without tasks."""
        if not self.chosen:
            return {}
        options = self.chosen.options
        own = [
            [task.name, task.settings, task.max_new_tokens, [task.prompt(row) for row in task.rows]]
            for task in self.chosen.own
        ]
        return {
            "tasks": hashlib.sha256(json.dumps(own).encode()).hexdigest(),
            "others": [*self.chosen.others, options.limit, options.shots, options.chat],
        }

    @cached_property
    def _own(self) -> Asked:
        return self._ask(self.source, Variant(self.source.model), "original")

    def scores(self, variant: Variant, title: str, *, original: bool) -> list[TaskScore]:
        """Every measure of a variant beside the source's, problem by problem.

        Args:
            variant: what is asked.
            title: names its file of texts.
            original: it is the source itself, which stands alone.
        """
        if not self.chosen:
            return []
        if original:
            return score_tasks(self.chosen, [self._own], self.seed)
        subject = Subject(title, variant.model, self.source.tokenizer)
        return score_tasks(self.chosen, [self._own, self._ask(subject, variant, title)], self.seed)

    def _ask(self, subject: Subject, variant: Variant, role: str) -> Asked:
        return ask_tasks(
            self.chosen,
            subject,
            role=role,
            context=self.source.context,
            seed=self.seed,
            progress=self.progress,
            way=Way(partial(_write, variant), _harness_model(variant, self.seed)),
        )


def _write(
    variant: Variant, task: Task, subject: Subject, prompts: Sequence[str], size: int, seed: int
) -> list[str]:
    """Texts for prompts, one after the other, as ``Way.write``."""
    sampling = Sampling(
        task.max_new_tokens, task.temperature, task.top_p, stop=task.stop, seed=seed
    )
    rows = [tuple(prompt_ids(subject.tokenizer, prompt, task.chat)) for prompt in prompts]
    return [
        write(variant, subject.tokenizer, row, sampling, rows[:place].count(row)).stream.text
        for place, row in enumerate(rows)
    ]


def _harness_model(variant: Variant, seed: int) -> Callable[[Subject, TaskOptions], Any]:
    def make(subject: Subject, options: TaskOptions) -> Any:
        from mlakit.comparison.harness_model import VariantModel

        return VariantModel(variant, subject, seed)

    return make
