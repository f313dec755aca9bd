"""How the parts of the suite speak to it: each is a process that prints JSON lines.

A part that hangs is ended at its time limit, one that breaks is over; what it said before counts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LAST_WORDS = 2000


def say(**values: Any) -> None:
    """One JSON line, at once."""
    print(json.dumps(values), flush=True)


@dataclass(frozen=True)
class Ending:
    """How a part ended.

    Attributes:
        code: its exit status, negative for a signal.
        out_of_time: it was ended at its limit.
        errors: the end of what it wrote on stderr.
    """

    code: int
    out_of_time: bool
    errors: str


def listen(
    module: str,
    arguments: list[str],
    seconds: float,
    hear: Callable[[dict[str, Any]], None],
    environment: dict[str, str] | None = None,
) -> Ending:
    """Runs ``python -m module`` and passes every line on as it comes.

    Args:
        module: the part.
        arguments: its command line.
        seconds: when it is ended.
        hear: called with each line.
        environment: of the process; this one's by default.
    """
    with tempfile.TemporaryFile("w+") as errors:
        part = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
        )  # fmt: skip
        late = threading.Event()

        def end() -> None:
            late.set()
            part.kill()

        timer = threading.Timer(seconds, end)
        timer.start()
        assert part.stdout is not None
        for line in part.stdout:
            try:
                hear(json.loads(line))
            except json.JSONDecodeError:
                print(line, end="", file=sys.stderr)  # a library's own words
        code = part.wait()
        timer.cancel()
        errors.seek(0)
        return Ending(code, late.is_set(), errors.read()[-LAST_WORDS:])
