"""Token ids to text while they arrive: whole characters only, and never part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNDECIDED = 16
"""Tokens that may wait for a character to be whole. Its bytes are four at most: what has not become
text by then never will, and looking at it again with every token would take longer each time."""

PROMPT_TAIL = 8
"""Tokens of the prompt that are decoded along, so that the first piece keeps its space."""


class TextStream:
    """The text of one prompt's continuation, piece by piece.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompt_ids: the tokens before the continuation.
        stop: strings that end the text; it is cut before the first of them.

    Attributes:
        text: what has been released so far.
        stopped: a stop string was found.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.ids = list(prompt_ids[-PROMPT_TAIL:])
        while self.ids and self._decode(self.ids).startswith("\ufffd"):  # amid a character: some
            del self.ids[0]  # decoders spoil all bytes of a run that does not begin at one
        self.start, self.read = 0, len(self.ids)
        self.held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Adds a token and returns the text that is certain now, often none."""
        self.ids.append(token)
        fresh = self._fresh()
        waits = not fresh or fresh.endswith("\ufffd")  # a character whose bytes are still coming
        if waits and len(self.ids) - self.read <= UNDECIDED:
            return ""
        self.start, self.read = self.read, len(self.ids)
        return self._release(fresh)

    def finish(self) -> str:
        """Returns what was held back; the last bytes may be an incomplete character."""
        return "" if self.stopped else self._release(self._fresh(), last=True)

    def _fresh(self) -> str:
        """Text of the tokens not read yet, decoded after their neighbours (spaces depend on it)."""
        known, whole = self._decode(self.ids[self.start : self.read]), self.ids[self.start :]
        return self._decode(whole)[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _release(self, fresh: str, *, last: bool = False) -> str:
        text = self.held + fresh
        found = [text.find(stop) for stop in self.stop if stop in text]
        if found:
            self.stopped, cut = True, min(found)
        else:
            cut = len(text) if last else len(text) - self._unsure(text)
        self.held = text[cut:]
        self.text += text[:cut]
        return text[:cut]

    def _unsure(self, text: str) -> int:
        """Length of the longest end of the text that could begin a stop string."""
        longest = max((len(stop) - 1 for stop in self.stop), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.stop):
                return length
        return 0
