"""What compression costs on the demo model, size by size, and what well-known models cache.

    python -m benchmarks.overview        # results/overview.json and docs/overview.png

Every point is a real conversion, untrained: the published method, ours as algebra alone, and ours
as it is by default. All are scored after a cached prefix by the same code as ``mlakit eval``; bytes
are those the cache holds. Nothing is downloaded.
"""

from __future__ import annotations

import json
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from mlakit import account
from mlakit.benching.environment import environment
from mlakit.conversion.apply import convert
from mlakit.evaluation import evaluate
from mlakit.families import read_model

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "overview.json"
PICTURE = ROOT / "docs" / "overview.png"
SIZES = ((192, 64), (64, 64), (32, 64), (32, 32))
METHODS: dict[str, dict[str, Any]] = {
    "published": {"method": "transmla", "refine_steps": 0},
    "closed_form": {"refine_steps": 0},
    "ours": {},
}
SHAPES: dict[str, dict[str, int]] = {
    "Llama-2-7B": {"hidden_size": 4096, "layers": 32, "heads": 32, "groups": 32},
    "Llama-3-8B": {"hidden_size": 4096, "layers": 32, "heads": 32, "groups": 8},
    "Qwen2.5-14B": {"hidden_size": 5120, "layers": 48, "heads": 40, "groups": 8},
    "Qwen2.5-7B": {"hidden_size": 3584, "layers": 28, "heads": 28, "groups": 4},
}
INK, OWN, LATENT, PALE, GREY = "#22252b", "#4477aa", "#cc6644", "#c3c8d0", "#8a919e"


def measure(source: Path, folder: Path, **goal: Any) -> dict[str, Any]:
    """Converts the demo model and scores the result against it."""
    started = time.perf_counter()
    convert(source, folder, **goal)
    seconds = time.perf_counter() - started
    report = evaluate(str(source), str(folder), dtype="float32", max_new_tokens=0)
    result, agreement = report.result, report.quality.agreement
    assert result is not None and agreement is not None and report.quality.result is not None
    recall = [c for c in (report.recall.columns() if report.recall else []) if c.usable]
    return {
        "percent_of_own": result.percent_of_own,
        "kl": agreement.kl_mean.value,
        "top1": agreement.top1.value,
        "perplexity": report.quality.result.perplexity.value,
        "source_perplexity": report.quality.source.perplexity.value,
        "recall": sum(c.result or 0.0 for c in recall) / len(recall) if recall else None,
        "source_recall": sum(c.source for c in recall) / len(recall) if recall else None,
        "conversion_seconds": seconds,
    }


def cached_bytes() -> dict[str, dict[str, int]]:
    """Bytes per token in 16 bits: as MHA, as it is, and with DeepSeek's 512 + 64."""
    table = {}
    for name, shape in SHAPES.items():
        spec = read_model(
            {
                "model_type": "llama",
                "hidden_size": shape["hidden_size"],
                "num_hidden_layers": shape["layers"],
                "num_attention_heads": shape["heads"],
                "num_key_value_heads": shape["groups"],
                "head_dim": 128,
                "intermediate_size": 14336,
                "vocab_size": 128256,
                "max_position_embeddings": 8192,
                "rms_norm_eps": 1e-5,
                "rope_theta": 500000.0,
            }
        )
        variants = {
            "mha": [account.as_mha(layer) for layer in spec.layers],
            "own": list(spec.layers),
            "latent": [account.as_mla(layer, 512, 64) for layer in spec.layers],
        }
        table[name] = {
            key: account.cache_bytes_per_token(layers, 2) for key, layers in variants.items()
        }
    return table


def draw(record: dict[str, Any]) -> None:
    """One picture: bytes on the left, their price on the right."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.4), width_ratios=(1.15, 1))
    names = list(record["cached_bytes"])
    styles = (("mha", PALE, "as MHA"), ("own", OWN, "today"), ("latent", LATENT, "MLA 512 + 64"))
    for offset, (key, colour, label) in zip((-0.27, 0.0, 0.27), styles):
        values = [record["cached_bytes"][name][key] / 1024 for name in names]
        places = [index + offset for index in range(len(names))]
        left.barh(places, values, height=0.25, color=colour, label=label)
        for place, value in zip(places, values):
            left.text(value + 8, place, f"{value:.0f}", va="center", color=INK, fontsize=8)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("KV cache, KiB per token (16 bit)")
    left.legend(frameon=False, loc="lower right")

    sizes = sorted(record["compress"].values(), key=lambda size: size["ours"]["percent_of_own"])
    shares = [size["ours"]["percent_of_own"] for size in sizes]
    for name, colour, style, label in (
        ("published", GREY, "o--", "compress, published"),
        ("closed_form", LATENT, "o:", "compress, algebra alone"),
        ("ours", LATENT, "o-", "compress"),
    ):
        kls = [size[name]["kl"] for size in sizes]
        right.plot(shares, kls, style, color=colour, label=label)
    exact = record["equal_cache"]
    right.plot(
        [exact["percent_of_own"]], [max(exact["kl"], 1e-6)], "D", color=OWN, label="equal-cache"
    )
    right.set_yscale("log")
    right.set_xlabel("cache kept, % of the model's own")
    right.set_ylabel("KL to the source, nats per token")
    right.set_title("demo model, untrained conversion", fontsize=9, loc="left", color=INK)
    right.grid(axis="y", color="#e6e8ec")
    right.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=160)


def main() -> None:
    """Converts, measures, writes the JSON and the picture."""
    record: dict[str, Any] = {"environment": environment(), "cached_bytes": cached_bytes()}
    model = resources.files("mlakit") / "assets" / "demo_model"
    with resources.as_file(model) as source, tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        record["equal_cache"] = measure(source, work / "exact", equal_cache=True)
        record["compress"] = {
            f"{rank}+{rope}": {
                name: measure(
                    source,
                    work / f"{name}-{rank}-{rope}",
                    kv_lora_rank=rank,
                    qk_rope_head_dim=rope,
                    **how,
                )
                for name, how in METHODS.items()
            }
            for rank, rope in SIZES
        }
    RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(record)


if __name__ == "__main__":
    main()
