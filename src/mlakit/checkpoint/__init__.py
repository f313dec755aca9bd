"""Checkpoints on disk: opened by their headers, written shard by shard, index last."""

from mlakit.checkpoint.header import ShardHeader, TensorInfo, read_header
from mlakit.checkpoint.reading import Checkpoint, open_checkpoint
from mlakit.checkpoint.writing import (
    FolderLock,
    ShardWriter,
    atomic_file,
    copy_side_files,
    require_free_space,
    require_writable,
    write_json_atomic,
    write_text_atomic,
)

__all__ = [
    "Checkpoint",
    "FolderLock",
    "ShardHeader",
    "ShardWriter",
    "TensorInfo",
    "atomic_file",
    "copy_side_files",
    "open_checkpoint",
    "read_header",
    "require_free_space",
    "require_writable",
    "write_json_atomic",
    "write_text_atomic",
]
