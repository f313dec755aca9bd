"""What a quantised cache costs, in the stored basis of the latent and in the one that suits it.

    python -m benchmarks.quantised_latents [MODEL ...]

Writes results/quantised_latents.json. Models are converted by algebra alone, then scored through
the cache of a prefix against the same conversion with a float32 cache: what is left is the
cache's rounding. ``stored`` is the folder's own basis, whose values are principal axes; ``even``
is what ``load(cache_format=...)`` makes of it (``mlakit.nn.even_latent``).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from benchmarks.conversion_quality import DEMO, ROOT, SHARED, STORIES

from mlakit.benching.environment import environment
from mlakit.checkpoint import write_json_atomic
from mlakit.conversion.apply import convert
from mlakit.evaluation import evaluate
from mlakit.evaluation.subject import open_tokenizer
from mlakit.nn.hf import load, register
from mlakit.spec import QUANTISED_ROWS

RESULT = ROOT / "benchmarks" / "results" / "quantised_latents.json"
GOALS: dict[str, dict[str, Any]] = {
    "equal-cache": {"equal_cache": True},
    "50 %": {"cache_ratio": 0.5, "refine_steps": 0},
    "28 %": {"cache_ratio": 0.28, "refine_steps": 0},
}
STORIES_TEXT = SHARED / "data" / "tinystories"


def measure(source: Path, goal: dict[str, Any], work: Path) -> dict[str, Any]:
    """Nats per token and bytes of every format, in both bases."""
    known = source.name in STORIES
    options = (
        {"calibration": STORIES_TEXT / "train.txt"} if known and "refine_steps" in goal else {}
    )
    text = str(STORIES_TEXT / "valid.txt") if known else None
    plan = convert(source, work, dtype="float32", **goal, **options)
    register()
    tokenizer = open_tokenizer(work)
    exact = ("float32", load(work, dtype=torch.float32), tokenizer)
    found: dict[str, Any] = {"rank": list(plan.ranks), "rope": plan.target.qk_rope_head_dim}
    for kind in QUANTISED_ROWS:
        stored = load(work, dtype=torch.float32)
        stored.config.cache_format = kind
        even = load(work, dtype=torch.float32, cache_format=kind)
        for basis, model in (("stored", stored), ("even", even)):
            report = evaluate(
                exact, (kind, model, tokenizer), text=text, windows=8, recall=False,
                max_new_tokens=0,
            )  # fmt: skip
            assert report.quality.agreement is not None and report.result is not None
            found.setdefault(kind, {"bytes_per_token": report.result.bytes_per_token})
            found[kind][basis] = report.quality.agreement.kl_mean.model_dump()
        found[kind]["gain"] = found[kind]["stored"]["value"] / found[kind]["even"]["value"]
    return found


def main() -> None:
    """Measures the models given, or the packaged one and two that know a text at hand."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    models = arguments.models or [DEMO, *(SHARED / "models" / name for name in STORIES)]
    record: dict[str, Any] = {"environment": environment(), "models": {}}
    for model in models:
        for name, goal in GOALS.items():
            with tempfile.TemporaryDirectory() as work:
                found = measure(model.resolve(), goal, Path(work) / "out")
            record["models"].setdefault(model.name, {})[name.replace(" %", "")] = found
            write_json_atomic(arguments.output, record)
            for kind in QUANTISED_ROWS:
                stored, even = (found[kind][basis]["value"] for basis in ("stored", "even"))
                print(f"{model.name}, {name}, {kind}: {stored:.2g}, {even:.2g}", flush=True)


if __name__ == "__main__":
    main()
