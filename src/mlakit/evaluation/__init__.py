"""Measuring a model, or a result against its source: quality, recall, memory, speed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from mlakit.evaluation.environment import describe_environment
from mlakit.evaluation.memory import measure_memory, summarise_models, whole_pages
from mlakit.evaluation.quality import (
    Progress,
    TextLike,
    Windows,
    cut_windows,
    open_texts,
    score_windows,
    summarise,
    summarise_domains,
)
from mlakit.evaluation.recall import measure_recall
from mlakit.evaluation.speed import measure_speed
from mlakit.evaluation.subject import ModelLike, Subject, open_pair, open_subject
from mlakit.evaluation.tasks import TaskOptions, fit_tasks, open_tasks, run_tasks
from mlakit.evaluation.verification import check, verify
from mlakit.generation import generate
from mlakit.reporting.files import read_report
from mlakit.reporting.schema import LayerError, Report, Sample, Stage
from mlakit.reporting.task_scores import require_same_source, tasks_before
from mlakit.spec import CacheKind

__all__ = ["Subject", "check", "evaluate", "open_subject", "verify"]

SAMPLE_PROMPT_WORDS = 12


def evaluate(
    source: ModelLike,
    result: ModelLike | None = None,
    *,
    text: TextLike = None,
    prefix_length: int | None = None,
    suffix_length: int | None = None,
    windows: int = 8,
    recall: bool = True,
    speed: bool = False,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    shots: int | None = None,
    samples: int = 1,
    temperature: float | None = None,
    chat: bool = False,
    batch_size: int = 8,
    run_generated_code: bool = False,
    generations: str | Path | None = None,
    before: str | Path | None = None,
    prompts: Sequence[str] | None = None,
    max_new_tokens: int = 48,
    stages: Sequence[Stage] = (),
    layer_errors: Sequence[LayerError] = (),
    seed: int = 0,
    dtype: torch.dtype | str | None = None,
    device: str = "cpu",
    cache_format: CacheKind | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> Report:
    """Measures one model, or a result against its source.

    Args:
        source: folder, hub id or (name, model, tokenizer).
        result: the model to compare with it, e.g. its conversion.
        text: what to score, one text or several, each ``place`` or ``name=place`` (a file of text
            or JSONL, a folder, a dataset); the package's own evaluation text by default.
        prefix_length: tokens cached before scoring; three quarters of the context by default, at
            most 2048.
        suffix_length: tokens scored through the cache; a quarter of the context, at most 256.
        windows: how many windows of each text are scored.
        recall: also ask passkey and key-value questions.
        speed: also time prefill and decoding.
        tasks: ``gsm8k``, ``humaneval`` or what lm-eval knows; ``gsm8k=FILE.jsonl`` takes the
            problems from a file.
        limit: the first so many problems of each task.
        shots: worked examples before each problem; by default what is usual for the task.
        samples: programs per HumanEval problem, for pass@k with k up to this.
        temperature: of those; by default 0 for one and 0.8 for several.
        chat: wrap the tasks' prompts in the tokenizer's chat template.
        batch_size: the tasks' prompts at a time.
        run_generated_code: allow HumanEval to run the programs that a model writes.
        generations: folder that keeps the texts of tasks; a run that was cut off goes on there.
        before: report of an earlier state of the result, as before healing, on the same source and
            tasks: its scores stand beside these.
        prompts: prompts to continue side by side; the first words of three windows by default.
        max_new_tokens: length of those continuations; 0 writes none.
        stages: quality after each step of a conversion, to be drawn in the report.
        layer_errors: error of each converted layer, to be drawn in the report.
        seed: seed of probes, prompts and bootstrap.
        dtype: dtype to load folders in; the checkpoint's own by default.
        device: device to load folders on.
        cache_format: quantises the cached latents of the result, or of a model alone: ``fp8``,
            ``int8`` or ``int4``.
        command: the command line, for the record.
        progress: told (what, done, total).

    Raises:
        UsageError: lengths beyond the context, two models with different vocabularies, or a task
            that is unknown or not allowed.
        MlakitError: a text too short for the windows, logits that are not finite, or problems
            that cannot be read.
    """
    earlier = None if before is None else read_report(before)
    open_texts(text)  # what cannot be read is refused before any weight is
    options = TaskOptions(
        limit=limit,
        shots=shots,
        samples=samples,
        temperature=temperature,
        chat=chat,
        batch_size=batch_size,
        run_generated_code=run_generated_code,
        generations=None if generations is None else Path(generations),
    )
    chosen = open_tasks(tasks, options)
    ours, theirs = open_pair(source, result, dtype=dtype, device=device, cache_format=cache_format)
    cut = cut_windows(
        ours,
        theirs,
        text=text,
        prefix_length=prefix_length,
        suffix_length=suffix_length,
        count=windows,
    )
    if earlier is not None:
        require_same_source(earlier, ours.fingerprint, ours.name)
    chosen = fit_tasks(chosen, ours, theirs)
    written = _samples(ours, theirs, prompts, cut, max_new_tokens)  # first: a prompt may not fit
    scores = score_windows(ours, theirs, cut, progress=progress)
    asked = run_tasks(chosen, ours, theirs, seed=seed, progress=progress)
    memory = measure_memory(ours, theirs, length=whole_pages(cut.ids.shape[1] - 1))
    source_summary, result_summary = summarise_models(ours, theirs, memory)
    return Report(
        source=source_summary,
        result=result_summary,
        quality=summarise(scores, cut, seed=seed),
        domains=summarise_domains(scores, cut, seed=seed),
        memory=memory,
        recall=measure_recall(ours, theirs, seed=seed, progress=progress) if recall else None,
        tasks=asked,
        before=None if earlier is None else tasks_before(earlier, asked),
        speed=measure_speed(ours, theirs, seed=seed, progress=progress) if speed else None,
        samples=written,
        stages=list(stages),
        layer_errors=list(layer_errors),
        environment=describe_environment(command=command, seed=seed, device=ours.model.device),
    )


def _samples(
    source: Subject,
    result: Subject | None,
    prompts: Sequence[str] | None,
    cut: Windows,
    max_new_tokens: int,
) -> list[Sample]:
    """Greedy continuations of the same prompts by both models, as far as the context reaches."""
    if prompts is None:
        texts = source.tokenizer.batch_decode(cut.ids[:3], skip_special_tokens=True)
        prompts = [opening for text in texts if (opening := _opening(text))]
    if max_new_tokens == 0 or not prompts:
        return []
    subjects = [subject for subject in (source, result) if subject is not None]
    longest = max(len(s.tokenizer(prompt).input_ids) for s in subjects for prompt in prompts)
    room = max(1, min(s.context for s in subjects) - longest)
    written = [
        generate(
            s.model, s.tokenizer, list(prompts), max_new_tokens=min(max_new_tokens, room)
        ).texts
        for s in subjects
    ]
    theirs = written[1] if result is not None else [None] * len(prompts)
    return [
        Sample(prompt=prompt, source=ours, result=other)
        for prompt, ours, other in zip(prompts, written[0], theirs, strict=True)
    ]


def _opening(text: str) -> str:
    """First words of the first whole sentence: a window may begin inside a word."""
    _, _, rest = text.partition(". ")
    return " ".join((rest or text).split()[:SAMPLE_PROMPT_WORDS])
