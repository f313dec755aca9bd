"""What the calibration text is worth: real text, the model's own samples, the wrong kind, a mix.

    python -m benchmarks.conversion_calibration [MODEL ...]

Writes results/conversion_calibration.json. Each model is converted at half its cache with each
choice of calibration text and scored on texts that no conversion has seen: KL divergence from the
source and excess log loss, with intervals over windows. ``home`` is the kind of text that a model
was trained on; one that knows no text at hand is scored on samples of its own, drawn with another
seed than those it is calibrated with.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from mlakit.benching.environment import environment
from mlakit.conversion.apply import convert
from mlakit.conversion.samples import draw_samples, read_script
from mlakit.data import BUILTIN, Source, named_sources, source_windows
from mlakit.evaluation.quality import bootstrap, kl_divergence
from mlakit.nn.hf import load

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("MLAKIT_SHARED", ROOT.parent / "shared"))
RESULT = ROOT / "benchmarks" / "results" / "conversion_calibration.json"
STORIES = ("stories260k", "llama2xs280k")
TOKENS, LONGEST, WINDOWS, TEST_SEED = 12288, 512, 24, 77


def texts(folder: Path, work: Path) -> tuple[dict[str, list[str]], dict[str, Source | None]]:
    """Calibration texts by choice, and test texts; None is a sample of the model's own."""
    data = SHARED / "data"
    wiki = str(data / "wikitext-2" / "train_first1MB.raw.txt")
    choices = {"wiki": [wiki], "self": ["self"], "self + wiki": ["self", f"wiki={wiki}"]}
    tests: dict[str, Source | None] = {"home": None}
    if folder.name in STORIES:
        for split in ("train", "valid"):
            stories = (data / "tinystories" / f"{split}.txt").read_text(encoding="utf-8")
            path = work / f"{split}.txt"
            path.write_text(stories[: 10 * TOKENS].replace("<|endoftext|>", ""), encoding="utf-8")
        choices = {"home": [str(work / "train.txt")], **choices}
        tests["home"] = named_sources(work / "valid.txt")[0]
    choices["built-in"] = [BUILTIN]
    return choices, tests | {"wiki": named_sources(data / "wikitext-2" / "test.raw.txt")[0]}


def cut(folder: Path, source: Source | None) -> torch.Tensor:
    """Test windows ``[WINDOWS, T]`` of a text, or of the model's own."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load(folder, dtype=torch.float32)
    length = min(LONGEST, model.config.max_position_embeddings)
    if source is None:
        return draw_samples(model, read_script(model, tokenizer), WINDOWS, length, TEST_SEED)
    return torch.tensor(source_windows(source, tokenizer, length, WINDOWS))


@torch.inference_mode()
def scores(folder: Path, windows: torch.Tensor) -> torch.Tensor:
    """Log probabilities of every token at every position, ``[windows, T - 1, vocabulary]``."""
    model = load(folder, dtype=torch.float32)
    parts = [model(input_ids=ids[None], use_cache=False).logits[0, :-1] for ids in windows]
    return torch.stack(parts).log_softmax(-1)


def compare(source: torch.Tensor, result: torch.Tensor, windows: torch.Tensor) -> dict[str, Any]:
    """KL divergence and excess log loss, nats per token, with 95 % bootstraps over windows."""
    change = (source - result).gather(2, windows[:, 1:, None]).double()
    kl = bootstrap(kl_divergence(source, result).mean(1).numpy(), seed=0)
    excess = bootstrap(change.mean((1, 2)).numpy(), seed=0)
    return {"kl": kl.model_dump(), "excess": excess.model_dump()}


def measure(folder: Path, work: Path, steps: list[int]) -> dict[str, Any]:
    """One model: every choice of text at every number of refinement steps."""
    choices, tests = texts(folder, work)
    windows = {name: cut(folder, source) for name, source in tests.items()}
    source = {name: scores(folder, ids) for name, ids in windows.items()}
    found: dict[str, Any] = {"loss": {}, "steps": {}}
    for name, ids in windows.items():
        found["loss"][name] = -float(source[name].gather(2, ids[:, 1:, None]).mean())
    for count in steps:
        row = found["steps"].setdefault(str(count), {})
        for choice, places in choices.items():
            started = time.perf_counter()
            with tempfile.TemporaryDirectory(dir=work) as out:
                convert(
                    folder, out, cache_ratio=0.5, calibration=places, calibration_tokens=TOKENS,
                    refine_steps=count, dtype="float32",
                )  # fmt: skip
                seconds = time.perf_counter() - started
                row[choice] = {
                    name: compare(source[name], scores(Path(out), ids), ids)
                    for name, ids in windows.items()
                } | {"seconds": seconds}
            kl = {name: f"{row[choice][name]['kl']['value']:.3f}" for name in windows}
            print(f"{folder.name} {count} steps, {choice}: KL {kl}, {seconds:.0f} s", flush=True)
    return found


def share(model: dict[str, Any], found: dict[str, Any], test: str) -> float:
    """KL divergence over the source's own loss on a test text."""
    return float(found[test]["kl"]["value"] / model["loss"][test])


def unevenness(models: dict[str, Any]) -> dict[str, Any]:
    """How much larger the share of one kind of text is than that of the other.

    Returns:
        Smallest and largest ratio over models and steps: of the larger to the smaller share where
        both kinds were calibrated on; and where one was, of the other's share to its own.
    """
    both, alone, wrong = [], [], []
    for model in models.values():
        for choices in model["steps"].values():
            shares = {
                name: (share(model, found, "home"), share(model, found, "wiki"))
                for name, found in choices.items()
            }
            both.append(max(shares["self + wiki"]) / min(shares["self + wiki"]))
            alone.append(shares["self"][1] / shares["self"][0])
            wrong.append(shares["wiki"][0] / shares["wiki"][1])
    found = {"both": both, "self, on wiki": alone, "wiki, on home": wrong}
    return {name: {"smallest": min(row), "largest": max(row)} for name, row in found.items()}


def main() -> None:
    """Measures the models given, or all at hand; what was measured before stays."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path, help="folders; default: all at hand")
    parser.add_argument("--steps", nargs="+", type=int, default=[0], help="of refinement")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    at_hand = sorted(path.parent for path in (SHARED / "models").glob("*/config.json"))
    for folder in arguments.models or at_hand:
        with tempfile.TemporaryDirectory() as work:
            found = measure(folder.resolve(), Path(work), arguments.steps)
        record: dict[str, Any] = {"models": {}}
        if arguments.output.exists():
            record = json.loads(arguments.output.read_text(encoding="utf-8"))
        known = record["models"].setdefault(folder.name, {"steps": {}})
        known["loss"] = found["loss"]
        known["steps"] |= found["steps"]
        record["unevenness"] = unevenness(record["models"])
        record["environment"] = environment()
        arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
