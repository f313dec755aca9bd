"""A healed checkpoint: the student's folder with its trained tensors replaced."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlakit import __version__
from mlakit.checkpoint import (
    Checkpoint,
    ShardWriter,
    copy_side_files,
    write_json_atomic,
    write_text_atomic,
)
from mlakit.checkpoint.reading import PLAN_NAME
from mlakit.conversion.card import NOT_HEALED
from mlakit.errors import MlakitError, UnsupportedModelError
from mlakit.healing.latent_norm import needed_exponent
from mlakit.healing.lora import MARK, merge_low_rank

NORM = "kv_a_layernorm.weight"
HIGHEST_IN_HALF = 15
"""float16 holds no power of two above 2^15."""


def require_stored(student: Checkpoint, trained: Iterable[str]) -> None:
    """Refuses to train what could not be written back.

    Args:
        student: the folder.
        trained: names of trained parameters in the model.

    Raises:
        UnsupportedModelError: a parameter is stored in another form, as fused experts are.
    """
    names = {name.partition(MARK)[0] + ".weight" if MARK in name else name for name in trained}
    for name in sorted(names - set(student.names)):
        raise UnsupportedModelError(
            f"{name} is stored in another form in {student.source} and cannot be written back",
            remedy="use --train attention",
        )


def trained_tensors(student: Checkpoint, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New values of stored tensors, float32, by their names on disk.

    Args:
        student: the folder.
        trained: trained parameters by name in the model; of LoRA the low-rank factors.

    """
    changes = merge_low_rank(trained)
    if changes:
        return {name: student.read(name).float() + change for name, change in changes.items()}
    found = dict(trained)
    embedding, output = "model.embed_tokens.weight", "lm_head.weight"
    tied = student.config.get("tie_word_embeddings") and output in student.names
    if tied and embedding in found:
        found[output] = found[embedding]  # some checkpoints hold both
    return found


def write_healed(
    student: Checkpoint, shards: ShardWriter, new: dict[str, Tensor], facts: dict[str, Any]
) -> int | None:
    """Writes every shard, the config and the index; what did not train keeps its bytes.

    Args:
        student: the folder that was healed.
        shards: of the result, as many as the student has.
        new: trained tensors.
        facts: for ``config.json``: what was done.

    Returns:
        The exponent of the latent norm where it had to be raised.

    Raises:
        MlakitError: a trained tensor does not fit the stored dtype.
    """
    raised = _raised_exponent(student, new)
    for index, (shard, header) in enumerate(student.shards.items(), start=1):
        tensors = {}
        for name in header.tensors:
            if student.location[name] != shard:
                continue
            old = student.read(name)
            value = new.get(name)
            if raised is not None and name.endswith(NORM):
                value = torch.full_like(old, 2.0**raised)
            tensors[name] = old if value is None else value.to(old.dtype)
            if value is not None and not bool(tensors[name].isfinite().all()):
                raise MlakitError(
                    f"{name} has numbers that {old.dtype} cannot hold after training",
                    remedy="use a lower --learning-rate",
                )
        shards.write(index, tensors)
    copy_side_files(student.path, shards.folder)
    if (student.path / PLAN_NAME).exists():
        shutil.copyfile(student.path / PLAN_NAME, shards.folder / PLAN_NAME)
    config = dict(student.config)
    if raised is not None:
        config["latent_norm_eps"] = 4.0**raised
    if "mlakit" in config:
        config["mlakit"] = {**(config["mlakit"] or {}), "healed": facts}
    write_json_atomic(shards.folder / "config.json", config)
    shards.finish()
    return raised


def _raised_exponent(student: Checkpoint, new: Mapping[str, Tensor]) -> int | None:
    """The latent norm's exponent where the trained latents have outgrown the stored one."""
    needed = needed_exponent(student, new)
    if needed is None:
        return None
    norms = [name for name in student.names if name.endswith(NORM)]
    if student.dtype(norms[0]) == "F16":
        needed = min(needed, HIGHEST_IN_HALF)
    return needed if 4.0**needed > float(student.config["latent_norm_eps"]) else None


def write_card(student: Checkpoint, folder: Path, lines: list[str], *, healed: bool) -> None:
    """The student's model card with a section about healing, in place of an older one.

    The label of a model that was not healed goes where ``healed``.
    """
    path = student.path / "README.md"
    card = path.read_text(encoding="utf-8") if path.exists() else f"# {student.path.name}\n"
    card = card.partition("\n## Healed\n")[0].rstrip()
    if healed:
        kept = (line for line in card.split("\n") if not line.startswith(NOT_HEALED))
        card = "\n".join(kept).rstrip()
    section = "\n".join(["", "", "## Healed", "", f"By mlakit {__version__}.", "", *lines])
    write_text_atomic(folder / "README.md", f"{card}{section}\n")
