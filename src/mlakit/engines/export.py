"""The verb ``export``: a converted checkpoint as one that stock engines load, checked before it is.

What is written is DeepSeek-V3's layout (``stock``). It is loaded with transformers' own class and
compared with the model it came from; only then does the folder appear.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlakit.checkpoint import (
    Checkpoint,
    ShardWriter,
    copy_side_files,
    open_checkpoint,
    require_free_space,
    require_writable,
    write_json_atomic,
    write_text_atomic,
)
from mlakit.checkpoint.writing import PARTIAL_SUFFIX
from mlakit.engines.card import export_card, read_report
from mlakit.engines.stock import Stock, StockShape
from mlakit.engines.targets import TARGETS, Target
from mlakit.errors import UnsupportedModelError, UsageError, VerificationError
from mlakit.families import FAMILIES, read_model
from mlakit.spec import ModelSpec

if TYPE_CHECKING:
    import torch

    from mlakit.evaluation.quality import TextLike
    from mlakit.reporting.schema import Verification

STOCK_TARGETS = tuple(name for name, target in TARGETS.items() if target.decoders is not None)
"""Engines that run DeepSeek's class; the others load a converted folder as it is."""

LOADS = {
    "transformers": 'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
    "vllm": "vllm serve FOLDER",
    "sglang": "python -m sglang.launch_server --model-path FOLDER",
    "tensorrt-llm": "trtllm-serve FOLDER",
    "llama.cpp": "python convert_hf_to_gguf.py FOLDER --outtype bf16",
}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        to: the engine.
        shape: sizes of its attention.
        width: numbers that one layer caches per token, in the mean over layers, before.
        check: transformers' class on the result against the model it came from.
    """

    to: str
    shape: StockShape
    width: float
    check: Verification


def export(
    model: str | Path,
    output: str | Path,
    *,
    to: str = "transformers",
    pad: bool = False,
    text: TextLike = None,
    windows: int = 2,
    device: str = "cpu",
    report: str | Path | None = None,
) -> Exported:
    """Writes a converted checkpoint in the layout that an engine's own class loads.

    Args:
        model: folder or hub id of a converted checkpoint.
        output: a new folder.
        to: the engine, one of ``STOCK_TARGETS``.
        pad: fill rank and rotary width up with zeros to sizes that the engine takes: exact, but
            the zeros are cached too.
        text: what both are compared on; the package's own by default.
        windows: of each text.
        device: where they are compared.
        report: what ``evaluate`` measured of the model against its source, for the model card:
            ``report.json`` or its folder.

    Raises:
        UsageError: the engine, the model or the folder is of no use here.
        UnsupportedModelError: the engine cannot express the model; says what can.
        VerificationError: the stock class computes something else; nothing was written.
    """
    if to not in STOCK_TARGETS:
        raise UsageError(
            f"--to {to}: it is none of {', '.join(STOCK_TARGETS)}",
            remedy="mlakit's own classes load a converted folder as it is",
        )
    checkpoint = open_checkpoint(model)
    spec = read_model(checkpoint.config)
    shape = require_exportable(checkpoint, spec, to, pad)
    quality = None if report is None else read_report(report, checkpoint)
    folder = Path(output).expanduser()
    _require_new(folder, checkpoint)
    partial = folder.with_name(folder.name + PARTIAL_SUFFIX)
    if partial.exists():
        shutil.rmtree(partial)
    try:
        _write(checkpoint, spec, Stock(checkpoint.config, shape), partial)
        found = _checked(checkpoint, partial, to, text, windows, device)
        card = export_card(checkpoint, to, [LOADS[to]], found, quality)
        _finish(partial, to, card)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        folder.rmdir()  # it was empty
    partial.replace(folder)
    width = sum(layer.cache_width for layer in spec.layers) / len(spec.layers)
    return Exported(to, shape, width, found)


def require_exportable(
    checkpoint: Checkpoint, spec: ModelSpec, to: str, pad: bool = False
) -> StockShape:
    """The sizes to export to.

    Raises:
        UsageError: the checkpoint was not converted.
        UnsupportedModelError: every reason why the engine cannot run it.
    """
    if "mla_form" not in checkpoint.config:
        raise UsageError(
            f"{checkpoint.source} is not a converted checkpoint",
            remedy=f"convert it first: mlakit convert {checkpoint.source} --for {to} -o OUT",
        )
    target = TARGETS[to]
    reasons = _obstacles(checkpoint.config, spec, target)
    shape = _shape(spec, target, pad)
    if shape is None:
        reasons.append(_sizes_in_words(spec, target))
    if reasons or shape is None:
        hint = "" if pad or len(reasons) > 1 or shape is not None else "add --pad, or "
        raise UnsupportedModelError(
            f"--to {to}: {target.runs}: {'; '.join(reasons)}",
            remedy=f"{hint}convert the source for it: mlakit convert SOURCE --for {to} ...; or run"
            " this folder as it is, in mlakit's own classes",
        )
    return shape


def _obstacles(config: dict[str, Any], spec: ModelSpec, target: Target) -> list[str]:
    family, layers = spec.family.removeprefix("mla_"), spec.layers
    ropes = [layer.rope for layer in layers if layer.rope]
    types = {rope.rope_type for rope in ropes}
    found = {
        f"it has no class for the form {config['mla_form']}": config["mla_form"] != "compress",
        f"its decoder layers are not those of {family}": family not in (target.decoders or ()),
        "layers turn with frequencies of their own": bool(config.get("rope_inv_freq")),
        "it has no sliding windows": any(layer.sliding_window for layer in layers),
        "it does not soft-cap scores": any(layer.logit_softcap for layer in layers),
        "latents are made of normed keys or of another latent": any(
            layer.indirect for layer in layers
        ),
        "its queries have no bias": any(layer.q_bias for layer in layers),
        "what it caches has no bias": not target.latent_bias and any(s.kv_bias for s in layers),
        "its output projection has no bias": not target.o_bias and any(s.o_bias for s in layers),
        f"it has no rope_type {', '.join(sorted(types))}": target.rope_types is not None
        and not types <= set(target.rope_types),
        "YaRN's factors are spelled in another way": any(r.attention_factor != 1.0 for r in ropes),
        f"its latent norm is no identity in {config.get('dtype')}": config.get("dtype")
        not in target.dtypes,
    }
    return [reason for reason, there in found.items() if there]


def _shape(spec: ModelSpec, target: Target, pad: bool) -> StockShape | None:
    """The smallest sizes that the engine takes and that hold the model's; None for none."""
    rank, first = max(layer.kv_lora_rank or 0 for layer in spec.layers), spec.layers[0]
    nope, rope = first.qk_nope_head_dim or 0, first.qk_rope_head_dim or 0
    if target.widths is None or target.heads is None:
        return StockShape(rank, rope, nope, first.value_dim)
    nests = first.rope is None or first.rope.rope_type != "yarn"
    fitting = [
        StockShape(width - wide, wide, high, value)
        for width in target.widths
        for high, wide, value in target.heads
        if high >= nope
        and value >= first.value_dim
        and (wide == rope or (pad and nests and wide and wide % rope == 0))
        and (width - wide == rank or (pad and width - wide > rank))
    ]
    return min(fitting, key=lambda s: (s.rank + s.rope, s.nope, s.value), default=None)


def _sizes_in_words(spec: ModelSpec, target: Target) -> str:
    rank, first = max(layer.kv_lora_rank or 0 for layer in spec.layers), spec.layers[0]
    heads = ", ".join(map(str, target.heads or ()))
    widths = " or ".join(map(str, target.widths or ()))
    return (
        f"its kernels take rank + rope = {widths} and (nope, rope, v) of {heads}, not {rank} +"
        f" {first.qk_rope_head_dim} and ({first.qk_nope_head_dim}, {first.qk_rope_head_dim},"
        f" {first.value_dim})"
    )


def _require_new(folder: Path, checkpoint: Checkpoint) -> None:
    require_writable(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"The output folder {folder} is not empty", remedy="choose a new folder")
    if folder.resolve().is_relative_to(checkpoint.path.resolve()):
        raise UsageError(
            f"The output folder {folder} lies in {checkpoint.source}, which is never written to",
            remedy="choose a folder outside of it",
        )
    require_free_space(folder, 2 * checkpoint.nbytes_total)


def _write(checkpoint: Checkpoint, spec: ModelSpec, stock: Stock, folder: Path) -> None:
    """Shards, config, tokenizer; one layer at a time."""
    count = len(spec.layers)
    with ShardWriter(folder, count + 1) as shards:
        for index in range(count):
            shards.write(index + 1, dict(_layer(checkpoint, spec, stock, index)))
        shards.write(count + 1, dict(_rest(checkpoint, spec, stock)))
        copy_side_files(checkpoint.path, folder)
        biased = any(layer.kv_bias or layer.o_bias for layer in spec.layers)
        write_json_atomic(folder / "config.json", stock.exported_config(biased))
        shards.finish()


def _layer(
    checkpoint: Checkpoint, spec: ModelSpec, stock: Stock, index: int
) -> Iterator[tuple[str, torch.Tensor]]:
    family = FAMILIES[spec.family]
    prefix, layer = family.attention_prefix(index), spec.layers[index]
    own = {}
    for name in checkpoint.names:
        if name.startswith(prefix):
            own[name.removeprefix(prefix)] = checkpoint.read(name)
        elif name.startswith(family.layer(index)):
            tensor = checkpoint.read(name)
            for other, value in stock.other(name, tensor).items():
                yield other, value.to(tensor.dtype).contiguous()
    dtype = own["o_proj.weight"].dtype
    attention = stock.attention(own, layer)
    if any(s.kv_bias or s.o_bias for s in spec.layers) and "o_proj.bias" not in attention:
        rows = {name: len(attention[f"{name}.weight"]) for name in ("o_proj", "kv_a_proj_with_mqa")}
        weight = attention["o_proj.weight"]
        attention |= {f"{name}.bias": weight.new_zeros(size) for name, size in rows.items()}
    for name, value in attention.items():
        yield prefix + name, value.to(dtype).contiguous()


def _rest(
    checkpoint: Checkpoint, spec: ModelSpec, stock: Stock
) -> Iterator[tuple[str, torch.Tensor]]:
    family, embedding = FAMILIES[spec.family], "model.embed_tokens.weight"
    layers = tuple(family.layer(index) for index in range(len(spec.layers)))
    for name in checkpoint.names:
        if name.startswith(layers):
            continue
        tensor = checkpoint.read(name)
        for other, value in stock.other(name, tensor).items():
            yield other, value.to(tensor.dtype).contiguous()
    if "lm_head.weight" not in checkpoint.names:
        yield "lm_head.weight", checkpoint.read(embedding)


def _checked(
    checkpoint: Checkpoint, folder: Path, to: str, text: TextLike, windows: int, device: str
) -> Verification:
    """The comparison, if it shows the same function."""
    from mlakit.evaluation import check

    found = check(checkpoint.source, folder, text=text, windows=windows, device=device)
    for what, gap in (("in one pass", found.one_pass), ("through its cache", found.through_cache)):
        if not gap.rms <= found.tolerance:
            raise VerificationError(
                f"--to {to}: {what} transformers' DeepSeek class differs from the model by"
                f" {gap.rms:.2g} of its logits' deviation, rounding explains {found.tolerance:g}",
                remedy="nothing was written; mlakit's own classes run this folder as it is",
            )
    return found


def _finish(folder: Path, to: str, card: str) -> None:
    """The card, and what an engine wants spelled in a way of its own."""
    config_path = folder / "config.json"
    write_text_atomic(folder / "README.md", card)
    if to == "llama.cpp":  # its converter knows no missing rank of queries
        import json

        config = json.loads(config_path.read_text(encoding="utf-8"))
        write_json_atomic(config_path, config | {"q_lora_rank": 0})
