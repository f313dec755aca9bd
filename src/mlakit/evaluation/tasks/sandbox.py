"""Runs a program that a model wrote, in a process that can do little and does not last.

What holds it: wall-clock time (the process and all it started are killed), processor time, memory
and file size (the kernel's limits), no network where the kernel gives a process a namespace of its
own, and an audit hook (PEP 578) that refuses whatever writes, starts, signals or connects. That
stops accidents. It is no prison: a program written to break out of Python may succeed, so judge a
model that you do not trust in a container of its own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from mlakit.errors import UsageError

CHILD = Path(__file__).with_name("sandbox_child.py")
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""All that the program sees: without it NumPy claims memory for every core there is."""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        cpu_seconds: processor time.
        wall_seconds: time on the clock, start of the interpreter included; larger, so that a busy
            machine does not fail a program that is right.
        memory_bytes: address space; not enforced on macOS, whose kernel has no such limit.
        file_bytes: size of any file.
    """

    cpu_seconds: int = 5
    wall_seconds: float = 20.0
    memory_bytes: int = 2**30
    file_bytes: int = 2**20


class Outcome(NamedTuple):
    """Whether the program ran to its end, and what stopped it where it did not."""

    passed: bool
    reason: str


def require_limits() -> None:
    """Refuses a platform without resource limits.

    Raises:
        UsageError: there is no ``resource`` module, as on Windows.
    """
    if importlib.util.find_spec("resource") is None:
        raise UsageError(
            "programs cannot be run here: this platform cannot limit their time and memory",
            remedy="use Linux or macOS, or leave humaneval out",
        )


def run_program(program: str, limits: Limits | None = None) -> Outcome:
    """Runs Python source in a process of its own, in an empty folder, and waits for its end.

    It passes when its last line was reached: leaving early, by whatever means, is a failure.
    """
    limits = limits or Limits()
    token = secrets.token_hex(16)
    order = {
        "token": token,
        "program": program,
        "cpu_seconds": limits.cpu_seconds,
        "memory_bytes": limits.memory_bytes,
        "file_bytes": limits.file_bytes,
    }
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as verdict:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=verdict,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=ENVIRONMENT,
            start_new_session=True,
        )
        try:
            process.communicate(json.dumps(order).encode(), timeout=limits.wall_seconds)
        except subprocess.TimeoutExpired:
            return Outcome(False, f"still running after {limits.wall_seconds:g} s")
        finally:
            _kill_session(process)
        return _read_verdict(verdict, token, process.returncode)


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and everything it may have left behind."""
    # All may be gone; macOS says the latter of zombies.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read_verdict(file: IO[bytes], token: str, code: int) -> Outcome:
    file.seek(0)
    try:
        found = json.loads(file.read())
    except ValueError:
        found = None
    if isinstance(found, dict) and found.get("token") == token:
        return Outcome(found["error"] is None, found["error"] or "passed")
    if code == -signal.SIGXCPU:
        return Outcome(False, "used up its processor time")
    if code < 0:
        return Outcome(False, f"ended by signal {-code}")
    return Outcome(False, f"left with exit code {code}")
