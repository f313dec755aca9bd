"""A conversion being written into its folder: layer by layer, then the rest, the index last."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mlakit.checkpoint import (
    Checkpoint,
    ShardWriter,
    copy_side_files,
    write_json_atomic,
    write_text_atomic,
)
from mlakit.checkpoint.origin import origin
from mlakit.checkpoint.reading import PLAN_NAME
from mlakit.conversion.adapt import input_scale, stored_tensors
from mlakit.conversion.allocate import (
    SEARCH_ROUNDS,
    Losses,
    Point,
    Storage,
    all_sizes,
    next_size,
    sizes_at,
    some_of,
)
from mlakit.conversion.calibrate import layer_weights
from mlakit.conversion.card import converted_config, model_card
from mlakit.conversion.factor import (
    Tensors,
    all_finite,
    article,
    equal_cache,
    identity_norm_exponent,
    latent_bound,
)
from mlakit.conversion.fit import Fit
from mlakit.conversion.judge import Judge
from mlakit.conversion.plan import WORK_NAME, ConversionPlan, Progress, resized
from mlakit.conversion.quantised import in_even_basis
from mlakit.conversion.refine import Refiner
from mlakit.conversion.stream import LayerReader
from mlakit.conversion.survey import Survey
from mlakit.conversion.tokenizer import name_tokenizer_class
from mlakit.conversion.transmla import LayerResult, TransMLA
from mlakit.conversion.windows import WindowChoice, held_out_record
from mlakit.data import Source
from mlakit.engines.targets import TARGETS
from mlakit.errors import MlakitError, UsageError
from mlakit.families import FAMILIES, read_model
from mlakit.nn.device import usable_device

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
HIGHEST_EXPONENT = {"float16": 15}
"""float16 holds no power of two above 2^15; elsewhere any exponent fits."""


class Run:
    """One conversion, ready to be written. Making it touches no disk and checks the inputs.

    Args:
        checkpoint: the source.
        plan: what to do.
        sources: the texts of the plan; none where it needs none.
        device: where layers run.
        progress: told about every step.

    Raises:
        MlakitError: the text, the tokenizer or the device is of no use.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: ConversionPlan,
        *,
        sources: Sequence[Source],
        device: str,
        progress: Progress,
    ) -> None:
        self.checkpoint = checkpoint
        self.plan = plan
        self.progress = progress
        self.model = read_model(checkpoint.config)
        self.family = FAMILIES[self.model.family]
        self.reader = LayerReader(checkpoint, self.model, usable_device(device))
        self.texts: WindowChoice | None = None
        self.windows: torch.Tensor | None = None
        if plan.calibration is not None:
            self.reader.check()
            self.texts = WindowChoice(checkpoint, self.model, plan.calibration, sources, device)
            self._warn_of_little_text(self.texts.count * plan.calibration.window)

    def write(self, shards: ShardWriter) -> ConversionPlan:
        """Writes what is not there yet into the folder that ``shards`` holds.

        Returns:
            The plan with what was measured.
        """
        self.shards = shards
        self.work = shards.folder / WORK_NAME
        shards.begin()
        self.plan.write(shards.folder, "running")
        self.round = self.work
        self.work.mkdir(exist_ok=True)
        if self.texts is not None:
            self.chosen = self.texts.choose(self.work, self.progress)
            self.windows = self.chosen.ids
        return self._finish(self._convert())

    def _warn_of_little_text(self, tokens: int) -> None:
        width = self.plan.source_layer.cache_width
        if tokens < 4 * width:
            warning = (
                f"{tokens:,} tokens of calibration text are few for {width} numbers per token"
                " and layer; give more text"
            )
            self.plan = replace(self.plan, warnings=(*self.plan.warnings, warning))

    def _convert(self) -> dict[str, Any]:
        """Writes every layer that is not there yet; gives what was measured on the whole."""
        if self.windows is None:
            for index, tensors, facts in self._equal_cache():
                self._write_layer(index, tensors, facts)
            return {}
        measured: dict[str, Any] = {"calibration_windows": len(self.windows)}
        common = (self.reader, self.plan, self.windows, self.work, self.progress)
        if self.plan.goal.method == "transmla":
            method = TransMLA(*common)
            self._write_layers(method)
            return measured | method.measured | self._judged()
        survey = Survey(*common)
        survey.run()
        return measured | self._sized(survey)

    def _sized(self, survey: Survey) -> dict[str, Any]:
        """Writes the layers at the sizes that the survey speaks for; gives what they lose."""
        if not self.plan.goal.has("downstream"):
            self._write_layers(Fit(survey, self.plan))
            measured = self._judged()
        else:
            measured = self._allocated(survey)
        theta = survey.thetas.get(self.plan.target.qk_rope_head_dim or 0)
        return measured if theta is None else {**measured, "rope_theta": theta}

    def _allocated(self, survey: Survey) -> dict[str, Any]:
        """The same where the survey predicts what each size loses."""
        goal, every = self.plan.goal, survey.losses()
        ranks = TARGETS[goal.engine].ranks(self.plan.source_layer, self.plan.target)
        own, storages = self.plan.source_layer.rotary_dim, self._storages()
        sizes = all_sizes(every, goal.layer_ranks, ranks, own, storages)
        measured: dict[str, Any] = {"curve": [asdict(point) for point in some_of(sizes)]}
        if goal.max_kl is not None:
            self._tell(measured)
            measured |= self._search(survey, sizes, goal.max_kl)
        else:
            found = self._sizes_asked_for(every, own, storages)
            if len(found) > 1:
                measured["considered"] = sorted(
                    (p.rope_dim, p.cache_format or "", p.predicted_kl) for p in found
                )
            self._resize(found[0])
            self._tell(measured)
            self._write_layers(Fit(survey, self.plan))
            measured |= self._judged()
        target = self.plan.target
        chosen = next(losses for losses in every if losses.rope_dim == target.qk_rope_head_dim)
        storage = next(each for each in storages if each.kind == target.cache_format)
        return {**measured, "predicted_kl": chosen.point(self.plan.ranks, storage).predicted_kl}

    def _storages(self) -> list[Storage]:
        """How the result may cache its latents."""
        itemsize = self.plan.source_cache_bytes // sum(s.cache_width for s in self.model.layers)
        return [Storage(kind, itemsize) for kind in self.plan.goal.cache_formats]

    def _sizes_asked_for(
        self, every: Sequence[Losses], own: int, storages: Sequence[Storage]
    ) -> list[Point]:
        """The sizes that a rank or a ratio allows, the best one first."""
        goal = self.plan.goal
        if goal.kv_lora_rank is not None:
            return [every[0].divided(goal.kv_lora_rank, goal.layer_ranks, storages[0])]
        width = self.plan.target.cache_width
        if goal.cache_bits != 16:
            full = self.plan.source_layer.cache_width
            width = math.floor((goal.cache_ratio or 0.0) * full + 1e-9)
        return sizes_at(every, width, goal.layer_ranks, own, storages)

    def _resize(self, size: Point) -> None:
        self.plan = resized(self.plan, size.ranks, size.rope_dim, size.cache_format)

    def _search(self, survey: Survey, sizes: list[Point], limit: float) -> dict[str, Any]:
        """Converts until the smallest size within the limit is found and written last.

        Every round has a folder of its own for what a later start can use, and overwrites the
        shards of the round before; the index comes when the search is over.
        """
        path, predicted = self.work / "search.json", [point.predicted_kl for point in sizes]
        rounds: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []

        def tried() -> list[tuple[int, float]]:
            return [(found["size"], found["held_out_kl"]) for found in rounds]

        while (index := next_size(predicted, tried(), limit)) is not None:
            self.progress("search", len(rounds), SEARCH_ROUNDS)
            self._begin_round(len(rounds), sizes[index])
            self._write_layers(Fit(survey, self.plan))
            rounds.append({"size": index, **self._judged()})
            write_json_atomic(path, rounds)
            for activations in self.round.glob("*.f32"):
                activations.unlink()
        last = rounds[-1]
        self._begin_round(len(rounds) - 1, sizes[last["size"]])
        if last["held_out_kl"] > limit:
            self._refuse(last["held_out_kl"], limit)
        found = {name: value for name, value in last.items() if name != "size"}
        return {**found, "search": [(sizes[i].cache_ratio, kl) for i, kl in tried()]}

    def _begin_round(self, number: int, size: Point) -> None:
        self.round = self.work / f"round-{number}"
        self.round.mkdir(exist_ok=True)
        self._resize(size)

    def _refuse(self, found: float, limit: float) -> None:
        """Even the largest size loses more than is allowed: nothing stays."""
        for shard in range(1, self.plan.shards + 1):
            self.shards.path(shard).unlink(missing_ok=True)
        shutil.rmtree(self.work)
        (self.shards.folder / PLAN_NAME).unlink()
        nearest = math.ceil(found * 1e4) / 1e4
        wider = "" if len(self.plan.rope_dims) > 1 else "a wider --qk-rope-head-dim or "
        raise UsageError(
            f"--max-kl {limit:g} cannot be met: the largest size, rank"
            f" {self.plan.target.kv_lora_rank} + rope {self.plan.target.qk_rope_head_dim}, loses"
            f" {found:.4g} nats per token on held-out calibration text",
            remedy=f"the nearest are --max-kl {nearest:g} and --equal-cache (exact, the source's"
            f" own bytes); {wider}more --refine-steps lose less",
        )

    def _tell(self, measured: dict[str, Any]) -> None:
        """Puts what is known so far into ``plan.json``."""
        replace(self.plan, measured=measured).write(self.shards.folder, "running")

    def _write_layers(self, method: Fit | TransMLA) -> None:
        """Every layer that is not there yet, refined if it shall be."""
        refiner = None
        if self.plan.goal.steps and self.windows is not None:
            common = (self.reader, self.plan, self.windows)
            refiner = Refiner(*common, self.work, self.round, self.progress)
        for index, tensors, facts in method.layers(self._is_done):
            if refiner is not None:
                tensors, facts = refiner.refine(index, tensors, facts)
            if self.plan.target.cache_format:
                tensors = in_even_basis(self.reader, self.plan, index, tensors, facts)
            self._write_layer(index, tensors, facts)

    def _judged(self) -> dict[str, Any]:
        """What the layers on disk lose on the held-out windows, and on each text."""
        common = (self.reader, self.plan, self.chosen.ids, self.chosen.checks)
        judge = Judge(*common, self.work, self.round, self.progress)
        for index in range(len(self.plan.layers)):
            prefix = self.family.attention_prefix(index)
            stored = load_file(self.shards.path(index + 1))
            tensors = {
                name.removeprefix(prefix): tensor
                for name, tensor in stored.items()
                if name.startswith(prefix)
            }
            facts = json.loads(self._facts(index).read_text())
            judge.see(index, tensors, facts.get("frequencies"))
            if "error" not in facts:
                write_json_atomic(self._facts(index), {**facts, **judge.layers[index]})
        return held_out_record(self.chosen, judge.divergence())

    def _finish(self, measured: dict[str, Any]) -> ConversionPlan:
        """The tensors outside the layers, then config, card and index; then the work is gone."""
        count = len(self.plan.layers)
        facts = [json.loads(self._facts(index).read_text()) for index in range(count)]
        exponent = max(fact.pop("norm_exponent") for fact in facts)
        exponent = min(exponent, HIGHEST_EXPONENT.get(self.plan.dtype, exponent))
        plan = replace(self.plan, measured={**measured, "layers": facts})
        plan = _with_theta(plan, measured.get("rope_theta"))
        self.progress("write", 0, 1)
        if not self.shards.exists(plan.shards):
            self.shards.write(plan.shards, self._rest(exponent))
        folder = self.shards.folder
        copy_side_files(self.checkpoint.path, folder)
        name_tokenizer_class(self.checkpoint.path, folder)
        write_text_atomic(folder / "README.md", model_card(plan, origin(self.checkpoint)))
        config = converted_config(self.checkpoint.config, plan, self.model, exponent)
        write_json_atomic(folder / "config.json", config)
        self.shards.finish()
        plan.write(folder, "complete")
        shutil.rmtree(self.work, ignore_errors=True)  # who finds it complete does so too
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

    def _write_layer(self, index: int, tensors: Tensors, facts: dict[str, Any]) -> None:
        """One shard: the new attention tensors, and the layer's other tensors as they are."""
        down = tensors["kv_a_proj_with_mqa.weight"]
        bias = tensors.get("kv_a_proj_with_mqa.bias", down.new_zeros(len(down)))
        latent = torch.cat([down, bias[:, None]], 1)[: self.plan.layers[index].kv_lora_rank]
        prefix, spec = self.family.attention_prefix(index), self.model.layers[index]
        source = self.reader.attention(index)
        normed, rank = spec.qk_norm is not None, spec.kv_lora_rank
        scale = input_scale(self.reader, index, source, qk_norm=normed, rank=rank)
        exponent = identity_norm_exponent(latent_bound(latent, scale))
        tensors = stored_tensors(tensors, source, spec, self.plan.layers[index])
        new = {prefix + name: tensor for name, tensor in tensors.items()}
        self.shards.write(index + 1, self._shard(index + 1, new))
        # Last: in a search the shard of an earlier round may stand where this round's shall.
        write_json_atomic(self._facts(index), {**facts, "norm_exponent": exponent})

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
            # What is planned as a copy keeps the source's bytes, whatever the algebra held it in.
            value = None if tensor.copied else new.get(tensor.name)
            if value is None:
                value = self.checkpoint.read(tensor.name)
            if not tensor.copied:
                value = value.to(TORCH_DTYPES[tensor.dtype]).contiguous()
                if not all_finite(value):
                    raise MlakitError(
                        f"{tensor.name} has numbers that {tensor.dtype} cannot hold",
                        remedy="use --dtype bfloat16 or float32",
                    )
            result[tensor.name] = value
        return result

    def _facts(self, index: int) -> Path:
        return self.round / f"layer-{index:05d}.json"


def _with_theta(plan: ConversionPlan, theta: float | None) -> ConversionPlan:
    """The plan with the base of the rotary frequencies that was chosen, if one was."""
    layers = (
        plan.layers
        if theta is None
        else tuple(
            replace(layer, rope=replace(layer.rope, theta=theta)) if layer.rope else layer
            for layer in plan.layers
        )
    )
    return replace(plan, layers=layers)
