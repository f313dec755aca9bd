"""Shards and small files are whole or not there: resumed, killed, full disk."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mlakit.checkpoint import (
    ShardWriter,
    open_checkpoint,
    require_free_space,
    write_json_atomic,
    write_text_atomic,
)
from mlakit.checkpoint.writing import INDEX_NAME, LOCK_NAME
from mlakit.errors import MlakitError


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_writer_resumes_and_finishes_with_the_index(tmp_path):
    made = {f"t{i}": torch.randn(3, 5) for i in range(6)}
    parts = [dict(list(made.items())[i : i + 2]) for i in (0, 2, 4)]
    once, twice = tmp_path / "once", tmp_path / "twice"
    with ShardWriter(once, 3) as writer:
        for shard, part in enumerate(parts, 1):
            writer.write(shard, part)
        writer.finish()
    with ShardWriter(twice, 3) as writer:
        writer.write(2, parts[1])
        with pytest.raises(MlakitError, match="Another process"):
            ShardWriter(twice, 3)
        assert writer.nbytes == writer.path(2).stat().st_size
    (twice / "config.json").write_text("{}")
    with pytest.raises(MlakitError, match="did not finish"):
        open_checkpoint(twice)
    (twice / "model-00001-of-00003.safetensors.partial").write_bytes(b"half")
    with ShardWriter(twice, 3) as writer:
        assert [writer.exists(shard) for shard in (1, 2, 3)] == [False, True, False]
        writer.path(2).write_bytes(writer.path(2).read_bytes()[:-1])
        assert not writer.exists(2)
        with pytest.raises(MlakitError, match="Cannot read"):
            writer.finish()
        for shard in (3, 2, 1):
            writer.write(shard, dict(reversed(parts[shard - 1].items())))
        writer.finish()
    (twice / "config.json").unlink()
    assert listing(once) == listing(twice) and LOCK_NAME not in listing(once)
    for name in listing(once):
        assert (once / name).read_bytes() == (twice / name).read_bytes()
    (once / "config.json").write_text("{}")
    checkpoint = open_checkpoint(once)
    assert all(torch.equal(checkpoint.read(name), value) for name, value in made.items())


def test_writer_refuses_the_same_tensor_twice(tmp_path):
    with ShardWriter(tmp_path, 2) as writer:
        writer.write(1, {"a": torch.ones(1)})
        writer.write(2, {"a": torch.ones(1)})
        with pytest.raises(MlakitError, match="a is in both"):
            writer.finish()
    assert INDEX_NAME not in listing(tmp_path)


def test_writer_takes_views_and_scalars(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    made = {"turned": base.T, "row": base[1], "scalar": torch.tensor(2.5), "none": base[:0]}
    with ShardWriter(tmp_path, 1) as writer:
        writer.write(1, made)
    back = load_file(writer.path(1))
    assert all(torch.equal(back[name], value) for name, value in made.items())


def test_a_killed_writer_lets_go(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from mlakit.checkpoint import ShardWriter\n"
        f"w = ShardWriter(Path({str(tmp_path)!r}), 1); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert LOCK_NAME in listing(tmp_path)
    ShardWriter(tmp_path, 1).close()
    assert listing(tmp_path) == set()


def test_a_lock_that_was_removed_meanwhile_is_no_lock(tmp_path, monkeypatch):
    """The holder lets go between our opening of its file and our locking it."""
    first, real = ShardWriter(tmp_path, 1), fcntl.flock

    def flock(file, how):
        monkeypatch.undo()
        first.close()
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with ShardWriter(tmp_path, 1), pytest.raises(MlakitError, match="Another process is writing"):
        ShardWriter(tmp_path, 1)


def test_full_disk_is_one_error_and_leaves_nothing(tmp_path, monkeypatch):
    with ShardWriter(tmp_path, 2) as writer:
        writer.write(1, {"a": torch.ones(10)})
        before = listing(tmp_path)

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(MlakitError, match=r"disk is full: .*00002-of-00002.* 4,\d\d\d bytes"):
            writer.write(2, {"b": torch.ones(1000)})
        assert listing(tmp_path) == before
        monkeypatch.undo()
        assert writer.exists(1) and not writer.exists(2)


def test_a_real_limit_on_file_size_is_reported_the_same_way(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with ShardWriter(tmp_path, 1) as writer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            with pytest.raises(MlakitError, match="disk is full"):
                writer.write(1, {"b": torch.ones(10_000)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert listing(tmp_path) == set()


def test_text_stays_whole_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    write_json_atomic(path, {"é": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": 1}

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(MlakitError, match=r"Cannot write .*Permission denied"):
        write_text_atomic(path, "new")
    assert listing(tmp_path) == {"plan.json"} and "é" in path.read_text(encoding="utf-8")


def test_space_is_asked_for_before_writing(tmp_path):
    require_free_space(tmp_path / "not" / "there", 1)
    with pytest.raises(MlakitError, match="1,000,000,000,000,000,000 bytes needed"):
        require_free_space(tmp_path / "not" / "there", 10**18)
