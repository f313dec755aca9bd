"""Every way to shrink one model's cache, with its bytes and its quality: ``mlakit compare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlakit.baselines import Bench, Method, Setting, Variant, require_plain
from mlakit.baselines.states import sized
from mlakit.checkpoint import open_checkpoint
from mlakit.comparison.clock import paces
from mlakit.comparison.exam import Exam
from mlakit.comparison.journal import TEXTS, Journal, file_name
from mlakit.comparison.plan import BUDGETS, ORIGINAL, Plan, Steps, identity, make_plan
from mlakit.comparison.points import make_point
from mlakit.comparison.task_exam import TaskExam
from mlakit.conversion.amounts import CALIBRATION_TOKENS
from mlakit.conversion.domains import usual_window
from mlakit.data import BUILTIN, Source, SourceLike, named_sources
from mlakit.errors import MlakitError, UsageError
from mlakit.evaluation import Subject, open_subject
from mlakit.evaluation.environment import describe_environment
from mlakit.evaluation.memory import measure_memory, summarise_models
from mlakit.evaluation.quality import (
    Progress,
    TextLike,
    Windows,
    cut_windows,
    open_texts,
    window_lengths,
)
from mlakit.evaluation.tasks import TaskOptions, fit_tasks, open_tasks
from mlakit.families import read_model
from mlakit.reporting.answers import answers
from mlakit.reporting.comparison import Comparison, Missing, Point
from mlakit.reporting.schema import Environment

__all__ = ["Comparison", "Plan", "compare"]


def compare(
    model: str | Path,
    output: str | Path,
    *,
    methods: Sequence[str] | None = None,
    budgets: Sequence[float] = BUDGETS,
    text: TextLike = None,
    calibration: SourceLike | Sequence[SourceLike] | None = None,
    prefix_length: int | None = None,
    suffix_length: int | None = None,
    windows: int = 8,
    recall: bool = True,
    speed: bool = True,
    train_steps: int = 0,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
    run_generated_code: bool = False,
    seed: int = 0,
    dtype: str | None = None,
    device: str = "cpu",
    dry_run: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> Comparison | Plan:
    """Measures every way to shrink a model's cache on that model.

    A prefix is read exactly, its cache is compressed, and a continuation and questions are fed
    through what is left. Each finished point is kept in ``output``: a run that was cut off goes on
    when it is started again, and one with more methods or budgets adds to it.

    Args:
        model: folder or hub id of an ordinary checkpoint; it is never changed.
        output: folder for the points; new, empty, or left by the same comparison.
        methods: names of methods; by default all but those that take many minutes.
        budgets: shares of the model's own cache, e.g. 0.25.
        text: what to continue, see ``evaluate``; the package's own evaluation text by default.
        calibration: texts for the methods that calibrate; the package's own if None.
        prefix_length: tokens cached before scoring; by default as ``evaluate``.
        suffix_length: tokens scored through the cache.
        windows: how many windows of each text are scored.
        recall: also ask passkey and key-value questions.
        speed: also time decoding and the first token; all else is the same in every run.
        train_steps: gradient steps for methods that exist only trained; none leaves them out.
        tasks: asked of every point, as in ``evaluate``; each prompt's cache is compressed before
            the answer is written. Their texts are kept in ``output``.
        limit: the first so many problems of each task.
        shots: worked examples before each problem.
        chat: wrap prompts in the tokenizer's chat template.
        run_generated_code: allow HumanEval to run what is written.
        seed: of questions, intervals and everything random in a method.
        dtype: dtype to load in; the checkpoint's own by default.
        device: where it runs.
        dry_run: only say what would be measured.
        command: the command line, for the record.
        progress: told (what, done, total).

    Returns:
        The comparison; with ``dry_run`` the plan.

    Raises:
        UnsupportedModelError: latent attention, soft-capped scores, or a window that binds.
        UsageError: unknown methods or tasks, budgets that are no shares, a folder that holds
            another run.
        MlakitError: a text too short for the windows.
    """
    checkpoint = open_checkpoint(model)
    spec = read_model(checkpoint.config)
    lengths = window_lengths(spec.max_position_embeddings, prefix_length, suffix_length)
    require_plain(spec, sum(lengths))
    plan = make_plan(spec, methods=methods, budgets=budgets, train_steps=train_steps)
    folder = Path(output).expanduser()
    chosen = open_tasks(
        tasks,
        TaskOptions(
            limit=limit,
            shots=shots,
            chat=chat,
            run_generated_code=run_generated_code,
            generations=folder / TEXTS if tasks else None,
        ),
    )
    texts = open_texts(text)
    calibrating = named_sources(BUILTIN if calibration is None else calibration)
    if dry_run:
        return plan
    path = checkpoint.download()
    if folder.resolve().is_relative_to(path.resolve()):
        raise UsageError(
            f"The output folder {folder} lies in the model {model}, which is never written to",
            remedy="choose a folder outside of it",
        )
    source = open_subject(model, dtype=dtype, device=device)
    cut = cut_windows(
        source, None, text=texts, prefix_length=lengths[0], suffix_length=lengths[1], count=windows
    )
    environment = describe_environment(command=command, seed=seed, device=source.model.device)
    asked = TaskExam(source, fit_tasks(chosen, source, None), seed, progress)
    parts = _parts(source, cut, calibrating) | {"recall": recall, "seed": seed, "speed": speed}
    parts |= asked.identity
    window = usual_window(calibrating, CALIBRATION_TOKENS)
    with Journal(folder, identity(parts | {"versions": environment.versions})) as journal:
        exam = Exam(source, cut, seed=seed, recall=recall)
        bench = Bench(source, spec, path, journal.models, calibrating, seed, train_steps, window)
        found = _Run(exam, asked, bench, journal, speed, progress).measure(plan.steps)
    measured = _comparison(exam, bench, plan, found, environment)
    if methods is not None:  # nobody asked for what is only counted
        measured = measured.model_copy(update={"sized": []})
    return measured.model_copy(update={"answers": answers(measured)})


def _comparison(
    exam: Exam, bench: Bench, plan: Plan, found: Sequence[Point | Missing], environment: Environment
) -> Comparison:
    """All that was found, and what it was found on; its answers are still to come."""
    source, cut = exam.source, exam.windows
    memory = measure_memory(source, None, length=exam.length)
    summary, _ = summarise_models(source, None, memory)
    itemsize = source.model.dtype.itemsize
    return Comparison(
        source=summary,
        text=cut.text,
        prefix_length=cut.prefix_length,
        suffix_length=cut.suffix_length,
        windows=len(cut.ids),
        measured_length=exam.length,
        budgets=list(plan.budgets),
        seed=exam.seed,
        recall=exam.source_recall,
        methods=plan.entries,
        points=[point for point in found if isinstance(point, Point)],
        missing=[point for point in found if isinstance(point, Missing)],
        sized=sized(bench.spec, source.context, itemsize, own=summary.bytes_per_token),
        environment=environment.model_copy(update={"created": None}),
    )


def _parts(source: Subject, cut: Windows, calibration: Sequence[Source]) -> dict[str, object]:
    """What every point depends on beside its method and setting."""
    return {
        "model": source.fingerprint,
        "text": cut.text.sha256,
        "calibration": [each.content.sha256 for each in calibration],
        "windows": list(cut.ids.shape),
        "prefix": cut.prefix_length,
        "dtype": source.dtype,
        "device": source.model.device.type,
    }


class _Run:
    """Measures methods; those of a family that leave the weights alone share every prefix."""

    def __init__(
        self,
        exam: Exam,
        tasks: TaskExam,
        bench: Bench,
        journal: Journal,
        speed: bool,
        progress: Progress | None,
    ) -> None:
        self.exam, self.tasks, self.bench, self.journal = exam, tasks, bench, journal
        self.speed, self.progress = speed, progress
        self.waiting: list[tuple[Method, Setting, Variant]] = []

    def measure(self, steps: Steps) -> list[Point | Missing]:
        """A point for every setting, in order; those that an earlier run finished are taken."""
        source = self.bench.source.model
        for method, settings in steps:
            if self.waiting and self.waiting[0][0].family != method.family:
                self._score()
            for setting in settings:
                if self.journal.find(method.name, setting.label) is not None:
                    continue
                try:
                    variant = method.build(self.bench, setting.value)
                except MlakitError as error:
                    self.journal.keep(
                        Missing(method=method.name, setting=setting.label, reason=error.message)
                    )
                    continue
                if variant.model is not source:  # never two models beside the source
                    self._score()
                self.waiting.append((method, setting, variant))
                if variant.model is not source:
                    self._score()
        self._score()
        found = [self.journal.find(m.name, x.label) for m, settings in steps for x in settings]
        return [point for point in found if point is not None]

    def _score(self) -> None:
        """Measures what waits and keeps it."""
        if not self.waiting:
            return
        names = ", ".join(dict.fromkeys(method.title for method, _, _ in self.waiting))

        def tell(done: int, total: int) -> None:
            if self.progress:
                self.progress(names, done, total)

        variants = [variant for *_, variant in self.waiting]
        scores = self.exam.score(variants, tell)
        timed = paces(self.exam, variants) if self.speed else [None] * len(variants)
        for (method, setting, variant), score, pace in zip(
            self.waiting, scores, timed, strict=True
        ):
            point = make_point(self.exam, method.name, setting.label, variant, score, pace)
            if isinstance(point, Point):
                file = file_name(method.name, setting.label)
                asked = self.tasks.scores(variant, file, original=method is ORIGINAL)
                point = point.model_copy(update={"tasks": asked})
            self.journal.keep(point)
        self.waiting.clear()
