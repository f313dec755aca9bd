"""The problems of a task: rows of a file, or of a dataset of the hub."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlakit.errors import MlakitError, UsageError

Row = Mapping[str, str]


class Dataset(NamedTuple):
    """Where a task's problems are on the hub."""

    name: str
    configuration: str | None
    split: str


def read_problems(
    task: str, place: str | None, hub: Dataset, keys: tuple[str, ...], limit: int | None
) -> list[Row]:
    """The first problems of a task, all of them by default.

    Args:
        task: its name, for messages.
        place: a JSONL file, packed with gzip or not; the hub's dataset where there is none.
        hub: that dataset.
        keys: what every row must hold, as text.
        limit: how many problems to take, at most.

    Raises:
        MlakitError: the file or the dataset cannot be read, or a row lacks a key; says which.
    """
    rows = _dataset_rows(task, hub) if place is None else _file_rows(Path(place).expanduser())
    found: list[Row] = []
    for where, row in rows:
        if limit is not None and len(found) == limit:
            break
        for key in keys:
            if not isinstance(row, Mapping) or not isinstance(row.get(key), str):
                raise MlakitError(
                    f"{where} is no problem of {task}: it has no text under {key!r}",
                    remedy=f"every row needs {', '.join(keys)}",
                )
        found.append({key: row[key] for key in keys})
    if not found:
        raise MlakitError(f"{place or hub.name} holds no problem of {task}")
    return found


def _file_rows(path: Path) -> Iterable[tuple[str, Any]]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise MlakitError(
            f"cannot read the problems in {path}: {getattr(error, 'strerror', None) or error}",
            remedy="give a JSONL file in UTF-8, packed with gzip if its name ends in .gz",
        ) from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            yield where, json.loads(line)
        except ValueError as error:
            raise MlakitError(
                f"{where} is not JSON: {error}", remedy="give one JSON object a line"
            ) from error


def _dataset_rows(task: str, hub: Dataset) -> Iterable[tuple[str, Any]]:
    remedy = f"give a file: --tasks {task}=FILE.jsonl"
    if importlib.util.find_spec("datasets") is None:
        raise UsageError(
            f"the problems of {task} come from the hub, and the package 'datasets' is missing",
            remedy=f"{remedy}; or pip install 'mlakit[datasets]'",
        )
    import datasets

    try:
        rows = datasets.load_dataset(hub.name, hub.configuration, split=hub.split)
    except Exception as error:  # the library raises many unrelated kinds
        raise MlakitError(f"cannot load the dataset {hub.name}: {error}", remedy=remedy) from error
    for number, row in enumerate(rows, start=1):
        yield f"{hub.name}, row {number}", row
