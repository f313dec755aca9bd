"""The header of a safetensors file: which tensors it holds, where, and whether all bytes are there.

Format: 8 bytes little-endian length n, n bytes of JSON, then the tensors' bytes.
Source: https://huggingface.co/docs/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mlakit.errors import MlakitError

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library: a longer header is damage or an attack."""

BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F4": 4, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8,
    "BOOL": 8, "C64": 64,
}  # fmt: skip
"""Bits per element of each safetensors dtype."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a header describes it.

    Attributes:
        dtype: safetensors' name, e.g. ``BF16``.
        offset: first byte, counted from the end of the header.
        nbytes: bytes it takes in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ShardHeader:
    """One safetensors file without its weights.

    Attributes:
        data_start: byte where the tensors begin.
        size: bytes of the whole file.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    size: int


def read_header(path: Path) -> ShardHeader:
    """Reads and checks the header of a local file; errors as ``parse_header``."""
    try:
        with path.open("rb") as file:
            return parse_header(file, path.stat().st_size, str(path))
    except OSError as error:
        raise MlakitError(f"Cannot read {path}: {error.strerror}") from error


def parse_header(file: IO[bytes], size: int, name: str) -> ShardHeader:
    """Reads and checks a header.

    Args:
        file: open at its beginning.
        size: bytes of the whole file.
        name: what to call the file in an error.

    Raises:
        MlakitError: the file is shorter or longer than its header promises, or is no safetensors
            file at all.
    """
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise _damaged(name, f"it has {size} bytes, fewer than its header alone needs")
    try:
        entries = json.loads(file.read(length))
        metadata = entries.pop("__metadata__", None) or {}
        tensors = {key: _tensor(entry) for key, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(name, f"its header is not valid safetensors JSON ({error})") from error
    end = 8 + length + max((info.offset + info.nbytes for info in tensors.values()), default=0)
    if size != end:
        raise _damaged(name, f"it has {size} bytes, but its header promises {end}")
    return ShardHeader(tensors, metadata, 8 + length, size)


def write_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The bytes that come before the tensors, padded so that they start on a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, info in tensors.items():
        entries[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [info.offset, info.offset + info.nbytes],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _tensor(entry: Mapping[str, Any]) -> TensorInfo:
    begin, end = (int(offset) for offset in entry["data_offsets"])
    dtype, shape = entry["dtype"], tuple(int(length) for length in entry["shape"])
    if dtype in BITS and math.prod(shape) * BITS[dtype] != 8 * (end - begin):
        raise ValueError(f"{dtype} {list(shape)} does not take {end - begin} bytes")
    if begin < 0 or end < begin or min(shape, default=0) < 0:
        raise ValueError(f"offsets {begin}..{end} of shape {list(shape)} make no sense")
    return TensorInfo(dtype, shape, begin, end - begin)


def _damaged(name: str, reason: str) -> MlakitError:
    return MlakitError(
        f"{name} is damaged or cut short: {reason}",
        remedy="download or copy this file again",
    )
