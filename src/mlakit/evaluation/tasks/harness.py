"""Every other task: asked by EleutherAI's lm-evaluation-harness, an extra of the package."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from mlakit.errors import MlakitError, UsageError
from mlakit.evaluation.subject import Subject
from mlakit.evaluation.tasks.intervals import Comparison, Z, compare
from mlakit.evaluation.tasks.task import TaskOptions
from mlakit.reporting.schema import Estimate, TaskScore

RESAMPLES = 1000
"""Of lm-eval's own bootstrap, for measures that are no mean over problems."""

Marks = dict[tuple[str, str], list[Any]]
"""What each problem gave, in their order, for each (measure, filter): mostly a number."""


def open_harness(places: Mapping[str, str | None]) -> Any:
    """lm-eval's task manager, where it knows every one of the tasks.

    Args:
        places: task names; each with the folder of its YAML file if it is the user's own.

    Raises:
        UsageError: lm-eval is not installed, or knows no such task.
    """
    names = ", ".join(places)
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError(
            f"mlakit itself has the tasks gsm8k and humaneval; {names} would be asked by lm-eval, "
            "which is not installed",
            remedy="pip install 'mlakit[tasks]', or check the spelling",
        )
    from lm_eval.tasks import TaskManager

    folders = dict.fromkeys(place for place in places.values() if place is not None)
    manager = TaskManager(include_path=list(folders) or None)
    unknown = [name for name in places if name not in manager.all_tasks]
    if unknown:
        raise UsageError(
            f"lm-eval knows no task {', '.join(unknown)}",
            remedy="lm-eval ls tasks lists them; NAME=FOLDER adds a folder of YAML files",
        )
    return manager


def ask_harness(
    manager: Any, names: Sequence[str], model: Any, name: str, options: TaskOptions, seed: int
) -> Any:
    """lm-eval's record of one model's answers.

    Args:
        manager: as `open_harness` returns it.
        names: of the tasks.
        model: one of lm-eval's.
        name: what messages call it.
        options: how to ask.
        seed: of everything random.

    Raises:
        MlakitError: lm-eval failed, e.g. because a data set cannot be loaded.
    """
    import lm_eval

    try:
        return lm_eval.simple_evaluate(
            model,
            tasks=list(names),
            task_manager=manager,
            num_fewshot=options.shots,
            limit=options.limit,
            apply_chat_template=options.chat,
            confirm_run_unsafe_code=options.run_generated_code,
            bootstrap_iters=RESAMPLES,
            verbosity="ERROR",
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except MlakitError as error:
        raise MlakitError(
            f"lm-eval could not ask {', '.join(names)} of {name}: {error.message}",
            remedy=error.remedy,
        ) from error
    except Exception as error:  # tasks and data sets raise many unrelated kinds
        raise MlakitError(
            f"lm-eval could not ask {', '.join(names)} of {name}: {error}",
            remedy="a task's data set needs a network or a filled cache",
        ) from error


def ordinary_model(subject: Subject, options: TaskOptions) -> Any:
    """lm-eval's own model around one of transformers."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=subject.model,
        tokenizer=subject.tokenizer,
        batch_size=options.batch_size,
        backend="causal",
    )


def harness_scores(runs: Sequence[Any], seed: int) -> list[TaskScore]:
    """Every measure of the tasks, from the records of one model or two."""
    return [
        score
        for task in runs[0]["results"]
        for score in _scores(task, [run["results"][task] for run in runs], list(runs), seed)
    ]


def _scores(
    task: str, values: list[Mapping[str, Any]], runs: list[Any], seed: int
) -> list[TaskScore]:
    """One score for each of lm-eval's ``measure,filter`` keys."""
    marks = [_marks(run["samples"].get(task, [])) for run in runs]
    shots = runs[0]["n-shot"].get(task)
    scores = []
    for key in values[0]:
        measure, comma, kind = key.partition(",")
        if not comma or measure.endswith("_stderr"):
            continue
        columns = [mark.get((measure, kind), []) for mark in marks]
        pair = [
            _likelihood(value[key], column, seed) or _with_error(value, measure, kind)
            for value, column in zip(values, columns, strict=True)
        ]
        share = all(map(_is_mean_of_shares, pair, columns))
        alone = Comparison(source=pair[0], result=None, difference=None, p_value=None)
        if len(pair) == 2:
            alone["result"] = pair[1]
        scores.append(
            TaskScore(
                task=task,
                measure=measure if kind == "none" else f"{measure} ({kind})",
                problems=runs[0]["n-samples"].get(task, {}).get("effective"),
                settings="by lm-eval" + (f", {shots} examples" if shots else ""),
                share=share,
                **(compare(*columns, seed=seed) if share else alone),
            )
        )
    return scores


def _is_mean_of_shares(value: Estimate, marks: Sequence[Any]) -> bool:
    """Whether the value is the mean of marks between 0 and 1, and not e.g. a perplexity."""
    if not marks or not all(isinstance(mark, float) and 0 <= mark <= 1 for mark in marks):
        return False
    return math.isclose(value.value, math.fsum(marks) / len(marks), abs_tol=1e-6)


def _marks(samples: Sequence[Mapping[str, Any]]) -> Marks:
    marks: Marks = {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        for measure in sample["metrics"]:
            mark = sample.get(measure)
            listed = marks.setdefault((measure, sample["filter"]), [])
            listed.append(float(mark) if isinstance(mark, Real) else mark)
    return marks


def _likelihood(value: float, marks: Sequence[Any], seed: int) -> Estimate | None:
    """A perplexity, or bits per byte, with its bootstrap interval over texts.

    lm-eval gives it none. Its marks are (log-likelihood, number of words or bytes) of each text;
    None where they are something else.
    """
    if len(marks) < 2 or not all(isinstance(mark, tuple) and len(mark) == 2 for mark in marks):
        return None
    sums = np.asarray(marks, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
    likelihoods, counts = sums[picks].sum(axis=1).T
    low, high = np.quantile(-likelihoods / counts, [0.025, 0.975])
    mean = Estimate(value=-sums[:, 0].sum() / sums[:, 1].sum(), low=low, high=high)
    for scale in (math.exp, lambda nats: nats / math.log(2)):
        found = mean.mapped(scale)
        if math.isclose(found.value, value, rel_tol=1e-6):
            return found
    return None


def _with_error(value: Mapping[str, Any], measure: str, kind: str) -> Estimate:
    """lm-eval's own value, with the normal interval of its standard error where it has one."""
    middle = float(value[f"{measure},{kind}"])
    error = value.get(f"{measure}_stderr,{kind}")
    if not isinstance(error, Real) or not math.isfinite(float(error)):
        return Estimate(value=middle)
    half = Z * float(error)
    return Estimate(value=middle, low=middle - half, high=middle + half)
