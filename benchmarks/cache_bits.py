"""The same bytes spent on rank alone, or on rank and bits as calibration chooses them.

    python -m benchmarks.cache_bits [MODEL ...]

Writes results/cache_bits.json. Sources are bfloat16 (a copy is made where they are not), so their
own cache has 16 bits; conversions are by algebra alone and scored through the cache of a prefix.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from benchmarks.conversion_quality import DEMO, ROOT, SHARED, STORIES

from mlakit.benching.environment import environment
from mlakit.checkpoint import open_checkpoint, write_json_atomic
from mlakit.conversion.apply import convert
from mlakit.conversion.card import size_words
from mlakit.errors import UsageError
from mlakit.evaluation import evaluate
from mlakit.nn.hf import load

RESULT = ROOT / "benchmarks" / "results" / "cache_bits.json"
RATIOS = (0.5, 0.28, 0.2, 0.125)
TEXTS = SHARED / "data" / "tinystories"


def in_bfloat16(source: Path, folder: Path) -> Path:
    """A copy of a checkpoint in bfloat16, with its tokenizer."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    load(source, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def measure(source: Path, ratio: float, bits: Any, work: Path, known: bool) -> dict[str, Any]:
    """One conversion: its size, its bytes, what it loses."""
    options = {"calibration": TEXTS / "train.txt"} if known else {}
    try:
        plan = convert(
            source, work, cache_ratio=ratio, cache_bits=bits, refine_steps=0,
            calibration_tokens=16384, **options,
        )  # fmt: skip
    except UsageError as error:
        return {"refused": str(error)}
    text = str(TEXTS / "valid.txt") if known else None
    # Rounding of 16-bit weights is not what is compared: both sides compute in float32.
    report = evaluate(source, work, text=text, windows=8, recall=False, max_new_tokens=0,
                      dtype=torch.float32)  # fmt: skip
    assert report.quality.agreement is not None
    return {
        "size": size_words(plan),
        "bytes_per_token": plan.cache_bytes,
        "share": plan.cache_ratio,
        "kl": report.quality.agreement.kl_mean.model_dump(),
        "top1": report.quality.agreement.top1.model_dump(),
        "predicted": plan.measured["predicted_kl"],
        "held_out": plan.measured["held_out_kl"],
    }


def main() -> None:
    """Measures the models given, or the packaged one and two that know a text at hand."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    models = arguments.models or [DEMO, *(SHARED / "models" / name for name in STORIES)]
    record: dict[str, Any] = {"environment": environment(), "models": {}}
    with tempfile.TemporaryDirectory() as work:
        for model in models:
            source = model.resolve()
            if open_checkpoint(source).config.get("dtype") != "bfloat16":
                source = in_bfloat16(source, Path(work) / model.name)
            for ratio in RATIOS:
                for bits in (16, "auto"):
                    out = Path(work) / f"{model.name}-{ratio}-{bits}"
                    found = measure(source, ratio, bits, out, model.name in STORIES)
                    rows = record["models"].setdefault(model.name, {})
                    rows.setdefault(f"{1000 * ratio:.0f}", {})[str(bits)] = found
                    write_json_atomic(arguments.output, record)
                    kl = found.get("kl", {}).get("value")
                    print(model.name, ratio, bits, found.get("size"), kl, flush=True)


if __name__ == "__main__":
    main()
