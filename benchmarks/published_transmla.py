"""Runs a checkout of the published converter (github.com/fxmeng/TransMLA) that the user has.

Nothing of it is here. It was written for transformers 4.52 and the ``datasets`` library; three
shims let it run with transformers 5 and without ``datasets``:

* a stand-in ``datasets`` module, where it is missing: the converter names its classes in
  annotations, and windows of tokens are given to it directly;
* its attention modules are called without the arguments that transformers 5 added;
* keys and values of its one wide head are repeated for every query head in front of SDPA, which
  transformers 4 did not need.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch

BATCH = 8
"""Windows per calibration batch, the converter's default."""


def convert(
    checkout: Path, model_path: Path, output: Path, windows: torch.Tensor, rank: int, rope: int,
    freqfold: int,
) -> dict[str, float]:  # fmt: skip
    """One conversion as its ``converter.py`` does it, without perplexities on a test set.

    Args:
        checkout: the repository.
        model_path: the source.
        output: where ``save_pretrained`` writes to.
        windows: token ids ``[windows, T]``.
        rank: ``--kv-lora-rank``.
        rope: ``--qk-mqa-dim``.
        freqfold: ``--freqfold``.

    Returns:
        Seconds of loading the model, of both steps, and of saving.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    partial_rope, lora_qkv = _modules(checkout)
    clock = [time.perf_counter()]
    model = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    clock.append(time.perf_counter())
    batches = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in windows.split(BATCH)
    ]
    options = {
        "freqfold": freqfold,
        "collapse": model.config.head_dim // rope,
        "q_lora_rank": None,
        "qk_mqa_dim": rope,
        "kv_lora_rank": rank,
        "use_qkv_norm": False,
        "balance_kv_ratio": 1,
    }
    model = partial_rope.partial_rope(model, tokenizer, batches, None, **options)
    clock.append(time.perf_counter())
    model = lora_qkv.low_rank_qkv(model, tokenizer, batches, None, **options)
    clock.append(time.perf_counter())
    model.save_pretrained(output)
    clock.append(time.perf_counter())
    names = ("load", "partial_rope", "low_rank", "save")
    return {name: end - start for name, start, end in zip(names, clock, clock[1:])}


def _modules(checkout: Path) -> tuple[Any, Any]:
    """The converter's two modules, patched."""
    folder = next(path.parent for path in sorted(checkout.rglob("lora_qkv.py")))
    if importlib.util.find_spec("datasets") is None:
        stand_in = types.ModuleType("datasets")
        stand_in.Dataset = stand_in.DatasetDict = dict  # type: ignore[attr-defined]
        sys.modules["datasets"] = stand_in
    sys.path.insert(0, str(folder))
    partial_rope = importlib.import_module("partial_rope")
    lora_qkv = importlib.import_module("lora_qkv")
    for module, name in ((partial_rope, "PartialRope"), (lora_qkv, "LoraQKV")):
        module.ALL_ATTENTION_FUNCTIONS = {"sdpa": _attention}
        kind = getattr(module, name)
        kind.forward = _known_arguments_only(kind.forward)
    return partial_rope, lora_qkv


def _known_arguments_only(forward: Any) -> Any:
    known = inspect.signature(forward).parameters

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {name: value for name, value in kwargs.items() if name in known}
        return forward(self, *args, **given)

    return call


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    key, value = (part.expand(-1, query.shape[1], -1, -1) for part in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=options["scaling"]
    )
    return out.transpose(1, 2), None
