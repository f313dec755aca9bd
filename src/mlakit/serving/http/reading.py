"""From a request's body to the tokens that the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError

from mlakit.errors import UsageError
from mlakit.generation import prompt_ids
from mlakit.serving.http.protocol import Message
from mlakit.serving.http.refusal import Refusal


class PromptReader:
    """Prompts and conversations as token ids; used by one thread, while the engine's decodes.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        tokenizer("a")  # sets truncation and padding for good, before there is another thread

    def prompt(self, prompt: str | list[int]) -> list[int]:
        """A plain prompt, as ``mlakit.generate`` reads it; ids are taken as they are.

        Raises:
            Refusal: it is empty and the tokenizer has no token to begin with.
        """
        if not isinstance(prompt, str):
            return prompt
        try:
            return prompt_ids(self.tokenizer, prompt, False)
        except UsageError as error:
            raise Refusal.of(400, error, param="prompt") from error

    def text(self, prompt: str | list[int]) -> str:
        """A plain prompt as text, to be echoed."""
        if isinstance(prompt, str):
            return prompt
        return str(self.tokenizer.decode(prompt, skip_special_tokens=True))

    def conversation(self, messages: Sequence[Message]) -> list[int]:
        """A conversation in the chat template, up to where the model's turn begins.

        Raises:
            Refusal: there is no template, or it does not take this conversation.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise Refusal(
                400,
                "this model's tokenizer has no chat template: use /v1/completions, or start the"
                " server with --chat-template FILE",
                param="messages",
            )
        turns = [message.for_template() for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program: it raises whatever it likes
            raise Refusal(
                400,
                f"the chat template does not take this conversation: {error or repr(error)}",
                param="messages",
            ) from error
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise Refusal(400, "the chat template makes no text of this", param="messages")
        return ids


def use_chat_template(tokenizer: Any, file: str | Path) -> None:
    """Replaces a tokenizer's chat template by a file's.

    Raises:
        UsageError: the file cannot be read, or is no Jinja template.
    """
    path = Path(file).expanduser()
    try:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Cannot read --chat-template {path}: {error}") from error
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise UsageError(
            f"--chat-template {path}, line {error.lineno}: {error.message}",
            remedy="give a Jinja template, as in a tokenizer's chat_template.jinja",
        ) from error
    except Exception:  # it may want other turns than this one; requests are told why
        pass
