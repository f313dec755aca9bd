"""How single tokens are written, for log-probabilities: bytes first, since one token may hold a
part of a character only."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from mlakit.serving.http.answers import (
    ChatLogprobs,
    CompletionLogprobs,
    TokenLogprob,
    TopLogprob,
)
from mlakit.serving.request import TokenLogprob as Scored

LEAST = -9999.0
"""OpenAI's number for what JSON cannot say: minus infinity."""

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Speller:
    """Spells the tokens of one tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special = frozenset(tokenizer.all_special_ids)

    @cached_property
    def _byte_of(self) -> dict[str, int] | None:
        """Bytes by their letters in a byte-level vocabulary (GPT-2's); None in any other."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        decoder = json.loads(backend.to_str()).get("decoder") if backend is not None else None
        if "ByteLevel" not in json.dumps(decoder):
            return None
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        letters = {chr(byte): byte for byte in printable}
        return letters | {chr(256 + place): byte for place, byte in enumerate(others)}

    def spell(self, token: int) -> bytes:
        """The bytes of a token's text."""
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # an id beyond the vocabulary: rows that only pad the embedding
            return b""
        if token in self.special:
            return piece.encode()
        if self._byte_of is not None and all(letter in self._byte_of for letter in piece):
            return bytes(self._byte_of[letter] for letter in piece)
        if single := BYTE_TOKEN.fullmatch(piece):
            return bytes([int(single[1], 16)])
        return piece.replace("\u2581", " ").encode() if self._byte_of is None else piece.encode()

    def chat(self, tokens: Sequence[Scored]) -> ChatLogprobs:
        """The shape of ``/v1/chat/completions``."""
        return ChatLogprobs(
            content=[
                TokenLogprob(
                    **self._entry(scored.token_id, scored.logprob),
                    top_logprobs=[TopLogprob(**self._entry(*likely)) for likely in scored.top],
                )
                for scored in tokens
            ]
        )

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        spelled = self.spell(token)
        return {
            "token": spelled.decode(errors="replace"),
            "logprob": max(logprob, LEAST),
            "bytes": list(spelled),
        }


class OffsetCounter:
    """The shape of ``/v1/completions``, whose offsets run on from piece to piece of a text.

    Args:
        speller: of the tokenizer.
        start: characters before the first token.
    """

    def __init__(self, speller: Speller, start: int) -> None:
        self.speller = speller
        self.offset = start
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def completion(self, tokens: Sequence[Scored], likeliest: int) -> CompletionLogprobs:
        """The next tokens.

        Args:
            tokens: with their log-probabilities.
            likeliest: how many were asked for; with none, ``top_logprobs`` is null.
        """
        offsets = []
        for scored in tokens:
            offsets.append(self.offset)
            if scored.token_id not in self.speller.special:
                self.offset += len(self._characters.decode(self.speller.spell(scored.token_id)))
        return CompletionLogprobs(
            tokens=[self._name(scored.token_id) for scored in tokens],
            token_logprobs=[max(scored.logprob, LEAST) for scored in tokens],
            top_logprobs=[self._likeliest(scored) for scored in tokens] if likeliest else None,
            text_offset=offsets,
        )

    def _likeliest(self, scored: Scored) -> dict[str, float]:
        """By name, the chosen token among them; of two with one name the likelier."""
        names: dict[str, float] = {}
        for token, logprob in (*scored.top, (scored.token_id, scored.logprob)):
            names.setdefault(self._name(token), max(logprob, LEAST))
        return names

    def _name(self, token: int) -> str:
        """The token as text; as ``bytes:`` where it holds a part of a character only."""
        spelled = self.speller.spell(token)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
