"""How well a continuation is predicted after a cached prefix.

Scoring a text in one pass cannot see a cache: exact keys and values are at hand in the first call,
whatever is stored afterwards. So each window is cut in two: a prefix of P tokens is fed into an
empty cache, then S more tokens are fed through that cache, and only those are scored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from transformers import Cache, PreTrainedModel

from mlakit.data import EVALUATION, Source, SourceLike, named_sources, source_windows
from mlakit.errors import MlakitError, UsageError
from mlakit.evaluation.subject import Subject, require_same_tokens
from mlakit.nn.hf import new_cache
from mlakit.reporting.schema import Agreement, DomainQuality, Estimate, Likelihood, Quality, Text

LONGEST_WINDOW = 2304
LONGEST_SUFFIX = 256
RESAMPLES = 2000
BINS = 16
ROWS_AT_ONCE = 32
"""Positions turned into float64 probabilities together; bounds memory for large vocabularies."""

TextLike = SourceLike | Sequence[SourceLike] | None
"""One text or several, as ``mlakit.data.named_sources`` takes them; None for the package's own."""

Progress = Callable[[str, int, int], None]
"""Told (what, done, total) as work goes on."""


@dataclass(frozen=True)
class Windows:
    """Token windows to score: [W, P + S + 1] ids; the last of each is only ever a target.

    ``domains`` names each window's text, W of them.
    """

    ids: torch.Tensor
    prefix_length: int
    suffix_length: int
    text: Text
    domains: tuple[str, ...]


@dataclass(frozen=True)
class TokenScores:
    """Scores per window and continuation token, float64 [W, S] each."""

    source_nll: np.ndarray
    result_nll: np.ndarray | None = None
    kl: np.ndarray | None = None
    same_top1: np.ndarray | None = None


def open_texts(text: TextLike) -> tuple[Source, ...]:
    """The texts to score, read; the package's own evaluation text where none is given."""
    sources = named_sources(EVALUATION if text is None else text)
    for source in sources:
        source.content  # noqa: B018  # read now: what cannot be read is refused before any weight
    return sources


def describe_texts(sources: Sequence[Source]) -> Text:
    """One name and one hash for all of them."""
    hashes = [source.content.sha256 for source in sources]
    whole = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    own = [source.place for source in sources] == [EVALUATION]
    name = "mlakit's own evaluation text" if own else ", ".join(s.place for s in sources)
    return Text(name=name, sha256=whole)


def window_lengths(context: int, prefix: int | None, suffix: int | None) -> tuple[int, int]:
    """Prefix and suffix lengths for a context: three quarters and one, at most 2048 + 256.

    Raises:
        UsageError: if the lengths asked for are not positive or do not fit the context.
    """
    total = min(context, LONGEST_WINDOW)
    if suffix is None:
        room = total if prefix is None else max(total - prefix, 1)
        suffix = max(1, min(LONGEST_SUFFIX, total // 4, room))
    if prefix is None:
        prefix = max(1, total - suffix)
    if prefix < 1 or suffix < 1 or prefix + suffix > context:
        raise UsageError(
            f"a prefix of {prefix} and a continuation of {suffix} tokens do not fit: both must be "
            f"at least 1 and together at most the context of {context}",
            remedy="choose shorter lengths, or leave them out",
        )
    return prefix, suffix


def cut_windows(
    source: Subject,
    result: Subject | None,
    *,
    text: TextLike = None,
    prefix_length: int | None = None,
    suffix_length: int | None = None,
    count: int = 8,
) -> Windows:
    """Cuts texts into windows that both models can read, ``count`` from each.

    Raises:
        UsageError: lengths beyond a model's context, or two models with different tokens.
        MlakitError: a text that is missing or too short.
    """
    if count < 1:
        raise UsageError(f"at least one window is needed, not {count}")
    texts = open_texts(text)
    context = source.context
    if result is not None:
        for item in texts:
            require_same_tokens(source, result, item.content.plain)
        context = min(context, result.context)
    prefix, suffix = window_lengths(context, prefix_length, suffix_length)
    length = prefix + suffix + 1
    ids = [window for t in texts for window in source_windows(t, source.tokenizer, length, count)]
    names = tuple(t.name for t in texts for _ in range(count))
    return Windows(torch.tensor(ids), prefix, suffix, describe_texts(texts), names)


@torch.no_grad()  # not inference_mode: weights that a training shards are gathered in here
def continuation_logits(
    model: PreTrainedModel, ids: torch.Tensor, prefix_length: int, *, chunk: int | None = None
) -> torch.Tensor:
    """Logits of a continuation that is fed through the cache of its prefix.

    Args:
        model: an ordinary or converted causal language model.
        ids: int64 [P + S]: prefix and continuation.
        prefix_length: P; these tokens are fed first, into an empty cache.
        chunk: continuation tokens per call; all S at once by default, 1 is step by step.

    Returns:
        [S, vocabulary] logits in the model's dtype; row j predicts token P + j + 1.
    """
    ids = ids.to(model.device)
    cache = new_cache(model, 1, len(ids))
    feed(model, ids[:prefix_length], cache, seen=0, last_only=True)
    step = chunk or len(ids) - prefix_length
    starts = range(prefix_length, len(ids), step)
    return torch.cat([feed(model, ids[i : i + step], cache, seen=i) for i in starts])


def feed(
    model: PreTrainedModel, ids: torch.Tensor, cache: Cache, *, seen: int, last_only: bool = False
) -> torch.Tensor:
    """Feeds one sequence's next tokens [S] through its cache; logits [S or 1, vocabulary]."""
    mask = torch.ones(1, seen + len(ids), dtype=torch.long, device=ids.device)
    output = model(
        input_ids=ids[None],
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1 if last_only else 0,
    )
    return output.logits[0]


def kl_divergence(source: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """KL(source || result) of two logit tensors [..., vocabulary], in nats, float64 [...].

    Never below zero: what lies below is rounding.
    """
    log_p = source.double().log_softmax(-1)
    log_q = result.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0.0)


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of ``targets`` [S] under logits [S, vocabulary], nats, float64."""
    return torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")


def score_windows(
    source: Subject,
    result: Subject | None,
    windows: Windows,
    *,
    progress: Progress | None = None,
) -> TokenScores:
    """Scores every window of both models through their caches, one window at a time.

    Windows are never batched, so no number depends on its neighbours.
    """
    rows: list[list[np.ndarray]] = []
    for index, ids in enumerate(windows.ids):
        ours = _finite_logits(source, ids[:-1], windows.prefix_length)
        theirs = None if result is None else _finite_logits(result, ids[:-1], windows.prefix_length)
        targets = ids[windows.prefix_length + 1 :].to(ours.device)
        rows.append(score_rows(ours, theirs, targets))
        if progress:
            progress("quality", index + 1, len(windows.ids))
    return TokenScores(*(np.stack(column) for column in zip(*rows, strict=True)))


def _finite_logits(subject: Subject, ids: torch.Tensor, prefix_length: int) -> torch.Tensor:
    logits = continuation_logits(subject.model, ids, prefix_length)
    require_finite(subject, logits)
    return logits


def require_finite(subject: Subject, logits: torch.Tensor) -> None:
    """Refuses a source whose own logits are NaN or infinite."""
    if not torch.isfinite(logits).all():
        raise MlakitError(
            f"{subject.name} computes NaN or infinite logits in {subject.dtype}",
            remedy="the weights are damaged"
            if subject.model.dtype in (torch.float32, torch.float64)
            else "try --dtype float32; if that fails too, the weights are damaged",
        )


def score_rows(
    source: torch.Tensor, result: torch.Tensor | None, targets: torch.Tensor
) -> list[np.ndarray]:
    """Scores of one continuation: logits [S, vocabulary], targets [S].

    Returns:
        NLL, and with a result its NLL, KL and equality of the top token, float64 [S] each.
    """
    blocks = []
    for start in range(0, len(targets), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        block = [token_nll(source[rows], targets[rows])]
        if result is not None:
            theirs = result[rows].to(source.device)
            block.append(token_nll(theirs, targets[rows]))
            block.append(kl_divergence(source[rows], theirs))
            block.append((source[rows].argmax(-1) == theirs.argmax(-1)).double())
        blocks.append([column.cpu().numpy() for column in block])
    return [np.concatenate(column) for column in zip(*blocks, strict=True)]


def bootstrap(window_means: Sequence[float] | np.ndarray, *, seed: int) -> Estimate:
    """Mean over windows with the percentile-bootstrap 95 % interval; windows are resampled."""
    means = np.asarray(window_means, dtype=np.float64)
    value = float(means.mean())
    if len(means) < 2:
        return Estimate(value=value)
    picks = np.random.default_rng(seed).integers(len(means), size=(RESAMPLES, len(means)))
    low, high = np.quantile(means[picks].mean(axis=1), [0.025, 0.975])
    return Estimate(value=value, low=float(low), high=float(high))


def summarise(scores: TokenScores, windows: Windows, *, seed: int) -> Quality:
    """Means, tails and intervals of token scores."""
    edges = _bin_edges(windows.suffix_length)
    result = agreement = None
    if scores.result_nll is not None and scores.kl is not None and scores.same_top1 is not None:
        result = _likelihood(scores.result_nll, edges, seed)
        difference = (scores.result_nll - scores.source_nll).mean(axis=1)
        agreement = Agreement(
            kl_mean=bootstrap(scores.kl.mean(axis=1), seed=seed),
            kl_p999=float(np.quantile(scores.kl, 0.999)),
            kl_max=float(scores.kl.max()),
            top1=bootstrap(scores.same_top1.mean(axis=1), seed=seed),
            nll_difference=bootstrap(difference, seed=seed),
            kl_by_position=_by_position(scores.kl, edges),
        )
    return Quality(
        text=windows.text,
        prefix_length=windows.prefix_length,
        suffix_length=windows.suffix_length,
        windows=len(windows.ids),
        positions=edges[1:],
        source=_likelihood(scores.source_nll, edges, seed),
        result=result,
        agreement=agreement,
    )


def summarise_domains(scores: TokenScores, windows: Windows, *, seed: int) -> list[DomainQuality]:
    """The same for each text alone; nothing where there is only one."""
    found = []
    names = list(dict.fromkeys(windows.domains))
    for name in names if len(names) > 1 else ():
        rows = [row for row, domain in enumerate(windows.domains) if domain == name]
        nll, theirs, kl, top1 = (
            None if part is None else bootstrap(part[rows].mean(axis=1), seed=seed)
            for part in (scores.source_nll, scores.result_nll, scores.kl, scores.same_top1)
        )
        assert nll is not None
        found.append(
            DomainQuality(
                name=name, windows=len(rows), source_nll=nll, result_nll=theirs, kl=kl, top1=top1
            )
        )
    return found


def _likelihood(nll: np.ndarray, edges: list[int], seed: int) -> Likelihood:
    mean = bootstrap(nll.mean(axis=1), seed=seed)
    perplexity = mean.mapped(lambda x: float(np.exp(x)))
    return Likelihood(nll=mean, perplexity=perplexity, nll_by_position=_by_position(nll, edges))


def _bin_edges(length: int) -> list[int]:
    bins = min(BINS, length)
    return [round(index * length / bins) for index in range(bins + 1)]


def _by_position(values: np.ndarray, edges: list[int]) -> list[float]:
    return [float(values[:, a:b].mean()) for a, b in pairwise(edges)]
