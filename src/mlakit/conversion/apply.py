"""The conversion itself: plan, convert layer by layer, finish; or go on where a run was cut off."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from mlakit.checkpoint import (
    Checkpoint,
    ShardWriter,
    copy_side_files,
    open_checkpoint,
    require_free_space,
    write_json_atomic,
    write_text_atomic,
)
from mlakit.checkpoint.writing import LOCK_NAME
from mlakit.conversion.budget import EqualCacheForm, Goal
from mlakit.conversion.calibrate import choose_windows, layer_weights
from mlakit.conversion.card import converted_config, model_card
from mlakit.conversion.factor import (
    Tensors,
    article,
    equal_cache,
    identity_norm_exponent,
    latent_bound,
)
from mlakit.conversion.plan import (
    PLAN_NAME,
    WORK_NAME,
    ConversionPlan,
    calibration_text,
    kept_tensors,
    make_plan,
)
from mlakit.conversion.stream import LayerReader
from mlakit.conversion.transmla import LayerResult, Progress, TransMLA
from mlakit.errors import MlakitError, UsageError
from mlakit.families import FAMILIES, read_model

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
HIGHEST_EXPONENT = {"F16": 15}
"""float16 holds no power of two above 2^15; elsewhere any exponent fits."""


def convert(
    model: str | Path,
    output: str | Path,
    *,
    equal_cache: bool = False,
    form: EqualCacheForm = "absorbed",
    cache_ratio: float | None = None,
    kv_lora_rank: int | None = None,
    qk_rope_head_dim: int | None = None,
    method: str = "transmla",
    freqfold: int | Literal["auto"] = "auto",
    calibration: str | Path | None = None,
    calibration_tokens: int = 32768,
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
        model: folder or hub id of a llama, mistral or qwen2 checkpoint.
        output: folder for the result; new, empty, or left by the same conversion.
        equal_cache: exact conversion at equal cache.
        form: ``absorbed``, or ``article`` for rotation after the up-projection.
        cache_ratio: share of the source's own cache to keep.
        kv_lora_rank: C, instead of a ratio.
        qk_rope_head_dim: R; the source's head size if None.
        method: ``transmla``.
        freqfold: frequencies folded together; ``auto`` chooses on held-out calibration text.
        calibration: text file, folder of texts or dataset name; the package's own text if None.
        calibration_tokens: how many tokens of it are used, at most.
        seed: chooses the windows of a longer text.
        dtype: of the result; the source's if None.
        device: where layers run, ``cpu`` or ``cuda``.
        dry_run: only plan.
        progress: called with (stage, steps done, steps in all).

    Returns:
        The plan; after a conversion with what was measured.

    Raises:
        UsageError, UnsupportedModelError: nothing was written.
        MlakitError: disk full, damaged source, output in use; says what to do.
    """
    goal = Goal(equal_cache, form, cache_ratio, kv_lora_rank, qk_rope_head_dim, method, freqfold)
    checkpoint = open_checkpoint(model)
    plan = make_plan(
        checkpoint,
        goal,
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        seed=seed,
        dtype=dtype,
        device=device,
    )
    if dry_run:
        return plan
    folder = Path(output).expanduser()
    finished = _finished(folder, plan)
    if finished is not None:
        return finished
    text = None if plan.calibration is None else calibration_text(calibration)
    require_free_space(folder, plan.estimate.disk_bytes - _used(folder))
    with ShardWriter(folder, plan.shards) as shards:
        run = _Run(checkpoint, plan, shards, device, progress or (lambda stage, done, total: None))
        plan.write(folder, "running")
        return run.finish(run.convert(text))


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
    return replace(plan, measured=written["measured"]) if status == "complete" else None


def _used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class _Run:
    """One conversion being written into its folder."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: ConversionPlan,
        shards: ShardWriter,
        device: str,
        progress: Progress,
    ) -> None:
        self.checkpoint = checkpoint
        self.plan = plan
        self.shards = shards
        self.progress = progress
        self.model = read_model(checkpoint.config)
        self.family = FAMILIES[self.model.family]
        self.reader = LayerReader(checkpoint, self.model, device)
        self.work = shards.folder / WORK_NAME
        self.work.mkdir(exist_ok=True)

    def convert(self, text: str | None) -> dict[str, Any]:
        """Writes every layer that is not there yet; gives what was measured on the whole."""
        if text is None or self.plan.calibration is None:
            for index, tensors, facts in self._equal_cache():
                self._write_layer(index, tensors, facts)
            return {}
        windows = choose_windows(text, self.checkpoint.path, self.plan.calibration)
        method = TransMLA(self.reader, self.plan, windows, self.work, self.progress)
        for index, tensors, facts in method.layers(self._is_done):
            self._write_layer(index, tensors, facts)
        return {
            "calibration_windows": len(windows),
            "freqfold": method.freqfold,
            "held_out_perplexity": {str(k): v for k, v in method.perplexity.items()},
        }

    def finish(self, measured: dict[str, Any]) -> ConversionPlan:
        """The tensors outside the layers, then config, card and index; then the work is gone."""
        count = len(self.plan.layers)
        facts = [json.loads(self._facts(index).read_text()) for index in range(count)]
        exponent = max(fact.pop("norm_exponent") for fact in facts)
        plan = replace(self.plan, measured={**measured, "layers": facts})
        self.progress("write", 0, 1)
        if not self.shards.exists(plan.shards):
            self.shards.write(plan.shards, self._rest(exponent))
        folder = self.shards.folder
        copy_side_files(self.checkpoint.path, folder)
        write_text_atomic(folder / "README.md", model_card(plan))
        config = converted_config(self.checkpoint.config, plan, self.model, exponent)
        write_json_atomic(folder / "config.json", config)
        self.shards.finish()
        plan.write(folder, "complete")
        shutil.rmtree(self.work)
        self.progress("write", 1, 1)
        return plan

    def _equal_cache(self) -> Iterator[LayerResult]:
        factorise = article if self.plan.goal.form == "article" else equal_cache
        count = len(self.plan.layers)
        for index in range(count):
            self.progress("convert", index, count)
            if not self._is_done(index):
                weights = layer_weights(self.reader, index)
                yield index, factorise(weights, self.model.layers[index]), {}
        self.progress("convert", count, count)

    def _is_done(self, index: int) -> bool:
        return self._facts(index).exists() and self.shards.exists(index + 1)

    def _write_layer(self, index: int, tensors: Tensors, facts: dict[str, float]) -> None:
        """One shard: the new attention tensors, and the layer's other tensors as they are."""
        down = tensors["kv_a_proj_with_mqa.weight"]
        bias = tensors.get("kv_a_proj_with_mqa.bias", down.new_zeros(len(down)))
        latent = torch.cat([down, bias[:, None]], 1)[: self.plan.target.kv_lora_rank]
        norm = self.checkpoint.read(self.family.layer(index) + "input_layernorm.weight")
        bound = latent_bound(latent, norm.to(latent))
        write_json_atomic(
            self._facts(index), {**facts, "norm_exponent": identity_norm_exponent(bound)}
        )
        prefix = self.family.attention_prefix(index)
        new = {prefix + name: tensor for name, tensor in tensors.items()}
        self.shards.write(index + 1, self._shard(index + 1, new))

    def _rest(self, exponent: int) -> Tensors:
        """Embeddings, final norm, output matrix, and the latent norms that change nothing."""
        new: Tensors = {}
        for index, layer in enumerate(self.plan.layers):
            name = self.family.attention_prefix(index) + "kv_a_layernorm.weight"
            new[name] = torch.full((layer.kv_lora_rank or 0,), 2.0**exponent)
        return self._shard(self.plan.shards, new)

    def _shard(self, shard: int, new: Tensors) -> Tensors:
        """Every planned tensor of a shard, new or read from the source, in its planned dtype."""
        result: Tensors = {}
        for tensor in self.plan.tensors:
            if tensor.shard != shard:
                continue
            value = new.get(tensor.name)
            if value is None:
                value = self.checkpoint.read(tensor.name)
            if not tensor.copied:
                value = value.to(TORCH_DTYPES[tensor.dtype]).contiguous()
                if not bool(value.isfinite().all()):
                    raise MlakitError(
                        f"{tensor.name} has numbers that {tensor.dtype} cannot hold",
                        remedy="use --dtype bfloat16 or float32",
                    )
            result[tensor.name] = value
        return result

    def _facts(self, index: int) -> Path:
        return self.work / f"layer-{index:05d}.json"
