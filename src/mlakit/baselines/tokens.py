"""Fewer tokens: a window, or those that queries looked at most.

One scorer serves SnapKV, H2O, TOVA and A2SF. They differ in how much each query's attention
counts, in what is kept unseen, and in whether heads choose alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache

from mlakit.baselines.method import Bench, Method, Variant, by_share
from mlakit.baselines.prefix import KeptLayer, Prefix

QUERIES_AT_ONCE = 256
"""Rows of attention that exist at a time."""

SINKS = 4
"""First tokens that a window keeps."""

PREFIX_ONLY = "The prefix is compressed once; tokens written after it are all kept"


@dataclass(frozen=True)
class Rule:
    """How tokens are chosen.

    Attributes:
        weights: of a prefix of P tokens, what each query's attention counts, ``[P]``.
        recent: of a prefix and of tokens to keep, how many of the newest are kept unseen.
        pool: width of the average over neighbouring scores; 1 for none.
        shared: all heads of a layer keep the same tokens.
    """

    weights: Callable[[int], Tensor]
    recent: Callable[[int, int], int]
    pool: int = 1
    shared: bool = False


def observed(length: int) -> int:
    """Queries that vote in SnapKV: 32 as published, fewer where the prefix is short."""
    return max(1, min(32, length // 16))


def last(length: int, count: int) -> Tensor:
    """Ones for the last ``count`` queries."""
    return (torch.arange(length) >= length - count).double()


FORGETTING = 0.99
"""A2SF's factor per step of distance; the authors search one for each model and task."""

RULES = {
    "snapkv": Rule(
        lambda length: last(length, observed(length)),
        lambda length, keep: min(observed(length), keep),
        pool=5,
    ),
    "h2o": Rule(lambda length: torch.ones(length).double(), lambda length, keep: keep // 2),
    "tova": Rule(lambda length: last(length, 1), lambda length, keep: min(1, keep), shared=True),
    "a2sf": Rule(
        lambda length: FORGETTING ** torch.arange(length - 1, -1, -1).double(),
        lambda length, keep: min(1, keep),
    ),
}


def attention_scores(queries: Tensor, keys: Tensor, weights: Tensor, scale: float) -> Tensor:
    """Attention that each key gets, summed over queries by weight and over a group's heads.

    Args:
        queries: ``[1, H, P, d]``, rotated.
        keys: ``[1, G, P, d]``, rotated.
        weights: of each query, ``[P]``.
        scale: factor on the scores.

    Returns:
        ``[G, P]``, float32.
    """
    groups, length = keys.shape[1], keys.shape[2]
    grouped = queries[0].float().unflatten(0, (groups, -1))  # [G, H/G, P, d]
    transposed = keys[0].float().mT.unsqueeze(1)
    total = torch.zeros(groups, length, device=keys.device)
    rows = weights.nonzero().squeeze(1).to(keys.device)
    weights = weights.to(keys.device).float()
    for part in rows.split(QUERIES_AT_ONCE):
        logits = grouped[:, :, part] @ transposed * scale
        unseen = torch.arange(length, device=keys.device) > part[:, None]
        attention = logits.masked_fill_(unseen, float("-inf")).softmax(-1)
        total += torch.einsum("ghqk,q->gk", attention, weights[part])
    return total


def choose(scores: Tensor, rule: Rule, keep: int) -> Tensor:
    """Which tokens each head keeps, ``[G, keep]``, ascending."""
    length = scores.shape[1]
    if rule.shared:
        scores = scores.mean(0, keepdim=True).expand_as(scores)
    older = length - rule.recent(length, keep)
    newest = scores.new_full((len(scores), length - older), float("inf"))
    scores = torch.cat([pooled(scores[:, :older], rule.pool), newest], -1)
    return scores.topk(keep, dim=-1).indices.sort(-1).values


def pooled(scores: Tensor, width: int) -> Tensor:
    """Scores ``[G, n]`` averaged over neighbours, zeros beyond both ends."""
    if width == 1 or not scores.shape[1]:
        return scores
    return torch.nn.functional.avg_pool1d(scores[:, None], width, 1, width // 2)[:, 0]


def kept(share: float, length: int) -> int:
    """Tokens of ``length`` that a share of the cache holds; at least one."""
    return max(1, int(share * length + 1e-9))


def evict(rule: Rule, share: float, prefix: Prefix) -> Cache:
    """A cache with the tokens that the rule chooses."""

    def pack(index: int, keys: Tensor, values: Tensor) -> KeptLayer:
        length = keys.shape[2]
        if (rule, index) not in prefix.found:
            prefix.found[rule, index] = attention_scores(
                prefix.queries[index], keys, rule.weights(length), prefix.scale
            )
        rows = choose(prefix.found[rule, index], rule, kept(share, length))
        picked = [torch.gather(x, 2, rows[None, :, :, None].expand(-1, -1, -1, x.shape[3]))
                  for x in (keys, values)]  # fmt: skip
        return KeptLayer(*picked, seen=length)

    return prefix.each(pack)


def slide(share: float, prefix: Prefix) -> Cache:
    """A cache with the first few tokens and the newest."""

    def pack(index: int, keys: Tensor, values: Tensor) -> KeptLayer:
        length = keys.shape[2]
        keep = kept(share, length)
        first = min(SINKS, keep // 2)
        rows = [*range(first), *range(length - (keep - first), length)]
        return KeptLayer(keys[:, :, rows], values[:, :, rows], seen=length)

    return prefix.each(pack)


def _scored(name: str, title: str, source: str, differs: str) -> Method:
    def build(bench: Bench, share: float) -> Variant:
        return Variant(
            bench.source.model, lambda prefix: evict(RULES[name], share, prefix), needs_queries=True
        )

    return Method(name, title, "tokens", source, differs, by_share, build)


METHODS = (
    Method(
        "window",
        "sink + window",
        "tokens",
        "StreamingLLM, arXiv 2309.17453",
        f"{PREFIX_ONLY} and keep their own positions, where the original renumbers what it keeps.",
        by_share,
        lambda bench, share: Variant(bench.source.model, lambda prefix: slide(share, prefix)),
    ),
    _scored(
        "snapkv",
        "SnapKV",
        "arXiv 2404.14469",
        "Heads of a group vote together, as their keys are one; at most 32 queries vote, a "
        "sixteenth of a shorter prefix.",
    ),
    _scored(
        "h2o", "H2O", "arXiv 2306.14048", f"{PREFIX_ONLY}, where the original goes on evicting."
    ),
    _scored(
        "tova", "TOVA", "arXiv 2401.06104", f"{PREFIX_ONLY}, where the original drops one a step."
    ),
    _scored(
        "a2sf",
        "A2SF",
        "arXiv 2407.20485",
        f"{PREFIX_ONLY}, and the forgetting factor is {FORGETTING} for every model, not searched.",
    ),
)
