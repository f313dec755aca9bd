"""The verb: read, check, forecast, train one or two arms, write the result at once."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from mlakit import __version__
from mlakit.account import ITEMSIZE, cache_bytes_per_token
from mlakit.checkpoint import (
    Checkpoint,
    ShardWriter,
    require_free_space,
    require_writable,
    write_json_atomic,
)
from mlakit.checkpoint.writing import PARTIAL_SUFFIX
from mlakit.data import SourceLike
from mlakit.errors import UsageError
from mlakit.evaluation.environment import describe_environment
from mlakit.evaluation.subject import Subject, open_subject
from mlakit.families import read_model
from mlakit.healing.arm import Arm, Start
from mlakit.healing.export import require_stored, trained_tensors, write_card, write_healed
from mlakit.healing.forecast import Forecast, forecast
from mlakit.healing.inputs import Inputs, read_inputs
from mlakit.healing.journal import LOG_NAME, Journal
from mlakit.healing.measure import measure
from mlakit.healing.picture import write_picture
from mlakit.healing.recipe import Recipe, choose_recipe
from mlakit.healing.report import REPORT_NAME, ArmReport, HealReport, arm_report, read_heal_report
from mlakit.healing.watch import Told

RUN_NAME, ARMS_NAME = "run.json", "arms"


def heal(
    student: str | Path,
    output: str | Path | None = None,
    *,
    teacher: str | Path,
    recipe: str | Recipe = "default",
    held_out: SourceLike | Sequence[SourceLike] | None = None,
    control: bool = False,
    device: str = "cpu",
    dry_run: bool = False,
    price_per_hour: float | None = None,
    told: Told | None = None,
    **settings: Any,
) -> HealReport | Forecast:
    """Trains what a conversion changed, against the original, and writes the best state.

    A run that was cut off goes on when it is started again with the same arguments, with the same
    losses. Under ``accelerate launch`` several processes share the work.

    Args:
        student: folder or hub id of a converted checkpoint; an ordinary one trains as well.
        output: folder for the result, which appears there when it is whole; None writes nothing.
        teacher: the original, with the same tokenizer.
        recipe: ``default``, ``article``, ``r1``, or a whole ``Recipe``.
        held_out: texts to measure on; the end of every training text by default.
        control: also train the original itself on the same data, with the same share of its
            weights, so that a gain can be told from mere further training.
        device: ``cpu``, ``cuda`` ...
        dry_run: only check everything and foresee memory, time and cost.
        price_per_hour: of the machine, for the cost.
        told: called with every row of the log.
        **settings: fields of ``Recipe`` in place of the recipe's own, such as ``data`` and
            ``train``.

    Returns:
        What was gained; of a dry run what it would take.

    Raises:
        UsageError, UnsupportedModelError: nothing was written.
        MlakitError: says what failed and how to go on.
    """
    inputs = read_inputs(
        student, teacher, choose_recipe(recipe, settings), held_out, control, device
    )
    if output is not None:
        finished = _check_output(Path(output).expanduser(), inputs, writes=not dry_run)
        if finished is not None and not dry_run:
            return finished
    if dry_run:
        return forecast(
            inputs.student, inputs.teacher, inputs.recipe, inputs.material, inputs.steps,
            control=control, device=device, processes=inputs.processes,
            price_per_hour=price_per_hour,
        )  # fmt: skip
    if output is None:
        with TemporaryDirectory(prefix="mlakit-heal-") as folder:
            return _Run(inputs, Path(folder), told).finish()
    return _run_to(Path(output).expanduser(), inputs, told)


def _check_output(folder: Path, inputs: Inputs, *, writes: bool) -> HealReport | None:
    """The finished report if the folder holds this very run.

    Raises:
        UsageError: it holds something else, or lies in a checkpoint that is read.
    """
    require_writable(folder)
    for checkpoint in (inputs.student, inputs.teacher):
        if folder.resolve().is_relative_to(checkpoint.path.resolve()):
            raise UsageError(
                f"The output folder {folder} lies in {checkpoint.source}, which is never written"
                " to",
                remedy="choose a folder outside of it",
            )
    if folder.exists() and any(folder.iterdir()):
        if (folder / REPORT_NAME).exists():
            report = read_heal_report(folder)
            if report.key == inputs.key:
                return report
        raise UsageError(f"The output folder {folder} is not empty", remedy="choose a new folder")
    partial = _partial(folder)
    if (partial / RUN_NAME).exists():
        if json.loads((partial / RUN_NAME).read_text())["key"] != inputs.key:
            raise UsageError(
                f"{partial} holds the beginning of another run (other models, texts or settings)",
                remedy="choose another output folder, or delete that one",
            )
    elif writes:
        require_free_space(folder, 3 * inputs.student.nbytes_total)
    return None


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + PARTIAL_SUFFIX)


def _run_to(folder: Path, inputs: Inputs, told: Told | None) -> HealReport:
    """Works in a folder beside the result, which takes its name at the end."""
    partial = _partial(folder)
    report = _Run(inputs, partial, told).finish()
    if _is_main():
        if folder.exists():
            folder.rmdir()  # it was empty
        partial.replace(folder)
        shutil.rmtree(folder / ARMS_NAME)
        (folder / RUN_NAME).unlink()  # not before: it says whose the unfinished folder is
    return report


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


class _Run:
    """A run in its folder.

    Args:
        inputs: what was checked.
        folder: where checkpoints and, in the end, the result are.
        told: called with every row of the log.
    """

    def __init__(self, inputs: Inputs, folder: Path, told: Told | None) -> None:
        self.inputs, self.folder = inputs, folder
        self.told: Told = told or (lambda row: None)

    def finish(self) -> HealReport:
        """Trains what is not trained yet and writes the result."""
        if not _is_main():
            self._wait()
            return self._train(Journal(self.folder / LOG_NAME, writes=False), None)
        with ShardWriter(self.folder, len(self.inputs.student.shards)) as shards:
            write_json_atomic(self.folder / RUN_NAME, {"key": self.inputs.key})
            journal = Journal(self.folder / LOG_NAME, writes=True)
            self._wait()
            report = self._train(journal, shards)
        return report

    def _wait(self) -> None:
        """For the first process to have made the folder."""
        if self.inputs.processes > 1:
            from accelerate import PartialState

            # Every process holds the weights it has read: none is left to be sent by the first.
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
            PartialState(cpu=self.inputs.device == "cpu").wait_for_everyone()

    def _train(self, journal: Journal, shards: ShardWriter | None) -> HealReport:
        inputs = self.inputs
        start = Start(
            inputs.recipe, inputs.material, inputs.steps, self.folder / ARMS_NAME, inputs.device,
            inputs.processes, journal, self.told,
        )  # fmt: skip
        if not journal.rows:
            self._note_texts(journal)
        original = self._open_original()
        reports = {}
        student = open_subject(inputs.student.source, device=self._loads_to)
        arm = Arm("healed", student, original, start)
        require_stored(inputs.student, arm.trained)
        state = arm.run()
        reports["healed"] = _arm_report(journal, arm)
        del arm, student
        gc.collect()  # the trainer and its callbacks hold each other, and with them the student
        if inputs.control:
            if inputs.processes > 1:  # each holds a part of it, for the arm before
                original = self._open_original()
            again = open_subject(inputs.teacher.source, device=self._loads_to)
            settled = replace(start, recipe=_control_recipe(inputs.recipe))
            arm = Arm("control", again, original, settled)
            arm.run()
            reports["control"] = _arm_report(journal, arm)
            del arm, again
            gc.collect()
        if shards is None:
            return self._report(reports, dict(reports["healed"].best), None)
        return self._write(shards, state, reports, original)

    @property
    def _loads_to(self) -> str:
        """Where weights are read to; of several processes each moves its own share from there."""
        return "cpu" if self.inputs.processes > 1 else self.inputs.device

    def _open_original(self) -> Subject:
        inputs = self.inputs
        return open_subject(inputs.teacher.source, dtype=inputs.recipe.dtype, device=self._loads_to)

    def _note_texts(self, journal: Journal) -> None:
        for part in self.inputs.material.parts:
            for note in part.notes:
                self.told(journal.add("healed", "event", 0, what=f"{part.name}: {note}"))

    def _write(
        self, shards: ShardWriter, state: Any, reports: dict[str, Any], original: Subject
    ) -> HealReport:
        """The result, measured from its own files, with report, card and picture."""
        inputs, healed = self.inputs, reports["healed"]
        facts = {
            "mlakit_version": __version__,
            "teacher": inputs.teacher.source,
            "teacher_fingerprint": inputs.teacher.fingerprint,
            "train": inputs.recipe.train,
            "steps": healed.best["step"],
            "tokens": healed.best["tokens"],
        }
        new = trained_tensors(inputs.student, state) if healed.best["step"] else {}
        raised = write_healed(inputs.student, shards, new, facts)
        if inputs.processes > 1:  # this process holds a part of it only
            original = open_subject(
                inputs.teacher.source, dtype=inputs.recipe.dtype, device=inputs.device
            )
        written = open_subject(self.folder, dtype=inputs.recipe.dtype, device=inputs.device)
        after = measure(original, written, inputs.material.held_out)
        report = self._report(reports, asdict(after), raised)
        report.write(self.folder)
        gained = not report.nothing_gained
        write_card(inputs.student, self.folder, report.card_lines(), healed=gained)
        write_picture(report, self.folder)
        return report

    def _report(
        self, reports: dict[str, Any], after: dict[str, Any], raised: int | None
    ) -> HealReport:
        inputs, windows = self.inputs, self.inputs.material.held_out
        environment = describe_environment(
            command="", seed=inputs.recipe.seed, device=torch.device(inputs.device)
        )
        return HealReport(
            key=inputs.key,
            student=Path(inputs.student.source).name,
            teacher=Path(inputs.teacher.source).name,
            fingerprints={
                "student": inputs.student.fingerprint, "teacher": inputs.teacher.fingerprint,
            },
            recipe=asdict(inputs.recipe),
            texts=[asdict(part) for part in inputs.material.parts],
            windows=len(inputs.material.lessons),
            window_length=inputs.material.length,
            held_out={
                "text": windows.text.name,
                "sha256": windows.text.sha256,
                "windows": len(windows.ids),
                "prefix_length": windows.prefix_length,
                "suffix_length": windows.suffix_length,
            },
            healed=reports["healed"],
            control=reports.get("control"),
            after=after,
            raised_norm=raised,
            environment=environment.model_dump(),
            processes=inputs.processes,
            cache_share=cache_share(inputs.student, inputs.teacher),
        )  # fmt: skip


def cache_share(student: Checkpoint, teacher: Checkpoint) -> float:
    """Cached bytes per token over the original's, by their shapes, in the student's dtype."""
    ours, theirs = (read_model(found.config) for found in (student, teacher))
    itemsize = ITEMSIZE[ours.dtype]
    own = cache_bytes_per_token(theirs.layers, itemsize)
    return cache_bytes_per_token(ours.layers, itemsize) / own


def _arm_report(journal: Journal, arm: Arm) -> ArmReport:
    rates = min(arm.rates.values()), max(arm.rates.values())
    return arm_report(journal, arm.name, arm.count, arm.all, rates)


def _control_recipe(recipe: Recipe) -> Recipe:
    """The same for the original: matching its own layers would teach it nothing."""
    return replace(recipe, layer_steps=0, layer_weight=0.0)
