"""Files that are either whole or not there: atomic writes, shards, and the index, written last."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mlakit.checkpoint.header import TensorInfo, read_header, write_header
from mlakit.errors import MlakitError

if TYPE_CHECKING:
    from types import TracebackType

    import torch

INDEX_NAME = "model.safetensors.index.json"
LOCK_NAME = ".mlakit.lock"
PARTIAL_SUFFIX = ".partial"

SIDE_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "chat_template*", "generation_config.json", "*.tiktoken", "LICENSE*", "NOTICE*",
)  # fmt: skip
"""What belongs to a checkpoint beside its config and weights: tokenizer, template, licence."""

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_file(path: Path, nbytes: int = 0) -> Iterator[IO[bytes]]:
    """A file open for writing that takes its name only once everything is on disk.

    Args:
        path: final name; replaced if it exists.
        nbytes: expected size, for the message when the disk is full.

    Raises:
        MlakitError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _write_error(path, nbytes, error) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text_atomic(path: Path, text: str) -> None:
    """Writes UTF-8 text; the old file stays until the new one is complete."""
    data = text.encode()
    with atomic_file(path, len(data)) as file:
        file.write(data)


def write_json_atomic(path: Path, value: Any) -> None:
    """Writes indented JSON; the old file stays until the new one is complete."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def copy_side_files(source: Path, destination: Path) -> list[str]:
    """Copies tokenizer, chat template, generation config and licence, never config or weights.

    Returns:
        Names of the copied files, sorted.
    """
    found = {path.name: path for pattern in SIDE_FILES for path in source.glob(pattern)}
    names = sorted(name for name, path in found.items() if path.is_file())
    for name in names:
        size = found[name].stat().st_size
        with found[name].open("rb") as old, atomic_file(destination / name, size) as new:
            shutil.copyfileobj(old, new)
    return names


def require_free_space(folder: Path, nbytes: int) -> None:
    """Refuses early when ``nbytes`` more cannot fit below ``folder`` (which may not exist yet).

    Raises:
        MlakitError: says how much is needed and how much is free.
    """
    free = shutil.disk_usage(_nearest(folder)).free
    if free < nbytes:
        raise MlakitError(
            f"Not enough disk space for {folder}: {nbytes:,} bytes needed, {free:,} free",
            remedy="free some space or choose another output folder",
        )


def require_writable(folder: Path) -> None:
    """Refuses early when nothing can be written below ``folder`` (which may not exist yet).

    Raises:
        MlakitError: a file stands in its place, or the folder belongs to someone else.
    """
    nearest = _nearest(folder)
    if not nearest.is_dir():
        raise MlakitError(f"Cannot write {folder}: {nearest} is a file", remedy="name a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise MlakitError(
            f"Cannot write {folder}: no permission to write in {nearest}",
            remedy="choose a folder that can be written to",
        )


class FolderLock:
    """Holds an output folder for one writer, until ``close`` or the end of the process.

    Args:
        folder: made if needed.

    Raises:
        MlakitError: another process holds it, or nothing can be written there.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_NAME
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("w")
            except OSError as error:
                raise _write_error(folder, 0, error) from error
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._file.close()
                raise MlakitError(
                    f"Another process is writing to {folder}",
                    remedy="wait for it, stop it, or choose another output folder",
                ) from error
            if self._is_there():
                return
            self._file.close()  # its holder removed it between our two steps

    def close(self) -> None:
        """Lets go; a second time does nothing."""
        if not self._file.closed:
            self._path.unlink(missing_ok=True)
            self._file.close()

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False


class ShardWriter:
    """Writes a checkpoint shard by shard; the index, written last, makes the folder complete.

    A shard that is there is complete, so an interrupted run goes on at the first missing one.
    Only one writer at a time may hold a folder; use it as a context manager.

    Args:
        folder: output folder, made if needed.
        count: number of shards, numbered from 1.

    Raises:
        MlakitError: another process is writing to the folder.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.count = count
        self._lock = FolderLock(folder)
        for partial in folder.glob(f"model-*{PARTIAL_SUFFIX}"):
            partial.unlink()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the folder."""
        self._lock.close()

    def path(self, shard: int) -> Path:
        """File of shard ``shard`` (1 to ``count``)."""
        return self.folder / f"model-{shard:05d}-of-{self.count:05d}.safetensors"

    def exists(self, shard: int) -> bool:
        """Whether the shard is there and complete; a damaged one is removed."""
        if not self.path(shard).exists():
            return False
        try:
            read_header(self.path(shard))
        except MlakitError:
            self.path(shard).unlink()
            return False
        return True

    @property
    def nbytes(self) -> int:
        """Bytes of the complete shards written so far."""
        shards = (self.path(shard) for shard in range(1, self.count + 1))
        return sum(path.stat().st_size for path in shards if path.exists())

    def write(self, shard: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Writes one shard, atomically; equal tensors give equal bytes.

        Args:
            shard: 1 to ``count``.
            tensors: by name, any shape, dtypes that safetensors knows; on any device.

        Raises:
            MlakitError: the disk is full; nothing half-written stays.
        """
        write_tensors(self.path(shard), tensors)

    def begin(self) -> None:
        """Removes an index: until ``finish`` the folder is no checkpoint."""
        (self.folder / INDEX_NAME).unlink(missing_ok=True)

    def finish(self) -> None:
        """Writes the index: from here on the folder is a complete checkpoint.

        Raises:
            MlakitError: a shard is missing, or two shards hold the same tensor.
        """
        weight_map: dict[str, str] = {}
        total = 0
        for shard in range(1, self.count + 1):
            path = self.path(shard)
            for name, info in read_header(path).tensors.items():
                if name in weight_map:
                    raise MlakitError(f"{name} is in both {weight_map[name]} and {path.name}")
                weight_map[name] = path.name
                total += info.nbytes
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json_atomic(self.folder / INDEX_NAME, index)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a safetensors file, atomically, with no copy of it in memory.

    Raises:
        MlakitError: the disk is full; nothing half-written stays.
    """
    infos: dict[str, TensorInfo] = {}
    offset = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name]
        size = tensor.numel() * tensor.element_size()
        infos[name] = TensorInfo(_dtype_name(tensor), tuple(tensor.shape), offset, size)
        offset += size
    header = write_header(infos, {"format": "pt"})
    with atomic_file(path, len(header) + offset) as file:
        file.write(header)
        for name in infos:
            file.write(_bytes_of(tensors[name]))


def _dtype_name(tensor: torch.Tensor) -> str:
    import torch

    names = {
        torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
        torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64",
        torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
        torch.bool: "BOOL",
    }  # fmt: skip
    return names[tensor.dtype]


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _nearest(folder: Path) -> Path:
    """The folder, or the innermost of those around it that exists."""
    candidates = (folder.absolute(), *folder.absolute().parents)
    return next(path for path in candidates if path.exists())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_error(path: Path, nbytes: int, error: OSError) -> MlakitError:
    if error.errno in FULL_DISK:
        return MlakitError(
            f"The disk is full: {path} needs {nbytes:,} bytes",
            remedy="free some space and run the same command again",
        )
    return MlakitError(f"Cannot write {path}: {error.strerror or error}")
