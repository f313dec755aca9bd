"""The generation loop: expanded prefill, then one absorbed step per token on the cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlakit.errors import UsageError
from mlakit.generation.continuation import Continuation, FinishReason, eos_ids, next_tokens
from mlakit.generation.sampling import Sampling
from mlakit.nn.cache import LatentCache
from mlakit.nn.hf import cache_nbytes, new_cache

OnText = Callable[[int, str], None]


@dataclass(frozen=True)
class GenerationResult:
    """What was written, one entry per prompt, and what it cost.

    Attributes:
        texts: the continuations, without the prompts; cut before a stop string.
        token_ids: their tokens, without the end-of-sequence token; with a stop string, up to the
            token that completed it.
        finish_reasons: ``eos``, ``stop`` (a stop string) or ``length``.
        tokens_per_second: tokens of all sequences written after the first one, per second.
        prefill_seconds: reading the prompts and choosing the first tokens.
        decode_seconds: all further steps.
        cache_bytes_per_token: bytes the cache holds per token and sequence.
        cache_nbytes: bytes of the largest batch's cache.
    """

    texts: list[str]
    token_ids: list[list[int]]
    finish_reasons: list[FinishReason]
    tokens_per_second: float
    prefill_seconds: float
    decode_seconds: float
    cache_bytes_per_token: int
    cache_nbytes: int

    def as_dict(self, prompts: Sequence[str]) -> dict[str, Any]:
        """The result as JSON takes it, each text beside its prompt."""
        rows = zip(prompts, self.texts, self.token_ids, self.finish_reasons, strict=True)
        return {
            "results": [
                {"prompt": prompt, "text": text, "token_ids": ids, "finish_reason": reason}
                for prompt, text, ids, reason in rows
            ],
            "tokens_per_second": self.tokens_per_second,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "cache_bytes_per_token": self.cache_bytes_per_token,
            "cache_nbytes": self.cache_nbytes,
        }

    def summary(self) -> str:
        """One line for a terminal."""
        return (
            f"{sum(map(len, self.token_ids))} tokens, {self.tokens_per_second:.1f} tokens/s; "
            f"cache {self.cache_bytes_per_token} bytes/token, {self.cache_nbytes / 2**20:.2f} MiB"
        )


@dataclass
class _Row:
    """One prompt on its way."""

    index: int
    prompt_ids: list[int]
    text: Continuation


@dataclass
class _Cost:
    """Seconds, tokens and bytes, summed over batches."""

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decoded_tokens: int = 0
    bytes_per_token: int = 0
    nbytes: int = 0


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: Sequence[str] = (),
    seed: int = 0,
    batch_size: int | None = None,
    chat: bool = False,
    on_text: OnText | None = None,
) -> GenerationResult:
    """Continues every prompt; a prompt's text does not depend on what stands beside it.

    In 16 bits that holds up to rounding: products of other sizes are rounded otherwise, and where
    two tokens are nearly as likely, the other one may win.

    Args:
        model: a causal language model of transformers, converted or not.
        tokenizer: its tokenizer.
        prompts: the prompts; an empty one begins with the tokenizer's bos token.
        max_new_tokens: most tokens written per prompt.
        temperature: 0 for the most likely token, else the logits are divided by it.
        top_p: samples from the most likely tokens that reach this probability.
        top_k: samples from this many tokens; 0 for all.
        stop: strings that end a text and are not part of it.
        seed: seed of the sampling.
        batch_size: prompts at a time; all together by default.
        chat: wrap each prompt in the tokenizer's chat template as one user message.
        on_text: called with a prompt's index and the next piece of its text: whole characters,
            never part of a stop string.

    Raises:
        UsageError: an option makes no sense, a prompt does not fit in the model's context with
            ``max_new_tokens``, or there is no chat template or no token to begin with.
    """
    _check(prompts, max_new_tokens, stop, batch_size)
    wishes = Sampling(max_new_tokens, temperature, top_p, top_k, tuple(stop), seed)
    eos = eos_ids(model, tokenizer)
    rows: list[_Row] = []
    for index, prompt in enumerate(prompts):
        ids = prompt_ids(tokenizer, prompt, chat)
        before = sum(row.prompt_ids == ids for row in rows)
        rows.append(_Row(index, ids, Continuation(tokenizer, ids, wishes, eos, before)))
    _check_context(model, rows, max_new_tokens)
    cost = _Cost()
    for start in range(0, len(rows), batch_size or len(rows)):
        batch = rows[start : start + (batch_size or len(rows))]
        _run(model, batch, max_new_tokens, on_text, cost)
    return GenerationResult(
        texts=[row.text.stream.text for row in rows],
        token_ids=[row.text.token_ids for row in rows],
        finish_reasons=[row.text.finish_reason or "length" for row in rows],
        tokens_per_second=cost.decoded_tokens / cost.decode_seconds if cost.decoded_tokens else 0.0,
        prefill_seconds=cost.prefill_seconds,
        decode_seconds=cost.decode_seconds,
        cache_bytes_per_token=cost.bytes_per_token,
        cache_nbytes=cost.nbytes,
    )


def _run(
    model: Any,
    rows: list[_Row],
    max_new_tokens: int,
    on_text: OnText | None,
    cost: _Cost,
) -> None:
    """Writes one batch of rows to their ends."""
    started = _now(model)
    ids, mask = _left_padded(rows, model.device)
    cache = new_cache(model, len(rows), ids.shape[1] + max_new_tokens)
    tokens = _step(model, ids, mask, cache, rows)
    cost.prefill_seconds += _now(model) - started
    started = _now(model)
    while True:
        _accept(rows, tokens, on_text)
        running = sum(row.text.finish_reason is None for row in rows)
        if not running:
            break
        mask = torch.cat((mask, mask.new_ones(len(rows), 1)), dim=1)
        tokens = _step(model, ids.new_tensor(tokens).unsqueeze(1), mask, cache, rows)
        cost.decoded_tokens += running
    cost.decode_seconds += _now(model) - started
    cost.nbytes = max(cost.nbytes, cache_nbytes(cache))
    if isinstance(cache, LatentCache):
        cost.bytes_per_token = cache.nbytes_per_token
    else:
        held = len(rows) * max(1, cache.get_seq_length())
        cost.bytes_per_token = max(cost.bytes_per_token, cache_nbytes(cache) // held)


def _step(model: Any, ids: Tensor, mask: Tensor, cache: Any, rows: list[_Row]) -> list[int]:
    """Feeds ``[B, S]`` tokens and chooses the next ones."""
    positions = (mask.cumsum(dim=1) - 1).clamp_min_(0)[:, -ids.shape[1] :]
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return next_tokens(output.logits[:, -1], [row.text for row in rows])


def _accept(rows: list[_Row], tokens: list[int], on_text: OnText | None) -> None:
    """Gives every unfinished row its token, and its text to the listener."""
    for row, token in zip(rows, tokens, strict=True):
        if row.text.finish_reason is None:
            piece = row.text.accept(token)
            if on_text and piece:
                on_text(row.index, piece)


def _left_padded(rows: list[_Row], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask ``[B, S]`` of prompts that end at the last column.

    Padding is token 0, which every model embeds; a tokenizer's own may lie outside.
    """
    length = max(len(row.prompt_ids) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, length - len(row.prompt_ids) :] = torch.tensor(row.prompt_ids)
        mask[place, length - len(row.prompt_ids) :] = 1
    return ids.to(device), mask.to(device)


def prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """The tokens that a prompt is read as, its chat template and bos included.

    Raises:
        UsageError: there is no chat template, or no token to begin with.
    """
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(
                "the tokenizer has no chat template",
                remedy="use the plain prompt, without chat, or a model tuned for chat",
            )
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids = tokenizer(prompt, verbose=False)["input_ids"]
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise UsageError(
            "an empty prompt needs a tokenizer with a bos token, and this one has none",
            remedy="begin with at least one character",
        )
    return ids


def _check(
    prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str], batch_size: int | None
) -> None:
    for wrong, message in (
        (isinstance(prompts, str), "prompts is one string, not a list of them"),
        (isinstance(stop, str), "stop is one string, not a list of them"),
        (not prompts, "there is no prompt"),
        (max_new_tokens < 1, f"max_new_tokens is {max_new_tokens}; at least 1 is needed"),
        (batch_size is not None and batch_size < 1, f"batch_size is {batch_size}"),
    ):
        if wrong:
            raise UsageError(message)


def _check_context(model: Any, rows: list[_Row], max_new_tokens: int) -> None:
    context = getattr(model.config, "max_position_embeddings", None)
    longest = max(rows, key=lambda row: len(row.prompt_ids))
    needed = len(longest.prompt_ids) + max_new_tokens
    if context is not None and needed > context:
        raise UsageError(
            f"prompt {longest.index} has {len(longest.prompt_ids)} tokens; with {max_new_tokens} "
            f"new ones that is {needed}, and the model's context is {context}",
            remedy="shorten the prompt or lower max_new_tokens",
        )


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
