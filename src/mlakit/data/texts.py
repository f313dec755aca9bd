"""Where texts come from: files, folders, datasets, the package itself. Each source has a name.

A source is written ``place`` or ``name=place``. A place is a text file, a JSONL file of
``{"text": ...}``, ``{"messages": [...]}`` or ``{"prompt": ..., "completion": ...}`` rows, a folder
of both, a dataset
``name[:configuration[:split[:column]]]``, ``builtin`` for the text that ships with the package
(``builtin:evaluation`` for its other half), or ``self`` for what the model writes itself.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from mlakit.errors import MlakitError, UsageError

Conversation = tuple[dict[str, str], ...]
"""Messages, each with a ``role`` and a ``content``."""

BUILTIN, EVALUATION, OWN = "builtin", "builtin:evaluation", "self"
SUFFIXES = (".txt", ".jsonl")
"""What a folder is searched for."""

LONGEST = 2**26
"""Characters that are read of a dataset, at most: many of them are larger than any disk."""


@dataclass(frozen=True)
class Content:
    """What a source holds: running text, conversations, and prompts with their completions.

    ``empty`` says which rows of JSONL files held nothing and were passed over, ``cut`` which
    dataset was read in part.
    """

    text: str
    conversations: tuple[Conversation, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    empty: tuple[str, ...] = ()
    cut: str = ""

    @property
    def plain(self) -> str:
        """All of it as running text, as a model without a chat template reads it."""
        talks = ("\n\n".join(turn["content"] for turn in talk) for talk in self.conversations)
        return "\n\n".join(filter(None, [self.text, *talks, *map("".join, self.pairs)]))

    @property
    def sha256(self) -> str:
        """Of the text and, where there are any, of the conversations and pairs."""
        talks = "".join(
            json.dumps(rows, sort_keys=True) for rows in (self.conversations, self.pairs) if rows
        )
        return hashlib.sha256((self.text + talks).encode()).hexdigest()


@dataclass(frozen=True)
class Source:
    """A text with a name, read when it is first needed.

    Attributes:
        name: of the domain, for tables.
        place: where it is.
    """

    name: str
    place: str

    @property
    def own(self) -> bool:
        """Whether the model itself writes it."""
        return self.place == OWN

    @property
    def label(self) -> str:
        """The place as reports print it: of a path only the last part."""
        path = Path(self.place).expanduser()
        return path.resolve().name if path.exists() else self.place

    @cached_property
    def content(self) -> Content:
        """The text.

        Raises:
            MlakitError: it cannot be read, or there is none; says where.
        """
        content = _read(self.place)
        if not content.plain.strip():
            raise MlakitError(f"The text {self.place} is empty")
        return content


SourceLike = str | Path | Source


def named_sources(given: SourceLike | Sequence[SourceLike]) -> tuple[Source, ...]:
    """One source or several, each under a name of its own.

    Raises:
        UsageError: two of them have the same name.
    """
    items = [given] if isinstance(given, str | Path | Source) else given
    sources = tuple(item if isinstance(item, Source) else _source(str(item)) for item in items)
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"two texts are called {name!r}", remedy="name them: first=PLACE second=PLACE"
            )
    return sources


def _source(given: str) -> Source:
    name, separator, place = given.partition("=")
    if separator and re.fullmatch(r"[\w .-]+", name) and not Path(given).expanduser().exists():
        if not place:
            raise UsageError(f"{given!r} names no text", remedy=f"write {name}=PLACE")
        return Source(name, place)
    path = Path(given).expanduser()
    if given in (BUILTIN, EVALUATION, OWN):
        return Source(given, given)
    if path.exists():
        return Source(path.resolve().stem if path.is_file() else path.resolve().name, given)
    return Source(given.partition(":")[0].rpartition("/")[2] or given, given)


def builtin_text(split: Literal["calibration", "evaluation"]) -> str:
    """The text that ships with the package, sampled from its demo model.

    Args:
        split: ``"calibration"`` or ``"evaluation"``; the two share no sampled passage.

    Returns:
        The text.
    """
    if split not in ("calibration", "evaluation"):
        raise MlakitError(
            f"there is no built-in text {split!r}", remedy="use 'calibration' or 'evaluation'"
        )
    file = resources.files("mlakit") / "assets" / "text" / f"{split}.txt"
    return file.read_text(encoding="utf-8")


def _read(place: str) -> Content:
    if place in (BUILTIN, EVALUATION):
        return Content(builtin_text("calibration" if place == BUILTIN else "evaluation"))
    if place == OWN:
        raise UsageError(
            "what a model writes itself is a text to convert with only",
            remedy="give a file, a folder or a dataset",
        )
    path = Path(place).expanduser()
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not files:
            raise MlakitError(f"the folder {path} holds no *.txt or *.jsonl file")
        return _joined((_read_file(file) for file in files), "\n\n")
    if importlib.util.find_spec("datasets") is None:
        raise MlakitError(
            f"{place} is neither a file nor a folder",
            remedy="check the path; to read a dataset by name: pip install 'mlakit[datasets]'",
        )
    return _read_dataset(place)


def _joined(parts: Iterable[Content], separator: str) -> Content:
    texts: list[str] = []
    talks: list[Conversation] = []
    pairs: list[tuple[str, str]] = []
    empty: list[str] = []
    cut = ""
    for part in parts:
        texts += [part.text] if part.text else []
        talks += part.conversations
        pairs += part.pairs
        empty += part.empty
        cut = cut or part.cut
    return Content(separator.join(texts), tuple(talks), tuple(pairs), tuple(empty), cut)


def _read_file(path: Path) -> Content:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MlakitError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}",
            remedy="give a plain text file in UTF-8",
        ) from error
    except OSError as error:
        raise MlakitError(f"cannot read {path}: {error.strerror}") from error
    if "\0" in text:
        raise MlakitError(
            f"{path} is not text: it holds NUL bytes", remedy="give a plain text file in UTF-8"
        )
    return _joined(_rows(path, text), "\n\n") if path.suffix == ".jsonl" else Content(text)


def _rows(path: Path, text: str) -> Iterator[Content]:
    """The rows of a JSONL file; ``\\n`` alone ends a line, as in JSON strings others may stand."""
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            yield Content("", empty=(where,))
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            why = f"{error.msg} at column {error.colno}"
            raise MlakitError(
                f"{where} is not JSON: {why}", remedy="give one JSON object a line"
            ) from error
        if isinstance(row, dict) and {"prompt", "completion"} <= row.keys():
            yield _pair(row["prompt"], row["completion"], where)
            continue
        if not isinstance(row, dict) or not {"text", "messages"} & row.keys():
            held = f"its keys are {', '.join(row)}" if isinstance(row, dict) else "it is no object"
            raise MlakitError(
                f"{where} has neither 'text' nor 'messages' nor 'prompt' and 'completion': {held}",
                remedy='give rows like {"text": "..."} or {"messages": [...]}',
            )
        yield _row(row["messages"] if "messages" in row else row["text"], where)


def _pair(prompt: Any, completion: Any, where: str) -> Content:
    if not isinstance(prompt, str) or not isinstance(completion, str) or not completion:
        raise MlakitError(
            f"{where}: 'prompt' and 'completion' must be texts, the completion not empty",
            remedy='give rows like {"prompt": "2 + 2 =", "completion": " 4"}',
        )
    return Content("", (), ((prompt, completion),))


def _row(value: Any, where: str) -> Content:
    """One text, or one conversation."""
    if isinstance(value, str):
        return Content(value, empty=() if value.strip() else (where,))
    if not isinstance(value, list) or not value or not all(map(_is_message, value)):
        raise MlakitError(
            f"{where}: neither a text nor a list of messages with a role and a content",
            remedy='give rows like {"messages": [{"role": "user", "content": "..."}, ...]}',
        )
    talk = tuple({"role": turn["role"], "content": turn["content"]} for turn in value)
    return Content("", (talk,))


def _is_message(turn: Any) -> bool:
    return isinstance(turn, Mapping) and all(
        isinstance(turn.get(key), str) for key in ("role", "content")
    )


def _read_dataset(place: str) -> Content:
    import datasets
    from huggingface_hub.constants import HF_HUB_OFFLINE

    name, configuration, split, column = [*place.split(":", 3), "", "", ""][:4]
    split = split or "train"
    try:
        rows = datasets.load_dataset(
            name, configuration or None, split=split, streaming=not HF_HUB_OFFLINE
        )
        return _joined(_dataset_rows(place, rows, column), "\n")
    except MlakitError:
        raise
    except Exception as error:  # the library raises many unrelated kinds
        raise MlakitError(
            f"{place} is no file or folder, and no dataset of this name could be loaded (tried:"
            f" dataset {name}, configuration {configuration or 'by default'}, split {split}):"
            f" {error}",
            remedy="check the spelling; a dataset needs a network or a filled cache. A JSONL file"
            " of its rows does as well",
        ) from error


def _dataset_rows(place: str, rows: Iterable[Any], column: str) -> Iterator[Content]:
    """Its rows, until there are LONGEST characters."""
    read = 0
    for number, row in enumerate(rows, start=1):
        found = [column] if column else [key for key in ("text", "messages") if key in row]
        if not found or found[0] not in row:
            raise MlakitError(
                f"the dataset {place} has no column {column or 'text'!r}, only {', '.join(row)}",
                remedy=f"name one: {place.split(':')[0]}:CONFIGURATION:SPLIT:COLUMN",
            )
        content = _row(row[found[0]], f"{place}, row {number}")
        yield content
        read += len(content.plain)
        if read > LONGEST:
            yield Content("", cut=f"{place}: its first {number:,} rows, {read:,} characters")
            return
