"""Texts and marks on disk while a task runs, so that a run that was cut off goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlakit.errors import MlakitError
from mlakit.evaluation.tasks.task import Grade
from mlakit.reporting.files import write_file


class Answer(NamedTuple):
    """What a model wrote for one problem, and its marks."""

    texts: list[str]
    grade: Grade


class Journal:
    """The answers of one model to one task, one JSON line each after a line of settings.

    Args:
        path: the JSONL file; None keeps the answers in memory only.
        settings: all that the answers depend on, the model's fingerprint included. A file that was
            written under other settings is replaced.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path = path
        head = json.dumps({"settings": settings}, sort_keys=True)
        lines = [] if path is None else _whole_lines(path)
        same = bool(lines) and lines[0] == head and settings.get("fingerprint") is not None
        kept = lines[1:] if same else []
        self.answers = dict(map(_read_answer, kept))
        if path is not None:
            write_file(path, "".join(f"{line}\n" for line in [head, *kept]).encode())

    def add(self, number: int, answer: Answer) -> None:
        """Keeps the answer to a problem; on disk when this returns."""
        self.answers[number] = answer
        if self.path is None:
            return
        line = {
            "problem": number,
            "marks": answer.grade.marks,
            "found": answer.grade.found,
            "texts": answer.texts,
        }
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise MlakitError(
                f"cannot write {self.path}: {error.strerror}",
                remedy="make room and run the same command again: it goes on where it stopped",
            ) from error


def _whole_lines(path: Path) -> list[str]:
    """Lines that were written to their end; none where there is no file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return []
    except OSError as error:
        raise MlakitError(f"cannot read {path}: {error.strerror}") from error
    return text.split("\n")[:-1]


def _read_answer(line: str) -> tuple[int, Answer]:
    row = json.loads(line)
    return row["problem"], Answer(row["texts"], Grade(row["marks"], row["found"]))
