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

from mlakit.conversion.apply import convert
from tiny_models import TEXT, save_tiny

TEXTUAL: dict[str, Any] = {"cache_ratio": 0.5, "calibration_tokens": 512}
RUNS: dict[str, dict[str, Any]] = {
    "closed form": {**TEXTUAL, "refine_steps": 0},
    "refined": {**TEXTUAL, "refine_steps": 2},
    "one theta": {**TEXTUAL, "refine_steps": 0, "without": ["frequencies"]},
    "published, freqfold auto, refined": {**TEXTUAL, "method": "transmla", "refine_steps": 2},
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
from mlakit.conversion.apply import convert
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
