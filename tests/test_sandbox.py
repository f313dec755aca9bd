"""Programs that a model wrote cannot run on, spread, or leave anything behind."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from mlakit.errors import UsageError
from mlakit.evaluation.tasks import sandbox
from mlakit.evaluation.tasks.sandbox import Limits, require_limits, run_program

QUICK = Limits(cpu_seconds=1, wall_seconds=30)

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith(("linux", "darwin")), reason="needs POSIX limits"
)


@pytest.mark.parametrize(
    "program",
    [
        "x = 1 + 1",
        "import typing, math, hashlib, collections, random, datetime, string, re",
        "import numpy as np\nassert np.linalg.norm(np.ones(4)) == 2",
        "print('words on standard output are not a verdict')",
        "x = '\\u00e9\\u2028'  # é",
    ],
)
def test_honest_programs_pass(program: str) -> None:
    # Generous: NumPy takes a second to import on a machine that is busy.
    assert run_program(program) == (True, "passed")


@pytest.mark.parametrize(
    "program,reason",
    [
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("def f(): return f()\nf()", "RecursionError"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("import os; os._exit(0)", "exit code 0"),
        ("import os; os.abort()", "signal 6"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("x = '\ud800'", "UnicodeEncodeError"),
        ("x = '\0'", "SyntaxError|ValueError"),
    ],
)
def test_programs_that_stop_early_fail(program: str, reason: str) -> None:
    passed, why = run_program(program)
    assert not passed
    assert any(part in why for part in reason.split("|"))


def test_an_endless_loop_uses_up_its_processor_time() -> None:
    start = time.monotonic()
    assert run_program("while True: pass", QUICK) == (False, "used up its processor time")
    assert time.monotonic() - start < 30


def test_an_endless_sleep_meets_the_clock() -> None:
    limits = Limits(wall_seconds=1.0)
    passed, why = run_program("import time; time.sleep(1000)", limits)
    assert not passed and why == "still running after 1 s"


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not limit memory")
def test_memory_is_limited() -> None:
    assert run_program("x = bytearray(3 * 2**30)").reason == "MemoryError"
    grow = "parts = []\nwhile True: parts.append(bytearray(2**26))"
    assert run_program(grow).reason == "MemoryError"


def test_huge_output_goes_nowhere() -> None:
    write = "for _ in range(2000): print('x' * 10**5)"
    assert run_program(write).passed
    # Into the verdict itself: its file ends at the limit, and then it is no verdict.
    flood = (
        "import os\nfor fd in range(3, 20):\n  try:\n    while True: os.write(fd, b'x' * 10**6)\n"
    )
    assert not run_program(flood + "  except OSError: pass", QUICK).passed


@pytest.mark.parametrize(
    "program",
    [
        "import os; os.fork()",
        "import os; os.system('true')",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import os; os.execv('/bin/true', ['true'])",
        "import subprocess; subprocess.run(['true'])",
        "import _posixsubprocess",
        "import multiprocessing as m; m.get_context('spawn').Process(target=print).start()",
        "import os, signal; os.kill(os.getppid(), signal.SIGTERM)",
        "import socket; socket.socket().connect(('127.0.0.1', 9))",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')",
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
        "import ctypes; ctypes.CDLL(None)",
        "import sqlite3; sqlite3.connect('here.db')",
    ],
)
def test_it_starts_signals_and_connects_nothing(program: str) -> None:
    passed, why = run_program(program)
    assert not passed and why in (
        "PermissionError",
        "ImportError",
        "ModuleNotFoundError",
        "URLError",
    )


@pytest.mark.parametrize(
    "act",
    [
        "open(path, 'w')",
        "open(path, 'a').write('x')",
        "open(path, 'r+').write('x')",
        "import os; os.open(path, os.O_RDWR | os.O_TRUNC)",
        "import os; os.remove(path)",
        "import os; os.truncate(path, 0)",
        "import os; os.rename(path, path + '.moved')",
        "import os; os.chmod(path, 0)",
        "import shutil; shutil.rmtree(os.path.dirname(path))",
        "import pathlib; pathlib.Path(path).write_text('x')",
        "import os; os.mkdir(path + '.folder')",
        "import os; os.symlink(path, path + '.link')",
    ],
)
def test_files_outside_stay_as_they_are(act: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("whole")
    assert not run_program(f"import os\npath = {str(victim)!r}\n{act}").passed
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]
    assert victim.read_text() == "whole"


def test_reading_is_allowed_and_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hidden")
    names = "{'OPENBLAS_NUM_THREADS', 'OMP_NUM_THREADS', 'LC_CTYPE'}"
    assert run_program(f"import os\nassert set(os.environ) <= {names}").passed
    assert run_program("import os\nassert os.listdir('.') == []\nopen(os.__file__).read()").passed


def test_nothing_is_left_running(tmp_path: Path) -> None:
    """Even where the hook did not exist: what shares the session is killed with it."""
    child = tmp_path / "child.py"
    mark = tmp_path / "pid"
    child.write_text(
        "import os, sys, time\n"
        "if os.fork() == 0:\n"
        f"    open({str(mark)!r}, 'w').write(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "time.sleep(60)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "CHILD", child)
        assert not run_program("", Limits(wall_seconds=3.0)).passed
    pid = int(mark.read_text())
    deadline = time.monotonic() + 10
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    """A zombie that no one waits for counts as gone."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def test_a_platform_without_limits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    require_limits()
    monkeypatch.setattr(sandbox.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="cannot limit"):
        require_limits()
