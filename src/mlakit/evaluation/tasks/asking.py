"""Asks a model the problems of a task, in batches, and marks what it writes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from mlakit.errors import MlakitError
from mlakit.evaluation.quality import Progress
from mlakit.evaluation.subject import Subject
from mlakit.evaluation.tasks.journal import Answer, Journal
from mlakit.evaluation.tasks.problems import Row
from mlakit.evaluation.tasks.task import Grade, Task, TaskOptions
from mlakit.generation import generate, prompt_ids

Write = Callable[[Task, Subject, Sequence[str], int, int], list[str]]
"""Texts for prompts of a task, given the batch size and the seed."""


def fit(task: Task, subject: Subject, context: int) -> Task:
    """The task as a context can hold it: at most half for the answer, fewer examples if need be.

    Problems that do not fit even without examples are left to fail. All is said in its warnings.
    """
    answer = min(task.max_new_tokens, context // 2)
    warnings = []
    if answer < task.max_new_tokens:
        warnings.append(f"{task.name}: answers end after {answer} tokens, half of the context")
    shots = task.shots
    while shots and any(
        _length(task.write_prompt(row, shots), task, subject) + answer > context
        for row in task.rows
    ):
        shots -= 1
    if shots < task.shots:
        warnings.append(
            f"{task.name}: {shots} of {task.shots} examples fit the context of {context} tokens"
        )
    fitted = replace(task, max_new_tokens=answer, shots=shots)
    long = sum(not fits(fitted, row, subject, context) for row in task.rows)
    if long:
        warnings.append(
            f"{task.name}: {long} of {len(task.rows)} problems do not fit the context of {context} "
            "tokens and count as failed"
        )
    return replace(fitted, warnings=tuple(warnings))


def fits(task: Task, row: Row, subject: Subject, context: int) -> bool:
    """Whether a problem and its answer fit a context."""
    return _length(task.prompt(row), task, subject) + task.max_new_tokens <= context


def ask(
    task: Task,
    subject: Subject,
    options: TaskOptions,
    *,
    role: str,
    context: int,
    seed: int,
    progress: Progress | None = None,
    write: Write | None = None,
) -> list[Grade]:
    """One model's marks, problem by problem.

    Args:
        task: as `fit` returns it.
        subject: the model.
        options: for the batch size and the folder of texts.
        role: such as ``source``, for progress and the file's name.
        context: tokens that prompt and answer may take.
        seed: seed of the sampling.
        progress: told about every problem.
        write: writes the texts; the model as it is by default.

    Raises:
        MlakitError: the batch does not fit the device's memory, or a text cannot be written.
    """
    path = options.generations and options.generations / f"{task.name}.{role}.jsonl"
    journal = Journal(path, _settings(task, subject, seed))
    open_ones = [number for number in range(len(task.rows)) if number not in journal.answers]
    size = max(1, options.batch_size // task.samples)
    for start in range(0, len(open_ones), size):
        batch = open_ones[start : start + size]
        texts = _texts(
            task, subject, batch, options.batch_size, context, seed, write or write_as_it_is
        )
        for number in batch:
            written = texts.get(number, [""] * task.samples)
            grade = task.grade(task.rows[number], written)
            if number not in texts:
                grade = grade._replace(found=["does not fit the context"])
            journal.add(number, Answer(written, grade))
            if progress:
                progress(f"{task.name}, {role}", len(journal.answers), len(task.rows))
    return [journal.answers[number].grade for number in range(len(task.rows))]


def _texts(
    task: Task,
    subject: Subject,
    batch: list[int],
    batch_size: int,
    context: int,
    seed: int,
    write: Write,
) -> dict[int, list[str]]:
    """The texts for those of some problems that fit."""
    fitting = [n for n in batch if fits(task, task.rows[n], subject, context)]
    if not fitting:
        return {}
    prompts = [task.prompt(task.rows[n]) for n in fitting for _ in range(task.samples)]
    try:
        written = write(task, subject, prompts, batch_size, seed)
    except torch.OutOfMemoryError as error:
        raise MlakitError(
            f"{subject.name} has no memory for {batch_size} prompts of {task.name} at a time",
            remedy="ask fewer at a time (--batch-size), or choose a device with more memory",
        ) from error
    return {
        number: written[place * task.samples : (place + 1) * task.samples]
        for place, number in enumerate(fitting)
    }


def write_as_it_is(
    task: Task, subject: Subject, prompts: Sequence[str], batch_size: int, seed: int
) -> list[str]:
    """The model's own texts, in batches."""
    return generate(
        subject.model,
        subject.tokenizer,
        prompts,
        max_new_tokens=task.max_new_tokens,
        temperature=task.temperature,
        top_p=task.top_p,
        stop=task.stop,
        seed=seed,
        batch_size=batch_size,
        chat=task.chat,
    ).texts


def _length(prompt: str, task: Task, subject: Subject) -> int:
    return len(prompt_ids(subject.tokenizer, prompt, task.chat))


def _settings(task: Task, subject: Subject, seed: int) -> dict[str, object]:
    """All that the answers depend on."""
    asked = [[task.prompt(row), row] for row in task.rows]
    return {
        "model": subject.name,
        "fingerprint": subject.fingerprint,
        "dtype": subject.dtype,
        "cache_format": getattr(subject.model.config, "cache_format", None),
        "problems": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        "how": task.settings,
        "stop": task.stop,
        "max_new_tokens": task.max_new_tokens,
        "seed": seed,
    }
