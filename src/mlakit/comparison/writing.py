"""Texts written and weighed through a compressed cache: what tasks ask of a variant.

A prompt is read exactly but for its last token, its cache is compressed, and all that follows goes
through what is left, token by token as in an engine. The question stands in what is compressed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from mlakit.baselines import Variant, read_prefix
from mlakit.evaluation.quality import feed, token_nll
from mlakit.generation.continuation import Continuation, eos_ids, next_tokens
from mlakit.generation.sampling import Sampling


@torch.no_grad()
def write(
    variant: Variant, tokenizer: Any, prompt: Sequence[int], sampling: Sampling, occurrence: int = 0
) -> Continuation:
    """Continues a prompt.

    Args:
        variant: what to write with.
        tokenizer: of its model.
        prompt: token ids, at least one.
        sampling: how to go on, and where to end.
        occurrence: how many times the same prompt came before with the same seed.
    """
    eos = eos_ids(variant.model, tokenizer)
    text = Continuation(tokenizer, prompt, sampling, eos, occurrence)
    cache = compressed(variant, prompt[:-1], len(prompt) + sampling.max_tokens)
    token, seen = prompt[-1], len(prompt) - 1
    with _reading(variant, cache, seen):
        while text.finish_reason is None:
            ids = torch.tensor([token], device=variant.model.device)
            [token] = next_tokens(feed(variant.model, ids, cache, seen=seen), [text])
            text.accept(token)
            seen += 1
    return text


@torch.no_grad()
def weigh(
    variant: Variant, context: Sequence[int], continuations: Sequence[Sequence[int]]
) -> list[tuple[float, bool]]:
    """Log-likelihood of each continuation, and whether it is what would be written.

    Args:
        variant: what to weigh with.
        context: token ids before all of them, at least one; their cache is compressed once.
        continuations: token ids, at least one each.
    """
    read, model = len(context) - 1, variant.model
    cache = compressed(variant, context[:-1], len(context) + max(map(len, continuations)))
    found = []
    for place, ids in enumerate(continuations):
        own = cache if place == len(continuations) - 1 else copy.deepcopy(cache)
        fed, targets = torch.tensor([[context[-1], *ids[:-1]], list(ids)], device=model.device)
        first = 0 if read else 1  # a lone first token is a prefix to methods that cut one
        with _reading(variant, own, read):
            parts = [feed(model, x, own, seen=read + at) for at, x in _parts(fed, first)]
        logits = torch.cat(parts)
        likely = bool((logits.argmax(-1) == targets).all())
        found.append((-float(token_nll(logits, targets).sum()), likely))
    return found


def _reading(variant: Variant, cache: Cache, seen: int) -> AbstractContextManager[object]:
    """The variant's own way to read what it compressed; there is none where nothing was."""
    return variant.reading(cache) if seen else nullcontext()


def _parts(ids: Tensor, first: int) -> list[tuple[int, Tensor]]:
    """Non-empty parts before and from a place, each with where it begins."""
    return [(at, part) for at, part in ((0, ids[:first]), (first, ids[first:])) if len(part)]


def compressed(variant: Variant, prompt: Sequence[int], longest: int) -> Cache:
    """The cache of a prompt as the variant keeps it, with room for ``longest`` tokens."""
    if not prompt:
        return variant.new_cache(variant.model, 1, longest)
    prefix = read_prefix(
        variant.model,
        torch.tensor(prompt),
        max_length=longest,
        queries=variant.needs_queries,
        new_cache=variant.new_cache,
    )
    return variant.compress(prefix)
