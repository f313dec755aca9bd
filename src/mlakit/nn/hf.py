"""Converted checkpoints as transformers models: registration, loading, caches, layer specs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.utils import logging as hf_logging

from mlakit.errors import MlakitError, UnsupportedModelError, UsageError
from mlakit.families import read_model
from mlakit.nn import configs, models
from mlakit.nn.cache import LatentCache
from mlakit.nn.even_latent import even_latents
from mlakit.spec import QUANTISED_ROWS, AttentionSpec, CacheKind

INDEX = "model.safetensors.index.json"


def register() -> None:
    """Tells transformers' Auto classes about converted checkpoints; safe to call twice."""
    for family, config in configs.CONFIGS.items():
        model, causal = models.MODELS[family]
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)
        stored = get_checkpoint_conversion_mapping(family)  # e.g. experts one by one on disk
        if stored is not None:
            register_checkpoint_conversion_mapping(config.model_type, stored, overwrite=True)


@contextmanager
def bars_on_terminals() -> Iterator[None]:
    """transformers' progress bars only where somebody watches: a log keeps all their states."""
    quiet = hf_logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if quiet:
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if quiet:
            hf_logging.enable_progress_bar()


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    cache_format: CacheKind | None = None,
) -> PreTrainedModel:
    """A checkpoint, converted or ordinary, in evaluation mode.

    Args:
        path: a folder or a hub id; safetensors only, no remote code.
        dtype: dtype of the weights, e.g. ``torch.bfloat16`` or ``"bfloat16"``; the checkpoint's
            own by default.
        device: where the model goes.
        cache_format: how ``new_cache`` holds the latents of a converted model: ``fp8``, ``int8`` or
            ``int4``; as its config says by default. Where the config says nothing, the weights
            become those of the same function in a basis that suits such a cache
            (``even_latent``).

    Raises:
        MlakitError: the folder is unfinished or incomplete, or transformers cannot read it.
        UnsupportedModelError: a newer mlakit wrote the folder.
        UsageError: the dtype or the device cannot hold this model, or the cache format is unknown
            or for a model without latents.
    """
    register()
    if cache_format not in (None, *QUANTISED_ROWS):
        raise UsageError(
            f"there is no cache format {cache_format!r}", remedy=f"use {', '.join(QUANTISED_ROWS)}"
        )
    if isinstance(dtype, str) and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise UsageError(f"there is no dtype {dtype!r}", remedy="use float32, bfloat16 or float16")
    folder = Path(path).expanduser()
    if folder.is_dir():
        _check_folder(folder)
        path = folder
    try:
        with bars_on_terminals():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(path),
                dtype=dtype or "auto",
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # reported below, by name
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise MlakitError(
            f"{path} cannot be loaded: {error}",
            remedy="check the path; a folder needs config.json and *.safetensors",
        ) from error
    model, info = loaded
    _check_tensors(path, model.config, info)
    _check_range(path, model)
    if cache_format is not None:
        if not isinstance(model.config, configs.LatentConfig):
            raise UsageError(
                f"{path} caches keys and values, and a cache in {cache_format} is for latents",
                remedy="convert it first, or leave the cache format out",
            )
        if model.config.cache_format is None:
            even_latents(model)  # else its weights are in that basis on disk
        model.config.cache_format = cache_format
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # some versions' SDPA leaves the cap out, silently
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"{path} cannot be put on device {device}: {error}", remedy="try device cpu"
        ) from error


def _check_tensors(path: str | Path, config: Any, info: dict[str, Any]) -> None:
    """Refuses a checkpoint whose tensors are not the ones its config calls for."""
    wrong = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    wrong += [
        f"{name} has shape {list(found)} instead of {list(wanted)}"
        for name, found, wanted in sorted(info["mismatched_keys"])
    ]
    if isinstance(config, configs.LatentConfig):  # e.g. a bias that the config does not announce
        extra = sorted(name for name in info["unexpected_keys"] if "rotary_emb" not in name)
        wrong += [f"{name} has no place in the model" for name in extra]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise MlakitError(
            f"{path} does not hold what its config.json promises: {', '.join(wrong[:3])}{more}",
            remedy="convert or download it again",
        )


def _check_range(path: str | Path, model: PreTrainedModel) -> None:
    """Refuses float16 where the weight of the latent norm, sqrt(eps), would be infinite in it."""
    eps = getattr(model.config, "latent_norm_eps", 0.0)
    if model.dtype == torch.float16 and eps > 4.0**15 and model.config.mla_form != "article":
        raise UsageError(
            f"{path} has latent_norm_eps {eps:g}, whose root does not fit in float16",
            remedy="load it in bfloat16 or float32",
        )


def _check_folder(folder: Path) -> None:
    """Refuses a folder that cannot be complete, before any tensor is read."""
    config, index = folder / "config.json", folder / INDEX
    if (folder / "plan.json").is_file() and not index.is_file():
        raise MlakitError(
            f"the conversion that writes {folder} has not finished",
            remedy="run the same mlakit convert command again: it goes on where it stopped",
        )
    if not config.is_file():
        raise MlakitError(
            f"{folder} has no config.json", remedy="give the folder that holds config.json"
        )
    try:
        version = (json.loads(config.read_text("utf-8")).get("mlakit") or {}).get(
            "format_version", configs.FORMAT_VERSION
        )
        shards = json.loads(index.read_text("utf-8"))["weight_map"] if index.is_file() else {}
    except (ValueError, KeyError, AttributeError) as error:
        raise MlakitError(f"{folder} has a damaged config.json or {INDEX}: {error}") from error
    if version > configs.FORMAT_VERSION:
        raise UnsupportedModelError(
            f"{folder} has format version {version}, this mlakit reads "
            f"{configs.FORMAT_VERSION} and older",
            remedy="upgrade mlakit",
        )
    absent = sorted({name for name in shards.values() if not (folder / name).is_file()})
    if absent:
        raise MlakitError(
            f"{folder} lacks {', '.join(absent)}, which {INDEX} lists",
            remedy="convert or download it again",
        )


def attention_specs(model: Any) -> list[AttentionSpec]:
    """One AttentionSpec per decoder layer of a model or of its config, converted or ordinary."""
    config = getattr(model, "config", model)
    return list(read_model(config.to_dict()).layers)


def new_cache(model: PreTrainedModel, batch_size: int, max_length: int) -> Cache:
    """An empty cache for a model: a LatentCache if it was converted, else a DynamicCache.

    Args:
        model: the model.
        batch_size: sequences, B.
        max_length: tokens a sequence can hold; a DynamicCache grows and needs none.
    """
    if isinstance(model.config, configs.LatentConfig):
        return LatentCache(
            attention_specs(model), batch_size, max_length, dtype=model.dtype, device=model.device
        )
    return DynamicCache(config=model.config)


def cache_nbytes(cache: Cache) -> int:
    """Bytes that the tensors of a cache really hold, each storage counted once."""
    if isinstance(cache, LatentCache):
        return cache.nbytes
    storages = {}
    for tensor in _tensors([vars(layer) for layer in cache.layers]):
        if tensor.dim() > 0:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested lists, dicts and dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        yield from _tensors(vars(value))
