"""Can the model still look up a line that stands far back in its cache?

The text is cached, the question and its answer are fed through the cache. The answer counts when
every one of its tokens is the model's most likely one: exactly then greedy decoding writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from mlakit.data import NAMES, Probe, code_line, key_value_prompt, passkey_prompt
from mlakit.errors import MlakitError, UsageError
from mlakit.evaluation.quality import LONGEST_WINDOW, Progress, continuation_logits
from mlakit.evaluation.subject import Subject
from mlakit.reporting.schema import Recall, RecallCell, RecallKind

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
MOST_PAIRS = 16


def recall_lengths(context: int) -> tuple[int, ...]:
    """A quarter, a half and all of the context, at most 2304 tokens."""
    longest = min(context, LONGEST_WINDOW)
    return longest // 4, longest // 2, longest


def measure_recall(
    source: Subject,
    result: Subject | None = None,
    *,
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] = DEPTHS,
    trials: int = 2,
    seed: int = 0,
    progress: Progress | None = None,
) -> Recall | None:
    """Passkey and key-value recall of one model or two on the same probes.

    Args:
        source: the model whose tokenizer counts the probes.
        result: the model to compare, if any.
        lengths: tokens of text, question and answer; by default three shares of the context.
        depths: where the wanted line stands, 0 first and 1 last.
        trials: probes per kind, length and depth, each with its own seed.
        seed: seed of the first trial.
        progress: told about every probe.

    Returns:
        Hits per kind, length and depth; None when the probes fit none of the default lengths.
    """
    if trials < 1:
        raise UsageError(f"recall needs at least one trial, not {trials}")
    plan = recall_plan(source, lengths, depths)
    cells = []
    for index, (kind, length, depth) in enumerate(plan):
        probes = [make_probe(kind, length, depth, source, seed + t) for t in range(trials)]
        cells.append(
            RecallCell(
                kind=kind,
                length=length,
                depth=depth,
                trials=trials,
                source_hits=sum(finds(source, probe) for probe in probes),
                result_hits=None if result is None else sum(finds(result, p) for p in probes),
            )
        )
        if progress:
            progress("recall", index + 1, len(plan))
    return Recall(cells=cells) if cells else None


def recall_plan(
    source: Subject, lengths: Sequence[int] | None = None, depths: Sequence[float] = DEPTHS
) -> list[tuple[RecallKind, int, float]]:
    """Kind, length and depth of every probe; default lengths that a kind does not fit are out."""
    plan: list[tuple[RecallKind, int, float]] = []
    for kind in ("passkey", "key_value"):
        for length in lengths or recall_lengths(source.context):
            if lengths or _fits(kind, length, source):
                plan += [(kind, length, depth) for depth in depths]
    return plan


def make_probe(kind: RecallKind, length: int, depth: float, subject: Subject, seed: int) -> Probe:
    """A probe that takes at most ``length`` tokens of the subject's tokenizer, bos included."""
    count_tokens = token_counter(subject)
    room = length - len(_bos(subject))
    if kind == "passkey":
        return passkey_prompt(room, depth, count_tokens=count_tokens, seed=seed)
    # At most half of the text are pairs, so that the wanted one also lies far from the question.
    longest = max(count_tokens(code_line(name, "0000") + "\n") for name in NAMES)
    pairs = max(2, min(MOST_PAIRS, room // 2 // longest))
    return key_value_prompt(room, depth, count_tokens=count_tokens, pairs=pairs, seed=seed)


def finds(subject: Subject, probe: Probe) -> bool:
    """Whether greedy decoding writes the probe's answer after the cached text and the question."""
    asked = tokenise(subject, probe)
    logits = continuation_logits(subject.model, asked.ids[:-1], asked.text_length)
    return asked.answered(logits)


class Asked(NamedTuple):
    """A probe in tokens: text, question and answer.

    Attributes:
        ids: all of them, ``[T]``.
        text_length: tokens of the text; the question begins after them.
        answer_length: tokens of the answer, the last ones.
    """

    ids: torch.Tensor
    text_length: int
    answer_length: int

    def answered(self, logits: torch.Tensor) -> bool:
        """Whether the last logits ``[S, vocabulary]`` are those of the answer, token by token."""
        greedy = logits[-self.answer_length :].argmax(-1).cpu()
        return bool((greedy == self.ids[-self.answer_length :]).all())


def tokenise(subject: Subject, probe: Probe) -> Asked:
    """The tokens of a probe, where its text ends and where its answer begins."""
    text = _ids(subject, probe.text)
    prompt = _ids(subject, probe.prompt)
    whole = _ids(subject, f"{probe.prompt} {probe.answer}")
    ids = torch.tensor(whole)
    return Asked(ids, _common(text, whole), len(whole) - _common(prompt, whole))


def token_counter(subject: Subject) -> Callable[[str], int]:
    """Counts the tokens of a text, without any bos."""
    return lambda text: len(_ids(subject, text)) - len(_bos(subject))


def _fits(kind: RecallKind, length: int, subject: Subject) -> bool:
    try:
        make_probe(kind, length, 0.0, subject, 0)
    except MlakitError:
        return False
    return True


def _bos(subject: Subject) -> list[int]:
    bos = subject.tokenizer.bos_token_id
    return [] if bos is None else [bos]


def _ids(subject: Subject, text: str) -> list[int]:
    ids = subject.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return _bos(subject) + ids


def _common(first: list[int], second: list[int]) -> int:
    """Length of the common beginning: a tokenizer may merge across the cut."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
