"""Token windows of equal length, cut from texts and conversations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mlakit.data.texts import Conversation, Source
from mlakit.errors import MlakitError


def token_windows(
    text: str,
    tokenizer: Any,
    length: int,
    count: int | None = None,
    bos_id: int | None = None,
) -> list[list[int]]:
    """Cuts a text into consecutive windows of equal length.

    Args:
        text: The text.
        tokenizer: A Hugging Face tokenizer.
        length: Tokens per window, the leading bos included.
        count: How many windows are wanted; all whole windows of the text if not given.
        bos_id: The token that starts each window; the tokenizer's own bos if not given. A
            tokenizer without one gets windows of text only.

    Returns:
        The windows, each a list of ``length`` token ids; the rest of the text is left out.
    """
    bos = tokenizer.bos_token_id if bos_id is None else bos_id
    head = [] if bos is None else [bos]
    body = length - len(head)
    if body < 1:
        raise MlakitError(f"a window of {length} tokens has no room for text")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    _check_count(len(ids), len(ids) // body, length, count)
    wanted = len(ids) // body if count is None else count
    return [head + ids[index * body : (index + 1) * body] for index in range(wanted)]


def source_windows(
    source: Source, tokenizer: Any, length: int, count: int | None = None
) -> list[list[int]]:
    """Windows of all that a source holds.

    Conversations go through the tokenizer's chat template, and a window of theirs begins where a
    conversation does: it is filled up with the next ones, and what is left of the last is dropped.
    A tokenizer without a template gets their contents as running text.

    Args:
        source: The source.
        tokenizer: A Hugging Face tokenizer.
        length: Tokens per window.
        count: How many windows are wanted; all there are if not given.

    Raises:
        MlakitError: there is too little text, or the template refuses a conversation.
    """
    content = source.content
    if not content.conversations or not getattr(tokenizer, "chat_template", None):
        return token_windows(content.plain, tokenizer, length, count)
    windows = token_windows(content.text, tokenizer, length) if content.text else []
    tokens = sum(map(len, windows))
    window: list[int] = []
    for ids in _conversation_ids(content.conversations, tokenizer, source.place):
        tokens += len(ids)
        window += ids
        if len(window) >= length:
            windows.append(window[:length])
            window = []
    _check_count(tokens, len(windows), length, count)
    return windows if count is None else windows[:count]


def templated(talk: Conversation, tokenizer: Any, where: str) -> str:
    """A conversation in the tokenizer's chat template.

    Args:
        talk: its turns.
        tokenizer: with a template.
        where: names the conversation in the error.

    Raises:
        MlakitError: the template refuses it.
    """
    try:
        return str(tokenizer.apply_chat_template(list(talk), tokenize=False))
    except Exception as error:  # a template raises what its author chose
        raise MlakitError(
            f"the chat template refuses {where}: {error}",
            remedy="give conversations with the roles that the template knows, in its order",
        ) from error


def _conversation_ids(
    talks: tuple[Conversation, ...], tokenizer: Any, place: str
) -> Iterator[list[int]]:
    for number, talk in enumerate(talks, start=1):
        text = templated(talk, tokenizer, f"conversation {number} of {place}")
        yield tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _check_count(tokens: int, available: int, length: int, count: int | None) -> None:
    if available == 0 or (count is not None and count > available):
        raise MlakitError(
            f"the text has {tokens} tokens, enough for {available} windows of {length}"
            + (f", not for {count}" if count is not None else ""),
            remedy="give more text, or ask for fewer or shorter windows",
        )
