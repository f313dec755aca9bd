"""Reports on disk: each file appears whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pydantic import ValidationError

from mlakit.errors import MlakitError
from mlakit.reporting.schema import Report

REPORT_NAME = "report.json"


def write_atomically(path: Path, content: bytes) -> None:
    """Writes beside the target and renames, so that no reader ever sees half a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise MlakitError(
            f"cannot write {path}: {error.strerror}",
            remedy="choose a folder that can be written to and has room",
        ) from error


def read_report(path: str | Path) -> Report:
    """Reads a ``report.json``, or the one of a folder."""
    file = Path(path) / REPORT_NAME if Path(path).is_dir() else Path(path)
    try:
        return Report.model_validate_json(file.read_bytes())
    except OSError as error:
        raise MlakitError(f"cannot read {file}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise MlakitError(
            f"{file} is not a report of this version of mlakit: {where}: {first['msg']}",
            remedy="write it again with mlakit eval",
        ) from error
