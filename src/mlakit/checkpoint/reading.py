"""Opening a checkpoint by its headers; weights are read one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlakit.checkpoint.header import ShardHeader, TensorInfo, read_header
from mlakit.checkpoint.hub import Files, hub_files
from mlakit.checkpoint.writing import INDEX_NAME
from mlakit.errors import MlakitError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

SINGLE_NAME = "model.safetensors"
PLAN_NAME = "plan.json"
HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
SAMPLE_BYTES = 64


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose config and tensor headers were read and checked, but no weights.

    Attributes:
        path: local folder (of a hub model: its snapshot in the hub cache).
        source: what was asked for: the folder or the hub id.
        config: the parsed ``config.json``.
        shards: header of every weight file, by file name.
        location: tensor name to file name.
        revision: commit of a hub model; None for a folder.
        fetch: brings a weight file to ``path`` if it is not there yet, and returns it.
    """

    path: Path
    source: str
    config: dict[str, Any]
    shards: dict[str, ShardHeader]
    location: dict[str, str]
    revision: str | None
    fetch: Callable[[str], Path] = field(repr=False)

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self.location)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name."""
        return {name: self._info(name).shape for name in self.location}

    @property
    def nbytes_total(self) -> int:
        """Bytes of all tensors."""
        return sum(self.nbytes(name) for name in self.location)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self._info(name).shape

    def dtype(self, name: str) -> str:
        """Dtype of one tensor as safetensors names it, e.g. ``BF16``."""
        return self._info(name).dtype

    def nbytes(self, name: str) -> int:
        """Bytes that one tensor takes."""
        return self._info(name).nbytes

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU in its stored dtype."""
        from safetensors import safe_open

        self._info(name)
        with safe_open(self.fetch(self.location[name]), framework="pt") as file:
            return file.get_tensor(name)

    def download(self) -> Path:
        """The folder with every weight file in it; only a hub model has any to bring."""
        for shard in self.shards:
            self.fetch(shard)
        return self.path

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 that tells one source from another without reading all of it.

        It covers config.json and every tensor's name, dtype, shape and place; then, of a folder,
        the first 64 bytes of every tensor, of a hub model its commit. Another training state of
        the same model is told apart; a change deep inside one tensor of a folder is not.
        """
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        digest.update(f"{self.revision}\n".encode())
        for shard, header in sorted(self.shards.items()):
            digest.update(f"{shard} {sorted(header.tensors.items())}\n".encode())
            if self.revision is not None:
                continue
            with self.fetch(shard).open("rb") as file:
                for _, info in sorted(header.tensors.items()):
                    file.seek(header.data_start + info.offset)
                    digest.update(file.read(min(SAMPLE_BYTES, info.nbytes)))
        return digest.hexdigest()

    def _info(self, name: str) -> TensorInfo:
        if name not in self.location:
            raise MlakitError(f"{self.source} has no tensor {name}")
        return self.shards[self.location[name]].tensors[name]


def open_checkpoint(model: str | Path, *, weights: bool = True) -> Checkpoint:
    """Opens a folder or a hub model: config and headers only, all checked.

    Args:
        model: folder with config.json and safetensors files, or a hub id such as ``org/name``.
        weights: False accepts a folder that holds a config.json and no weights at all.

    Raises:
        MlakitError: nothing there, damaged or missing files; says which.
        UnsupportedModelError: the weights are pickles (``.bin``, ``.pth``).
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        files = _local(folder)
    elif not folder.exists() and HUB_ID.fullmatch(str(model)):
        files = hub_files(str(model))
    else:
        state = "is a file" if folder.exists() else "does not exist"
        raise MlakitError(
            f"{model} {state}",
            remedy="give the folder that holds config.json and *.safetensors, or a hub id",
        )
    config = _read_json(files.folder / "config.json")
    files = replace(files, header=cache(files.header))  # a single file is asked for twice
    location = _locate(files, str(model), weights)
    shards = {name: files.header(name) for name in dict.fromkeys(location.values())}
    for name, shard in location.items():
        if name not in shards[shard].tensors:
            raise MlakitError(
                f"{model}: {INDEX_NAME} places {name} in {shard}, which does not hold it",
                remedy="download or copy the index and the shards again, from the same place",
            )
    source, revision = str(model), files.revision
    return Checkpoint(files.folder, source, config, shards, location, revision, files.fetch)


def _local(folder: Path) -> Files:
    names = frozenset(path.name for path in folder.iterdir())
    if PLAN_NAME in names and not names & {INDEX_NAME, SINGLE_NAME}:
        raise MlakitError(
            f"The conversion that writes {folder} has not finished",
            remedy="run the same mlakit convert command again: it goes on where it stopped",
        )
    return Files(
        folder,
        revision=None,
        names=names,
        fetch=lambda name: folder / name,
        header=lambda name: read_header(folder / name),
    )


def _locate(files: Files, model: str, weights: bool) -> dict[str, str]:
    """Tensor name to file name; a single file goes before an index, as in transformers."""
    if SINGLE_NAME in files.names:
        return dict.fromkeys(files.header(SINGLE_NAME).tensors, SINGLE_NAME)
    if INDEX_NAME in files.names:
        return _read_index(files, model)
    pickles = sorted(name for name in files.names if name.endswith((".bin", ".pth", ".pt")))
    if pickles:
        raise UnsupportedModelError(
            f"{model} holds its weights in {pickles[0]}, a pickle, which can run code when opened",
            remedy="save it as safetensors first (save_pretrained does), or take a revision that"
            " has *.safetensors",
        )
    shards = sorted(name for name in files.names if name.endswith(".safetensors"))
    if shards:
        raise MlakitError(
            f"{model} holds {shards[0]} but no {INDEX_NAME}: a copy, download or conversion did"
            " not finish",
            remedy="run the same command again; it goes on where it stopped",
        )
    if weights:
        raise MlakitError(f"{model} holds no weights: neither {SINGLE_NAME} nor {INDEX_NAME}")
    return {}


def _read_index(files: Files, model: str) -> dict[str, str]:
    path = files.folder / INDEX_NAME
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MlakitError(f"{path} has no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise MlakitError(f"{path} places {name} in {shard!r}, which is no plain file name")
        if shard not in files.names:
            raise MlakitError(
                f"{model} lacks {shard}, which {INDEX_NAME} names for {name}",
                remedy="download or copy that file",
            )
    return weight_map


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MlakitError(
            f"{path.parent} holds no {path.name}",
            remedy="give the folder that holds config.json and *.safetensors, or a hub id",
        ) from error
    except OSError as error:
        raise MlakitError(f"Cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise MlakitError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise MlakitError(f"{path} is not a JSON object")
    return value
