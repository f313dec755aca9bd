"""The calibration windows: every text's share of them, mixed, those held out last."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mlakit.checkpoint import Checkpoint
from mlakit.conversion.amounts import HELD_OUT
from mlakit.conversion.domains import Calibration, Domain
from mlakit.conversion.plan import Progress
from mlakit.conversion.samples import require_memory, stored_samples
from mlakit.data import Source, source_windows
from mlakit.errors import MlakitError
from mlakit.spec import ModelSpec


@dataclass(frozen=True)
class Windows:
    """Token windows, and which text each comes from.

    Attributes:
        ids: ``[W, T]``; the last ``held_out_count(W)`` enter no statistic.
        domains: the name of each window's text, ``W`` of them.
        checks: ``[K, T]``: windows of texts that are only measured on.
        check_domains: their names, ``K`` of them.
    """

    ids: torch.Tensor
    domains: tuple[str, ...]
    checks: torch.Tensor
    check_domains: tuple[str, ...]


def held_out_count(windows: int) -> int:
    """How many of the windows, the last ones, enter no statistic: an eighth, at least one."""
    return max(1, windows // HELD_OUT)


def held_out_record(windows: Windows, found: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """What a plan keeps of the measurements on held-out windows and then on checks.

    Args:
        windows: all of them.
        found: of each of these windows the mean KL divergence and the source's own loss.

    Returns:
        ``held_out_kl``, the mean over the held-out windows, and ``domains``, one entry per text.
    """
    held_out = held_out_count(len(windows.ids))
    names = (*windows.domains[-held_out:], *windows.check_domains)
    by_text: dict[str, list[tuple[float, float]]] = {}
    for name, pair in zip(names, found, strict=True):
        by_text.setdefault(name, []).append(pair)
    length = windows.ids.shape[1]
    return {
        "held_out_kl": sum(kl for kl, _ in found[:held_out]) / held_out,
        "domains": [
            {
                "name": name,
                "calibrated": name in windows.domains,
                "tokens": len(pairs) * length,
                "kl": sum(kl for kl, _ in pairs) / len(pairs),
                "source_loss": sum(loss for _, loss in pairs) / len(pairs),
            }
            for name, pairs in by_text.items()
        ],
    }


class WindowChoice:
    """Cuts the texts of a plan into windows; what the model writes itself follows in ``choose``.

    Args:
        checkpoint: the source.
        model: its description.
        plan: which texts, and how much of each.
        sources: the texts, those of ``plan.domains`` and then of ``plan.checks``.
        device: where the model writes.

    Raises:
        MlakitError: too little text, no tokenizer, tokens that the model does not know, or a model
            that does not fit into memory and shall write a text itself.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: ModelSpec,
        plan: Calibration,
        sources: Sequence[Source],
        device: str,
    ) -> None:
        self.checkpoint, self.plan, self.device = checkpoint, plan, device
        self.tokenizer = open_tokenizer(checkpoint.path)
        self._cut: list[list[list[int]] | None] = []
        for source, domain in zip(sources, (*plan.domains, *plan.checks), strict=True):
            if source.own:
                require_memory(checkpoint, model, plan.window, device)
                self._cut.append(None)
            else:
                self._cut.append(self._windows(source, domain))
        self._check_counts()
        self._check_ids(model)

    @property
    def count(self) -> int:
        """Windows to calibrate with, W."""
        return sum(self._counts)

    @property
    def _counts(self) -> list[int]:
        return [
            len(cut) if cut is not None else domain.tokens // self.plan.window
            for cut, domain in zip(self._cut, self.plan.domains)
        ]

    def choose(self, work: Path, progress: Progress) -> Windows:
        """All windows; samples of the model's own are kept in ``work`` for a later start."""
        planned = (*self.plan.domains, *self.plan.checks)
        texts = [
            self._own_windows(place, domain, work, progress) if cut is None else cut
            for place, (cut, domain) in enumerate(zip(self._cut, planned, strict=True))
        ]
        names = [domain.name for domain in self.plan.domains]
        held = shares_held_out(self._counts)
        fitted: list[tuple[list[int], str]] = []
        last: list[tuple[list[int], str]] = []
        for windows, name, count in zip(texts, names, held):
            fitted += [(window, name) for window in windows[:-count]]
            last += [(window, name) for window in windows[-count:]]
        checks = [
            (window, domain.name)
            for windows, domain in zip(texts[len(names) :], self.plan.checks, strict=True)
            for window in windows
        ]
        whole = fitted + last
        return Windows(
            torch.tensor([window for window, _ in whole]),
            tuple(name for _, name in whole),
            torch.tensor([w for w, _ in checks], dtype=torch.long).reshape(-1, self.plan.window),
            tuple(name for _, name in checks),
        )

    def _windows(self, source: Source, domain: Domain) -> list[list[int]]:
        """A text longer than its share gives windows from all over it, chosen by the seed."""
        try:
            windows = source_windows(source, self.tokenizer, self.plan.window)
        except MlakitError as error:
            raise MlakitError(f"{domain.name}: {error.message}", remedy=error.remedy) from error
        wanted = domain.tokens // self.plan.window
        if len(windows) > wanted:
            chosen = random.Random(self.plan.seed).sample(range(len(windows)), wanted)
            windows = [windows[index] for index in sorted(chosen)]
        return windows

    def _own_windows(
        self, place: int, domain: Domain, work: Path, progress: Progress
    ) -> list[list[int]]:
        count = domain.tokens // self.plan.window
        progress("write samples", 0, count)
        samples = stored_samples(
            work / f"samples-{place}.json",
            self.checkpoint,
            self.tokenizer,
            (count, self.plan.window),
            1000 * self.plan.seed + place,
            self.device,
            lambda done: progress("write samples", done, count),
        )
        found: list[list[int]] = samples.tolist()
        return found

    def _check_counts(self) -> None:
        """Statistics and held-out choices need windows of every text."""
        several = len(self.plan.domains) > 1
        for count, domain in zip(self._counts, self.plan.domains):
            if count < 2:
                raise MlakitError(
                    f"The calibration text {domain.name} gives {count} window of"
                    f" {self.plan.window} tokens; two are the least",
                    remedy="give a longer text, or a smaller --calib-tokens",
                )
        if several and held_out_count(self.count) < len(self.plan.domains):
            raise MlakitError(
                f"{len(self.plan.domains)} calibration texts give {self.count} windows of"
                f" {self.plan.window} tokens in all; {HELD_OUT} for each are the least",
                remedy="give longer texts, or a larger --calib-tokens",
            )

    def _check_ids(self, model: ModelSpec) -> None:
        ids = [max(map(max, cut)) for cut in self._cut if cut]
        if ids and max(ids) >= model.vocab_size:
            raise MlakitError(
                f"The tokenizer of {self.checkpoint.source} gives token {max(ids)}, and the model"
                f" has only {model.vocab_size} embeddings",
                remedy="check that the tokenizer files belong to these weights",
            )


def shares_held_out(counts: Sequence[int]) -> list[int]:
    """Of the windows of each text how many are held out: at least one, else in proportion."""
    held = [1] * len(counts)
    while sum(held) < held_out_count(sum(counts)):
        place = max(range(len(counts)), key=lambda i: counts[i] - HELD_OUT * held[i])
        held[place] += 1
    return held


def open_tokenizer(path: Path) -> Any:
    """The tokenizer of a source folder.

    Raises:
        MlakitError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise MlakitError(
            f"The source's tokenizer cannot be loaded from {path}: {error}",
            remedy="put the tokenizer files beside config.json; calibration needs them",
        ) from error
