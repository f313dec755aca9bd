"""Tasks with right and wrong answers: GSM8K and HumanEval here, all others through lm-eval."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from mlakit.errors import UsageError
from mlakit.evaluation.quality import Progress
from mlakit.evaluation.subject import Subject
from mlakit.evaluation.tasks.asking import Write, ask, fit, write_as_it_is
from mlakit.evaluation.tasks.gsm8k import open_gsm8k
from mlakit.evaluation.tasks.harness import (
    ask_harness,
    harness_scores,
    open_harness,
    ordinary_model,
)
from mlakit.evaluation.tasks.humaneval import open_humaneval
from mlakit.evaluation.tasks.intervals import compare
from mlakit.evaluation.tasks.task import Grade, Task, TaskOptions
from mlakit.reporting.schema import TaskScore

__all__ = [
    "Asked",
    "ChosenTasks",
    "TaskOptions",
    "Way",
    "ask_tasks",
    "fit_tasks",
    "open_tasks",
    "run_tasks",
    "score_tasks",
]

OWN = {"gsm8k": open_gsm8k, "humaneval": open_humaneval}
BETWEEN = re.compile(r",(?=[\w-]+(?:=|,|$))")
"""The commas between tasks; others belong to a file's name."""


@dataclass(frozen=True)
class ChosenTasks:
    """Tasks that can be asked.

    Attributes:
        own: those that mlakit asks itself, their problems read.
        others: names for lm-eval.
        manager: its task manager, where there are others.
        options: how to ask.
    """

    own: tuple[Task, ...]
    others: tuple[str, ...]
    manager: Any
    options: TaskOptions

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self.own or self.others)


def open_tasks(given: Sequence[str], options: TaskOptions) -> ChosenTasks:
    """Reads the problems and finds all that can be wrong before any weight is read.

    Args:
        given: task names, several of them between commas if need be; ``gsm8k`` and ``humaneval``
            as ``name=file`` take their problems from a JSONL file, others as ``name=folder`` their
            definition from a folder.
        options: how to ask.

    Raises:
        UsageError: a task is unknown, twice there or not allowed, or an option is for no task.
        MlakitError: problems cannot be read.
    """
    places: dict[str, str | None] = {}
    for item in [part for text in given for part in BETWEEN.split(text)]:
        name, _, place = item.partition("=")
        if not name or name in places:
            raise UsageError(f"the task {name!r} is given twice" if name else "a task has no name")
        places[name] = place or None
    _check(places, options)
    own = tuple(OWN[name](place, options) for name, place in places.items() if name in OWN)
    others = {name: place for name, place in places.items() if name not in OWN}
    manager = open_harness(others) if others else None
    return ChosenTasks(own, tuple(others), manager, options)


def _check(places: dict[str, str | None], options: TaskOptions) -> None:
    numbers = {"limit": options.limit, "samples": options.samples, "batch size": options.batch_size}
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise UsageError(f"the {name} of tasks must be at least 1, not {number}")
    alone = TaskOptions(generations=options.generations)
    if not places and options != alone:
        raise UsageError("there are options for tasks, but no tasks", remedy="--tasks gsm8k")
    sampled = replace(options, samples=1, temperature=None)
    if "humaneval" not in places and options != sampled:
        raise UsageError(
            "samples and a temperature are for humaneval only; the other tasks say themselves how "
            "they are asked",
            remedy="leave them out, or add humaneval to the tasks",
        )


def fit_tasks(chosen: ChosenTasks, source: Subject, result: Subject | None) -> ChosenTasks:
    """The tasks as the shorter of the models' contexts can hold them.

    Raises:
        UsageError: the tokenizer has no chat template, and prompts are to go through one.
    """
    context = _context(source, result)
    return replace(chosen, own=tuple(fit(task, source, context) for task in chosen.own))


def run_tasks(
    chosen: ChosenTasks,
    source: Subject,
    result: Subject | None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[TaskScore]:
    """Every measure of every task, of one model or of two on the same problems.

    Raises:
        MlakitError: see ``ask_tasks``.
    """
    context = _context(source, result)
    asked = [
        ask_tasks(chosen, subject, role=role, context=context, seed=seed, progress=progress)
        for role, subject in (("source", source), ("result", result))
        if subject is not None
    ]
    return score_tasks(chosen, asked, seed)


class Way(NamedTuple):
    """How a model is asked: as it is, unless somebody has another way.

    Attributes:
        write: the texts of mlakit's own tasks, see ``asking.Write``.
        harness_model: lm-eval's model for the others.
    """

    write: Write = write_as_it_is
    harness_model: Callable[[Subject, TaskOptions], Any] = ordinary_model


class Asked(NamedTuple):
    """One model's answers: marks of every problem of mlakit's tasks, and lm-eval's record."""

    grades: list[list[Grade]]
    record: Any


def ask_tasks(
    chosen: ChosenTasks,
    subject: Subject,
    *,
    role: str,
    context: int,
    seed: int,
    progress: Progress | None = None,
    way: Way | None = None,
) -> Asked:
    """One model's answers to every task.

    Args:
        chosen: as ``fit_tasks`` returns them.
        subject: the model.
        role: names it in progress and in files of texts.
        context: tokens that prompt and answer may take.
        seed: of sampling.
        progress: told about every problem.
        way: how it is asked.

    Raises:
        MlakitError: a batch does not fit the device's memory, a text cannot be written, or lm-eval
            failed.
    """
    way = way or Way()
    options = chosen.options
    grades = [
        ask(
            task,
            subject,
            options,
            role=role,
            context=context,
            seed=seed,
            progress=progress,
            write=way.write,
        )
        for task in chosen.own
    ]
    if not chosen.others:
        return Asked(grades, None)
    if progress:
        progress(f"lm-eval, {role}", 0, 1)
    model = way.harness_model(subject, options)
    return Asked(
        grades, ask_harness(chosen.manager, chosen.others, model, subject.name, options, seed)
    )


def score_tasks(chosen: ChosenTasks, asked: Sequence[Asked], seed: int) -> list[TaskScore]:
    """Every measure of every task, from the answers of one model or of two."""
    own = zip(chosen.own, *(each.grades for each in asked), strict=True)
    scores = [score for task, *grades in own for score in _scores(task, grades, seed)]
    if chosen.others:
        scores += harness_scores([each.record for each in asked], seed)
    return scores


def _scores(task: Task, grades: list[list[Grade]], seed: int) -> list[TaskScore]:
    scores = []
    for measure in grades[0][0].marks:
        columns = [[grade.marks[measure] for grade in column] for column in grades]
        scores.append(
            TaskScore(
                task=task.name,
                measure=measure,
                problems=len(task.rows),
                settings=task.settings,
                warnings=list(task.warnings),
                **compare(*columns, seed=seed),
            )
        )
    return scores


def _context(source: Subject, result: Subject | None) -> int:
    return min(subject.context for subject in (source, result) if subject is not None)
