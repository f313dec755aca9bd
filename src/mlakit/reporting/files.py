"""Reports on disk: each file appears whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mlakit.checkpoint.writing import atomic_file
from mlakit.errors import MlakitError

if TYPE_CHECKING:
    from mlakit.reporting.schema import Report

REPORT_NAME = "report.json"


def write_file(path: Path, content: bytes) -> None:
    """Writes a file that appears whole or not at all, and its folder if need be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MlakitError(
            f"cannot write {path}: {error.strerror}",
            remedy="choose a folder that can be written to",
        ) from error
    with atomic_file(path, len(content)) as file:
        file.write(content)


def read_report(path: str | Path) -> Report:
    """Reads a ``report.json``, or the one of a folder."""
    # Not above: benchmarks write files on machines without pydantic.
    from pydantic import ValidationError

    from mlakit.reporting.schema import Report

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
