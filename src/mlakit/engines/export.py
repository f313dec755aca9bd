"""The verb ``export``: a converted checkpoint as one that other engines load, checked before it is.

What is written is DeepSeek-V3's layout (``stock``), or mlakit's with a file of modelling code
(``own_code``). It is loaded with transformers' class, or that file's, and compared with the model
it came from; only then does the folder appear.
"""

from __future__ import annotations

import json
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
from mlakit.engines.own_code import OwnCode
from mlakit.engines.shapes import Shape, own_shape, sizes_in_words, smallest_shape
from mlakit.engines.stock import Stock
from mlakit.engines.targets import TARGETS, Target
from mlakit.errors import UnsupportedModelError, UsageError, VerificationError
from mlakit.families import FAMILIES, read_model
from mlakit.spec import ModelSpec

if TYPE_CHECKING:
    import torch

    from mlakit.evaluation import ModelLike
    from mlakit.evaluation.quality import TextLike
    from mlakit.reporting.verified import Verification

OWN_CODE = ("transformers-code", "vllm-transformers")
"""The targets whose folders carry their own code."""

EXPORTS = tuple(name for name in TARGETS if name not in ("mlakit", "vllm-plugin"))
"""What can be exported to; mlakit's own classes load a converted folder as it is."""

LOADS = {
    "transformers": 'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
    "vllm": "vllm serve FOLDER",
    "transformers-code": "model = AutoModelForCausalLM.from_pretrained("
    '"FOLDER", trust_remote_code=True)',
    "vllm-transformers": "vllm serve FOLDER --trust-remote-code",
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
        check: the result in transformers against the model it came from.
    """

    to: str
    shape: Shape
    width: float
    check: Verification


def export(
    model: str | Path,
    output: str | Path,
    *,
    to: str = "transformers",
    pad: bool = False,
    width: int | None = None,
    text: TextLike = None,
    windows: int = 2,
    device: str = "cpu",
    report: str | Path | None = None,
) -> Exported:
    """Writes a converted checkpoint in the layout that an engine's own class loads.

    Args:
        model: folder or hub id of a converted checkpoint.
        output: a new folder.
        to: the engine, one of ``EXPORTS``.
        pad: fill rank and rotary width up with zeros to sizes that the engine takes: exact, but
            the zeros are cached too.
        width: fill them up to this sum of both; vLLM's CPU kernel takes 576 only.
        text: what both are compared on; the package's own by default.
        windows: of each text.
        device: where they are compared.
        report: what ``evaluate`` measured of the model against its source, for the model card:
            ``report.json`` or its folder.

    Raises:
        UsageError: the engine, the model or the folder is of no use here.
        UnsupportedModelError: the engine cannot express the model; says what can.
        VerificationError: the result computes something else; nothing was written.
    """
    if to not in EXPORTS:
        raise UsageError(
            f"--to {to}: it is none of {', '.join(EXPORTS)}",
            remedy="mlakit's own classes load a converted folder as it is",
        )
    checkpoint = open_checkpoint(model)
    spec = read_model(checkpoint.config)
    shape = require_exportable(checkpoint, spec, to, pad, width)
    quality = None if report is None else read_report(report, checkpoint)
    folder = Path(output).expanduser()
    _require_new(folder, checkpoint)
    partial = folder.with_name(folder.name + PARTIAL_SUFFIX)
    if partial.exists():
        shutil.rmtree(partial)
    try:
        writer = _writer(checkpoint.config, spec, to, shape)
        _write(checkpoint, spec, writer, partial)
        found = _checked(checkpoint, partial, to, text, windows, device)
        card = export_card(checkpoint, to, [LOADS[to]], found, quality)
        _finish(partial, to, card)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        folder.rmdir()  # it was empty
    partial.replace(folder)
    mean = sum(layer.cache_width for layer in spec.layers) / len(spec.layers)
    return Exported(to, shape, mean, found)


def _writer(config: dict[str, Any], spec: ModelSpec, to: str, shape: Shape) -> Stock | OwnCode:
    if to in OWN_CODE:
        return OwnCode(config, shape)
    return Stock(config, shape, any(layer.kv_bias or layer.o_bias for layer in spec.layers))


def require_exportable(
    checkpoint: Checkpoint, spec: ModelSpec, to: str, pad: bool = False, width: int | None = None
) -> Shape:
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
    target, own = TARGETS[to], own_shape(spec)
    reasons = _obstacles(checkpoint.config, spec, target)
    yarn = any(layer.rope and layer.rope.rope_type == "yarn" for layer in spec.layers)

    def holds(wide: int) -> bool:  # frequencies of a schedule are every so-many-th of a wider one's
        return target.frequencies or not (yarn or wide % own.rope)

    widths = target.widths
    if width is not None:
        pad, widths = True, tuple(each for each in widths or (width,) if each == width)
    shape = smallest_shape(own, widths, target.heads, pad=pad, holds=holds)
    if shape is None:
        reasons.append(sizes_in_words(own, target.widths, target.heads))
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
        "layers turn with frequencies of their own": not target.frequencies
        and bool(config.get("rope_inv_freq")),
        "it has no sliding windows": any(layer.sliding_window for layer in layers),
        "it does not soft-cap scores": any(layer.logit_softcap for layer in layers),
        "latents are made of normed keys or of another latent": any(
            layer.indirect for layer in layers
        ),
        "its queries have no bias": not target.q_bias and any(layer.q_bias for layer in layers),
        "what it caches has no bias": not target.latent_bias and any(s.kv_bias for s in layers),
        "its output projection has no bias": not target.o_bias and any(s.o_bias for s in layers),
        f"it has no rope_type {', '.join(sorted(types))}": target.rope_types is not None
        and not types <= set(target.rope_types),
        "YaRN's factors are spelled in another way": not target.frequencies
        and any(r.attention_factor != 1.0 for r in ropes),
        f"it has no cache in {config.get('cache_format')}, which the model was converted for": bool(
            config.get("cache_format")
        ),
        f"its latent norm is no identity in {config.get('dtype')}": config.get("dtype")
        not in target.dtypes,
    }
    return [reason for reason, there in found.items() if there]


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


def _write(checkpoint: Checkpoint, spec: ModelSpec, writer: Stock | OwnCode, folder: Path) -> None:
    """Shards, config, code, tokenizer; one layer at a time."""
    count = len(spec.layers)
    with ShardWriter(folder, count + 1) as shards:
        for index in range(count):
            shards.write(index + 1, dict(_layer(checkpoint, spec, writer, index)))
        shards.write(count + 1, dict(_rest(checkpoint, spec, writer)))
        copy_side_files(checkpoint.path, folder)
        write_json_atomic(folder / "config.json", writer.exported_config())
        for name, text in writer.files().items():
            write_text_atomic(folder / name, text)
        shards.finish()


def _layer(
    checkpoint: Checkpoint, spec: ModelSpec, writer: Stock | OwnCode, index: int
) -> Iterator[tuple[str, torch.Tensor]]:
    family = FAMILIES[spec.family]
    prefix, layer = family.attention_prefix(index), spec.layers[index]
    own = {}
    for name in checkpoint.names:
        if name.startswith(prefix):
            own[name.removeprefix(prefix)] = checkpoint.read(name)
        elif name.startswith(family.layer(index)):
            tensor = checkpoint.read(name)
            for other, value in writer.other(name, tensor).items():
                yield other, value.to(tensor.dtype).contiguous()
    dtype = own["o_proj.weight"].dtype
    for name, value in writer.attention(own, layer).items():
        yield prefix + name, value.to(dtype).contiguous()


def _rest(
    checkpoint: Checkpoint, spec: ModelSpec, writer: Stock | OwnCode
) -> Iterator[tuple[str, torch.Tensor]]:
    family, embedding = FAMILIES[spec.family], "model.embed_tokens.weight"
    layers = tuple(family.layer(index) for index in range(len(spec.layers)))
    for name in checkpoint.names:
        if name.startswith(layers):
            continue
        tensor = checkpoint.read(name)
        for other, value in writer.other(name, tensor).items():
            yield other, value.to(tensor.dtype).contiguous()
    if writer.unties and "lm_head.weight" not in checkpoint.names:
        yield "lm_head.weight", checkpoint.read(embedding)


def _checked(
    checkpoint: Checkpoint, folder: Path, to: str, text: TextLike, windows: int, device: str
) -> Verification:
    """The comparison, if it shows the same function."""
    from mlakit.evaluation import check

    result = _with_own_code(folder, device) if to in OWN_CODE else folder
    found = check(checkpoint.source, result, text=text, windows=windows, device=device)
    for what, gap in (("in one pass", found.one_pass), ("through its cache", found.through_cache)):
        if not gap.rms <= found.tolerance:
            raise VerificationError(
                f"--to {to}: {what} the result differs in transformers from the model by"
                f" {gap.rms:.2g} of its logits' deviation, rounding explains {found.tolerance:g}",
                remedy="nothing was written; mlakit's own classes run this folder as it is",
            )
    return found


def _with_own_code(folder: Path, device: str) -> ModelLike:
    """The folder in the class of its own file; the Auto classes would take mlakit's."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    from mlakit.evaluation.subject import open_tokenizer
    from mlakit.nn.hf import bars_on_terminals, register

    register()  # for the tokenizer, which looks at the config
    names = json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"]
    causal: Any = get_class_from_dynamic_module(names["AutoModelForCausalLM"], folder)
    with bars_on_terminals():
        model = causal.from_pretrained(folder, dtype="auto").to(device).eval()
    return folder.name, model, open_tokenizer(folder)


def _finish(folder: Path, to: str, card: str) -> None:
    """The card, and what an engine wants spelled in a way of its own."""
    config_path = folder / "config.json"
    write_text_atomic(folder / "README.md", card)
    if to == "llama.cpp":  # its converter knows no missing rank of queries
        config = json.loads(config_path.read_text(encoding="utf-8"))
        write_json_atomic(config_path, config | {"q_lora_rank": 0})
