"""Finished points on disk, so that a run that was cut off goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from functools import cache
from pathlib import Path

from mlakit.checkpoint import FolderLock, write_json_atomic
from mlakit.checkpoint.writing import LOCK_NAME
from mlakit.errors import MlakitError, UsageError
from mlakit.reporting.comparison import Missing, Point

RUN_NAME, POINTS, MODELS, TEXTS = "run.json", "points", "models", "tasks"
ROOMS = (
    "baselines",
    "comparison",
    "conversion",
    "data",
    "evaluation",
    "generation",
    "nn",
    "ops",
)
"""What a point's numbers depend on."""


@cache
def code() -> str:
    """Names the state of the code that a point was measured with."""
    root = Path(__file__).resolve().parents[1]
    files = sorted(path for room in ROOMS for path in (root / room).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


class Journal:
    """The folder of a comparison, held until the end of the block.

    Args:
        folder: new, empty, or left by the same comparison.
        identity: of the comparison, see ``plan.identity``.

    Raises:
        UsageError: the folder holds something else.
        MlakitError: another comparison is writing to it.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder
        _check_files(folder)
        self._lock = FolderLock(folder)
        try:
            self._check_record(identity)
        except MlakitError:
            self._lock.close()
            raise
        (folder / POINTS).mkdir(exist_ok=True)
        write_json_atomic(folder / RUN_NAME, {"identity": identity})

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Lets go; after the end deletes the checkpoints that were only needed on the way."""
        if kind is None:
            shutil.rmtree(self.folder / MODELS, ignore_errors=True)
        self._lock.close()

    def _check_record(self, identity: str) -> None:
        record = self.folder / RUN_NAME
        if not record.is_file():
            return
        if json.loads(record.read_text(encoding="utf-8")).get("identity") != identity:
            raise UsageError(
                f"{self.folder} holds another comparison (model, text, lengths, seed, dtype, "
                "device or version differ)",
                remedy="choose another folder, or delete this one",
            )

    @property
    def models(self) -> Path:
        """Where methods write checkpoints; those of other code are not taken up."""
        return self.folder / MODELS / code()

    def find(self, method: str, setting: str) -> Point | Missing | None:
        """A point that this code finished, or why there is none; older code's is not taken."""
        path = self._path(method, setting)
        if not path.is_file():
            return None
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["code"] != code():
                return None
            kind = Missing if "reason" in kept["point"] else Point
            return kind.model_validate(kept["point"])
        except (ValueError, KeyError, TypeError) as error:
            raise MlakitError(
                f"{path} cannot be read: {error}", remedy="delete it; it is measured again"
            ) from error

    def keep(self, point: Point | Missing) -> None:
        """Writes a finished point, whole or not at all."""
        path = self._path(point.method, point.setting)
        write_json_atomic(path, {"code": code(), "point": point.model_dump(mode="json")})

    def _path(self, method: str, setting: str) -> Path:
        return self.folder / POINTS / f"{file_name(method, setting)}.json"


def _check_files(folder: Path) -> None:
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if found - {LOCK_NAME} and RUN_NAME not in found:
        raise UsageError(
            f"{folder} is not empty and was not made by mlakit compare",
            remedy="choose a new folder; nothing is ever overwritten",
        )


def file_name(method: str, setting: str) -> str:
    """What files of a point are called."""
    return re.sub(r"[^\w.]+", "-", f"{method} {setting}").strip("-")
