"""Killed with SIGKILL in the middle of any phase, a conversion goes on to the same bytes."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mlakit.checkpoint import ShardWriter
from mlakit.conversion.apply import convert
from mlakit.conversion.plan import WORK_NAME
from mlakit.errors import MlakitError, UsageError
from mlakit.nn.hf import load
from tiny_models import TEXT, save_tiny

TEXTUAL: dict[str, Any] = {"cache_ratio": 0.5, "calibration_tokens": 512}
RUNS: dict[str, dict[str, Any]] = {
    "closed form": {**TEXTUAL, "refine_steps": 0},
    "refined": {**TEXTUAL, "refine_steps": 2},
    "one theta": {**TEXTUAL, "refine_steps": 0, "without": ["frequencies"]},
    "published, freqfold auto, refined": {**TEXTUAL, "method": "transmla", "refine_steps": 2},
    "a loss as the goal": {"max_kl": 0.08, "calibration_tokens": 1024, "refine_steps": 0},
}
PROGRAM = """
import os, signal, sys
real, left = os.fsync, int(sys.argv[1])
def fsync(descriptor):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(descriptor)
os.fsync = fsync
from mlakit.checkpoint import ShardWriter
from mlakit.conversion.apply import convert
from mlakit.conversion.plan import WORK_NAME
from mlakit.errors import MlakitError, UsageError
from mlakit.nn.hf import load
convert(sys.argv[2], sys.argv[3], calibration=sys.argv[4], **{options!r})
"""
"""Dies with everything written and not yet on disk, at one of the files it writes."""


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_killed_at_a_random_file_it_resumes_to_the_same_bytes(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, text = save_tiny(tmp_path / "source"), tmp_path / "text.txt"
    text.write_text(TEXT)
    files, real = 0, os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal files
        files += 1
        real(descriptor)

    with monkeypatch.context() as counting:
        counting.setattr(os, "fsync", fsync)
        convert(source, tmp_path / "whole", calibration=text, **options)
    whole = digests(tmp_path / "whole")
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    draw = random.Random(len(whole) + files)
    for last in sorted(draw.sample(range(1, files), 2)):
        out = tmp_path / f"killed{last}"
        program = PROGRAM.replace("{options!r}", repr(options))
        arguments = [sys.executable, "-c", program, str(last), str(source), str(out), str(text)]
        done = subprocess.run(arguments, env=environment, timeout=300)
        assert done.returncode == -signal.SIGKILL
        convert(source, out, calibration=text, **options)
        assert digests(out) == whole, f"killed at file {last} of {files}"


def test_a_search_cut_off_at_any_shard_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard of an earlier round, of another rank, is never taken for this round's."""
    source, text = save_tiny(tmp_path / "source"), tmp_path / "text.txt"
    text.write_text(TEXT)
    options = {"calibration": text, **RUNS["a loss as the goal"], "calibration_window": 32}
    real, left = ShardWriter.write, [10**6]

    def write(self: ShardWriter, shard: int, tensors: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        real(self, shard, tensors)

    monkeypatch.setattr(ShardWriter, "write", write)
    plan = convert(source, tmp_path / "whole", **options)
    written = 10**6 - left[0]
    assert len(plan.measured["search"]) > 1 and written > 4
    whole = digests(tmp_path / "whole")
    for last in range(3, written + 1):  # 1 and 2 are the first round's
        out = tmp_path / str(last)
        left[0] = last
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, **options)
        with pytest.raises(MlakitError, match="has not finished"):
            load(out)
        convert(source, out, **options)
        assert digests(out) == whole, f"cut off at shard {last} of {written}"


def test_what_another_run_finished_meanwhile_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, taken = save_tiny(tmp_path / "source"), {}
    late = [True]

    class Late(ShardWriter):
        """Before this one holds the folder, another has come and gone."""

        def __init__(self, folder: Path, count: int) -> None:
            if late[0]:
                late[0] = False
                convert(source, folder, equal_cache=True)
                taken[folder.name] = digests(folder)
            super().__init__(folder, count)

    monkeypatch.setattr("mlakit.conversion.apply.ShardWriter", Late)
    convert(source, tmp_path / "same", equal_cache=True)
    assert digests(tmp_path / "same") == taken["same"]
    late[0] = True
    with pytest.raises(UsageError, match="another plan"):
        convert(source, tmp_path / "other", equal_cache=True, form="article")
    assert digests(tmp_path / "other") == taken["other"]


def test_work_that_was_left_behind_is_removed(tmp_path: Path) -> None:
    source, out = save_tiny(tmp_path / "source"), tmp_path / "out"
    convert(source, out, equal_cache=True)
    whole = digests(out)
    (out / WORK_NAME).mkdir()
    (out / WORK_NAME / "inputs.f32").write_bytes(b"many")
    convert(source, out, equal_cache=True, dry_run=True)
    assert (out / WORK_NAME).is_dir()  # a dry run changes nothing
    convert(source, out, equal_cache=True)
    assert digests(out) == whole
