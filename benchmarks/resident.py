"""Peak memory of this very process, by kind: its own pages apart from pages of mapped files."""

from __future__ import annotations

import resource
import threading
from pathlib import Path

KINDS = {"RssAnon": "own", "RssFile": "mapped"}
INTERVAL = 0.01


class Resident:
    """Samples what of this process is in memory, until the block ends; Linux only.

    Pages of mapped files (weights, libraries) are the kernel's to take back at any time; own pages
    must stay. ``ru_maxrss``, the kernel's own peak, counts both.
    """

    def __enter__(self) -> Resident:
        self.start = self._now()
        self.peak = dict(self.start)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def record(self) -> dict[str, int]:
        """Bytes: own pages at the start and at their peak, mapped ones, and the kernel's peak."""
        return {
            "own_at_start": self.start["own"],
            "own_peak": self.peak["own"],
            "mapped_peak": self.peak["mapped"],
            "ru_maxrss": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        }

    def _watch(self) -> None:
        while not self._over.wait(INTERVAL):
            for kind, value in self._now().items():
                self.peak[kind] = max(self.peak[kind], value)

    def _now(self) -> dict[str, int]:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        found = dict(line.split(":", 1) for line in lines)
        return {short: 1024 * int(found[name].split()[0]) for name, short in KINDS.items()}
