"""The log of a run: one JSON object a line, from which everything else is read again.

Rows have an ``arm`` (``healed`` or ``control``), a ``kind`` and a ``step``; ``step`` rows the
losses of an optimiser step, ``check`` rows what held-out windows gave, ``event`` rows what was done
about a fault, a ``stop`` row why the arm ended.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlakit.checkpoint import write_text_atomic
from mlakit.errors import MlakitError

LOG_NAME = "heal.jsonl"
Row = dict[str, Any]


class Journal:
    """The rows of all arms; every process holds them, one writes them.

    Args:
        path: the file; rows that are in it are read.
        writes: whether this process writes.
    """

    def __init__(self, path: Path, *, writes: bool) -> None:
        self.path, self.writes = path, writes
        self.rows: list[Row] = []
        if path.exists():
            *lines, torn = path.read_text(encoding="utf-8").split("\n")
            try:
                self.rows = [json.loads(line) for line in lines]
            except ValueError as error:
                raise MlakitError(
                    f"{path} is damaged: {error}",
                    remedy="delete the unfinished folder; its run begins anew",
                ) from error
            if torn and writes:  # a killed process left half a line behind
                self._write()

    def add(self, arm: str, kind: str, step: int, **facts: Any) -> Row:
        """Appends a row."""
        row = {"arm": arm, "kind": kind, "step": step, **facts}
        self.rows.append(row)
        if self.writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return row

    def of(self, arm: str, kind: str) -> list[Row]:
        """The rows of one kind, in order."""
        return [row for row in self.rows if (row["arm"], row["kind"]) == (arm, kind)]

    def rewind(self, arm: str, step: int) -> None:
        """Forgets the steps and checks of an arm after a step, from which it goes on.

        Events stay: what happened has happened.
        """
        self.rows = [
            row
            for row in self.rows
            if row["arm"] != arm or row["kind"] == "event" or row["step"] <= step
        ]
        if self.writes:
            self._write()

    def _write(self) -> None:
        write_text_atomic(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def stopped(self, arm: str) -> str | None:
        """Why an arm has ended; None while it has not."""
        found = self.of(arm, "stop")
        return found[-1]["why"] if found else None

    def best(self, arm: str) -> Row:
        """The check with the lowest objective, the first of equals."""
        best: Row = min(self.of(arm, "check"), key=lambda row: row["objective"])
        return best

    def idle(self, arm: str) -> int:
        """Checks since the best one."""
        checks = self.of(arm, "check")
        return len(checks) - 1 - checks.index(self.best(arm))

    def seconds(self, arm: str) -> float:
        """Training time so far, over all starts."""
        timed = self.of(arm, "step") + self.of(arm, "check")
        return max((row["seconds"] for row in timed), default=0.0)
