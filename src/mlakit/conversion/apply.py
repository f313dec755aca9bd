"""The verb: plan, check the output folder, then convert or go on where a run was cut off.

No torch before the work begins, so that a dry run is quick.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from mlakit.checkpoint import ShardWriter, open_checkpoint, require_free_space
from mlakit.checkpoint.reading import PLAN_NAME
from mlakit.checkpoint.writing import LOCK_NAME
from mlakit.conversion.amounts import CALIBRATION_TOKENS
from mlakit.conversion.goal import EqualCacheForm, Goal, Ranks
from mlakit.conversion.plan import WORK_NAME, ConversionPlan, Progress, make_plan, resized
from mlakit.data import BUILTIN, SourceLike, named_sources
from mlakit.errors import MlakitError, UsageError


def convert(
    model: str | Path,
    output: str | Path,
    *,
    equal_cache: bool = False,
    form: EqualCacheForm = "absorbed",
    cache_ratio: float | None = None,
    kv_lora_rank: int | None = None,
    qk_rope_head_dim: int | None = None,
    method: str = "mlakit",
    freqfold: int | Literal["auto"] = "auto",
    without: Sequence[str] = (),
    refine_steps: int | Literal["auto"] = "auto",
    engine: str = "mlakit",
    max_kl: float | None = None,
    ranks: Ranks = "auto",
    cache_bits: int | Literal["auto"] = 16,
    calibration: SourceLike | Sequence[SourceLike] | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    calibration_window: int | None = None,
    check: SourceLike | Sequence[SourceLike] | None = None,
    seed: int = 0,
    dtype: str | None = None,
    device: str = "cpu",
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ConversionPlan:
    """Converts a checkpoint's attention to latent attention.

    Two modes: ``equal_cache`` keeps the cache's bytes and the function; otherwise the cache is
    compressed to ``cache_ratio`` of its own bytes, or to ``kv_lora_rank`` (and
    ``qk_rope_head_dim``). A run that was cut off goes on when it is started again with the same
    arguments; the result is the same bit for bit.

    Args:
        model: folder or hub id of a checkpoint of a family that converts (docs/families.md).
        output: folder for the result; new, empty, or left by the same conversion.
        equal_cache: exact conversion at equal cache.
        form: ``absorbed``, or ``article`` for rotation after the up-projection.
        cache_ratio: share of the source's own cache to keep.
        kv_lora_rank: C, instead of a ratio.
        qk_rope_head_dim: R. If None it is chosen with the ranks, on calibration text, and is the
            source's head size where that cannot be: with ``kv_lora_rank``, with other methods, for
            engines of fixed sizes, and from a latent source.
        method: how to compress: ``mlakit``, or ``transmla`` as published.
        freqfold: frequencies that ``transmla`` folds together; ``auto`` chooses on held-out
            calibration text.
        without: parts of ``mlakit`` to leave out (``conversion.goal.PARTS``).
        refine_steps: gradient steps per layer towards the source's outputs, after the algebra;
            ``auto`` for 200, and none where the method is ``transmla``.
        engine: what the result shall run in (``engines.targets.TARGETS``; ``--for`` on the command
            line): sizes are picked among those it takes.
        max_kl: instead of a size: the smallest cache whose predictions diverge from the source's by
            at most so many nats per token, measured on held-out calibration text.
        ranks: ``even``: one rank for all layers; ``measured``: each layer its own, the same cache
            in all, where that loses least; ``auto``: measured where nobody names a rank and the
            engine allows it.
        cache_bits: 8 or 4 quantise the cached latents, by default whenever the result is loaded,
            and the same bytes hold a larger rank; ``auto`` chooses them with the sizes, on
            calibration text. The rotary part stays in 16 bits.
        calibration: texts to calibrate with, one or several, each ``place`` or ``name=place``: a
            file of text or JSONL, a folder, ``self`` for what the model writes itself, a dataset
            ``name[:configuration[:split[:column]]]``; the package's own text if None.
            An exact conversion reads none.
        calibration_tokens: how many tokens of them are used, at most; each has its share.
        calibration_window: tokens that are read together, at most. Beyond that distance nothing is
            known of the attention, and losses grow there. None for the context up to 2,048, less
            where there is little text; the time of the attention grows with it.
        check: texts that are not calibrated with: the result is measured on them too.
        seed: chooses the windows of a longer text, and what the model writes.
        dtype: of the result; the source's if None.
        device: where layers run, ``cpu`` or ``cuda``.
        dry_run: only plan, and check the output folder unless that is "".
        progress: called with (stage, steps done, steps in all).

    Returns:
        The plan; after a conversion with what was measured.

    Raises:
        UsageError, UnsupportedModelError: nothing was written.
        MlakitError: disk full, damaged source, output in use; says what to do.
    """
    goal = Goal(
        equal_cache,
        form,
        cache_ratio,
        kv_lora_rank,
        qk_rope_head_dim,
        method,
        freqfold,
        tuple(sorted(set(without))),
        refine_steps,
        engine,
        max_kl,
        ranks,
        cache_bits,
    )
    checkpoint = open_checkpoint(model)
    texts = None if calibration is None else named_sources(calibration)
    checks = None if check is None else named_sources(check)
    plan = make_plan(
        checkpoint,
        goal,
        calibration=texts,
        calibration_tokens=calibration_tokens,
        calibration_window=calibration_window,
        check=checks,
        seed=seed,
        dtype=dtype,
        device=device,
    )
    if dry_run and not str(output):
        return plan
    folder = Path(output).expanduser()
    if folder.resolve().is_relative_to(checkpoint.path.resolve()):
        raise UsageError(
            f"The output folder {folder} lies in the source {model}, which is never written to",
            remedy="choose a folder outside of it",
        )
    finished = _finished(folder, plan)
    if dry_run:
        return plan
    if finished is not None:
        shutil.rmtree(folder / WORK_NAME, ignore_errors=True)  # of a run cut off at its very end
        return finished
    from mlakit.conversion.run import Run

    run = Run(
        checkpoint,
        plan,
        sources=(*(texts or named_sources(BUILTIN)), *(checks or ())),
        device=device,
        progress=progress or (lambda stage, done, total: None),
    )
    require_free_space(folder, plan.estimate.disk_bytes - _used(folder))
    with ShardWriter(folder, plan.shards) as shards:
        # Another run may have come between: only now does the folder belong to this one.
        return _finished(folder, plan) or run.write(shards)


def _finished(folder: Path, plan: ConversionPlan) -> ConversionPlan | None:
    """The completed plan if the folder holds this very conversion, None if it may be written to.

    Raises:
        UsageError: the folder holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"The output {folder} is a file", remedy="name a folder")
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if not found - {LOCK_NAME}:
        return None
    if PLAN_NAME not in found:
        raise UsageError(
            f"The output folder {folder} is not empty and was not made by mlakit convert",
            remedy="choose a new folder; nothing is ever overwritten",
        )
    try:
        written = json.loads((folder / PLAN_NAME).read_text(encoding="utf-8"))
        status, old = written["status"], written["hash"]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"{folder / PLAN_NAME} cannot be read: {error}", remedy="choose a new folder"
        ) from error
    if old != plan.hash:
        raise UsageError(
            f"The output folder {folder} holds the {status} conversion of another plan (other"
            " source, goal, calibration, dtype or version)",
            remedy="choose a new folder, or delete this one",
        )
    if status != "complete" or not _whole(folder):
        return None
    ranks = [layer["kv_lora_rank"] for layer in written["layers"]]
    first = written["layers"][0]
    sized = resized(plan, ranks, first["qk_rope_head_dim"], first["cache_format"])
    return replace(sized, measured=written["measured"])


def _whole(folder: Path) -> bool:
    """Whether index and shards are all there; a folder that lost some is converted again."""
    try:
        open_checkpoint(folder)
    except MlakitError:
        return False
    return True


def _used(folder: Path) -> int:
    """Bytes there now; another run may be removing files meanwhile."""
    found = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            found += path.stat().st_size if path.is_file() else 0
    return found
