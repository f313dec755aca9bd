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

BATCH, TEST_BATCH = 8, 2
"""Windows per batch of calibration and of test, the converter's defaults."""


def convert(
    checkout: Path, model_path: Path, output: Path, windows: torch.Tensor, rank: int, rope: int,
    freqfold: int | str, test: torch.Tensor | None = None,
) -> dict[str, float]:  # fmt: skip
    """One conversion as its ``converter.py`` does it.

    Args:
        checkout: the repository.
        model_path: the source.
        output: where ``save_pretrained`` writes to.
        windows: token ids ``[windows, T]``.
        rank: ``--kv-lora-rank``.
        rope: ``--qk-mqa-dim``.
        freqfold: ``--freqfold``.
        test: token ids ``[windows, T]`` that perplexities are scored on: of the source, of every
            fold that ``auto`` tries, and of the result. None for no scoring, which a fixed
            freqfold allows.

    Returns:
        Seconds of loading the model, of both steps, and of saving; with ``test`` also those of
        all scorings together, which the steps hold, and their number.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    partial_rope, lora_qkv = _modules(checkout)
    scored = _watch_scoring(partial_rope, lora_qkv)
    clock = [time.perf_counter()]
    model = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    clock.append(time.perf_counter())
    batches = _batches(windows, BATCH)
    tests = None if test is None else _batches(test, TEST_BATCH)
    if tests is not None:
        partial_rope.evaluate_ppl(model, tokenizer.pad_token_id, tests)
    options = {
        "freqfold": freqfold,
        "collapse": model.config.head_dim // rope,
        "q_lora_rank": None,
        "qk_mqa_dim": rope,
        "kv_lora_rank": rank,
        "use_qkv_norm": False,
        "balance_kv_ratio": 1,
    }
    found = partial_rope.partial_rope(model, tokenizer, batches, tests, **options)
    model, options["freqfold"] = found if freqfold == "auto" else (found, freqfold)
    clock.append(time.perf_counter())
    model = lora_qkv.low_rank_qkv(model, tokenizer, batches, tests, **options)
    clock.append(time.perf_counter())
    model.save_pretrained(output)
    clock.append(time.perf_counter())
    names = ("load", "partial_rope", "low_rank", "save")
    found = {name: end - start for name, start, end in zip(names, clock, clock[1:])}
    return found | ({} if test is None else {"scoring": sum(scored), "scorings": len(scored)})


def _batches(windows: torch.Tensor, size: int) -> list[dict[str, torch.Tensor]]:
    return [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in windows.split(size)
    ]


def _watch_scoring(*modules: Any) -> list[float]:
    """Processor seconds of every call of the converter's ``evaluate_ppl``, as they come."""
    seconds: list[float] = []
    score = modules[0].evaluate_ppl

    def watched(*arguments: Any) -> float:
        start = time.process_time()
        found = score(*arguments)
        seconds.append(time.process_time() - start)
        return float(found)

    for module in modules:
        module.evaluate_ppl = watched
    return seconds


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
