"""Windows to train on: texts and conversations packed end to end, with what counts marked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlakit.data.texts import Conversation, Source
from mlakit.data.windows import templated
from mlakit.errors import MlakitError, UsageError


@dataclass(frozen=True)
class Lessons:
    """Windows of equal length.

    Attributes:
        ids: tokens ``[windows, length]``, int32.
        counted: whether the loss counts a token ``[windows, length]``.
        dropped: tokens that did not fill a window.
    """

    ids: np.ndarray
    counted: np.ndarray
    dropped: int

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, rows: slice | np.ndarray) -> Lessons:
        """Some of the windows."""
        return Lessons(self.ids[rows], self.counted[rows], self.dropped)


Segment = tuple[str, bool]
"""A piece of a document, and whether it counts."""

END_OF_TURN = re.compile(r"\s*<[^<>\s]{1,40}>")
"""What templates close a reply with, such as ``<|im_end|>``: it is learnt as well."""


def read_lessons(
    source: Source, tokenizer: Any, length: int, *, completion_only: bool = False
) -> Lessons:
    """Cuts a source into windows to train on.

    Running text is cut into consecutive windows that begin with the tokenizer's bos token.
    Conversations and pairs of prompt and completion are packed: a window begins where one does, is
    filled up with the next ones, and what is left of the last is dropped.

    Args:
        source: the text.
        tokenizer: a fast Hugging Face tokenizer.
        length: tokens per window.
        completion_only: only completions and what the assistant says count.

    Raises:
        MlakitError: too little text for one window, or a template that refuses a conversation.
        UsageError: completions are asked for and the source holds none.
    """
    content = source.content
    ids: list[np.ndarray] = []
    counted: list[np.ndarray] = []
    total = 0
    if content.text and not completion_only:
        rows, total = _running(content.text, tokenizer, length)
        ids.append(rows)
        counted.append(np.ones_like(rows, dtype=bool))
    if completion_only and not content.conversations and not content.pairs:
        raise UsageError(
            f"{source.label} is running text: it has no completions",
            remedy="leave out --completion-only, or give rows with messages or a prompt and a"
            " completion",
        )
    documents = _documents(source, tokenizer)
    rows, marks, tokens = _packed(documents, tokenizer, length, completion_only)
    ids.append(rows)
    counted.append(marks)
    whole = np.concatenate(ids)
    total += tokens
    if not len(whole):
        raise MlakitError(
            f"{source.label} has {total:,} tokens, too few for one window of {length:,}",
            remedy="give more text, or a shorter --sequence-length",
        )
    return Lessons(whole, np.concatenate(counted), total - whole.size)


def _running(text: str, tokenizer: Any, length: int) -> tuple[np.ndarray, int]:
    """Windows ``[n, length]`` of running text, and its tokens."""
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = length - len(head)
    count = len(tokens) // body
    rows = np.asarray(tokens[: count * body], dtype=np.int32).reshape(count, body)
    if head:
        rows = np.concatenate([np.full((count, 1), head[0], dtype=np.int32), rows], axis=1)
    return rows, len(tokens) + count * len(head)


def _documents(source: Source, tokenizer: Any) -> Iterator[list[Segment]]:
    """Every conversation and pair, in pieces."""
    content, template = source.content, getattr(tokenizer, "chat_template", None)
    end = tokenizer.eos_token or ""
    for number, talk in enumerate(content.conversations, start=1):
        if template:
            yield _templated(talk, tokenizer, f"conversation {number} of {source.label}")
        else:
            said = [(turn["content"], turn["role"] == "assistant") for turn in talk]
            breaks = [("\n\n", False)] * (len(said) - 1)
            pieces = [piece for pair in zip(said, [*breaks, (end, True)]) for piece in pair]
            yield pieces
    for number, (prompt, completion) in enumerate(content.pairs, start=1):
        if template:
            talk = (
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": completion},
            )
            yield _templated(talk, tokenizer, f"pair {number} of {source.label}")
        else:
            yield [(prompt, False), (completion + end, True)]


def _templated(talk: Conversation, tokenizer: Any, where: str) -> list[Segment]:
    """A conversation in its template; replies count, with the mark that ends them."""
    text = templated(talk, tokenizer, where)
    pieces: list[Segment] = []
    done = 0
    for turn in talk:
        said = turn["content"].strip()
        start = text.find(said, done)
        if start < 0:  # templates leave the thoughts of earlier turns out
            continue
        end = start + len(said)
        if turn["role"] == "assistant" and (mark := END_OF_TURN.match(text, end)):
            end = mark.end()
        pieces += [(text[done:start], False), (text[start:end], turn["role"] == "assistant")]
        done = end
    return [*pieces, (text[done:], False)]


def _packed(
    documents: Iterator[list[Segment]], tokenizer: Any, length: int, completion_only: bool
) -> tuple[np.ndarray, np.ndarray, int]:
    """Windows ``[n, length]``, what counts in them, and the tokens of all documents."""
    rows: list[np.ndarray] = []
    marks: list[np.ndarray] = []
    window: list[int] = []
    counts: list[bool] = []
    total = 0
    for pieces in documents:
        tokens, counted = _encoded(pieces, tokenizer)
        total += len(tokens)
        window += tokens
        counts += counted if completion_only else [True] * len(tokens)
        if len(window) >= length:
            if any(counts[1:length]):
                rows.append(np.asarray(window[:length], dtype=np.int32))
                marks.append(np.asarray(counts[:length], dtype=bool))
            window, counts = [], []
    if not rows:
        return np.empty((0, length), np.int32), np.empty((0, length), bool), total
    return np.stack(rows), np.stack(marks), total


def _encoded(pieces: list[Segment], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Tokens of a document, and whether each counts: a token does where it ends in what counts."""
    text = "".join(piece for piece, _ in pieces)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    mark = np.zeros(len(text) + 1, dtype=bool)
    done = 0
    for piece, counts in pieces:
        mark[done : done + len(piece)] = counts
        done += len(piece)
    ends = [max(end - 1, start) for start, end in found["offset_mapping"]]
    return found["input_ids"], mark[ends].tolist()
