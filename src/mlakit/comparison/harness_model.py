"""A variant as lm-eval asks models. Importing this needs lm-eval."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from mlakit.baselines import Variant
from mlakit.comparison.writing import weigh, write
from mlakit.errors import UsageError
from mlakit.evaluation import Subject
from mlakit.generation.sampling import Sampling


class VariantModel(HFLM):
    """lm-eval's model of transformers, whose prompts are read into a cache and compressed there.

    Args:
        variant: what to ask.
        subject: its model and tokenizer.
        seed: of tasks that sample.
    """

    def __init__(self, variant: Variant, subject: Subject, seed: int) -> None:
        super().__init__(
            pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=1, backend="causal"
        )
        self.variant, self.seed = variant, seed

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], *args: Any, **options: Any
    ) -> list[tuple[float, bool]]:
        """Choices of one context, which follow one another, share its cache."""
        found = []
        for context, same in groupby(requests, key=lambda request: tuple(request[1])):
            choices = [request[2] for request in same]
            room = self.max_length + 1 - max(map(len, choices))
            found += weigh(self.variant, context[-max(room, 1) :], choices)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], *args: Any, **options: Any) -> Any:
        """Whole texts in one pass read no cache.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "it weighs whole texts in one pass, which reads no cache",
            remedy="leave it out: --text scores continuations of cached text",
        )

    def _model_generate(
        self, context: Tensor, max_length: int, stop: Sequence[str], **options: Any
    ) -> Tensor:
        """Prompts ``[B, P]``, padded on the left, with what is written after them."""
        warm = options.get("do_sample", bool(options.get("temperature")))
        sampling = Sampling(
            max_length - context.shape[1],
            temperature=float(options.get("temperature") or 1.0) if warm else 0.0,
            top_p=float(options.get("top_p") or 1.0),
            top_k=int(options.get("top_k") or 0),
            stop=tuple(text for text in stop if text),
            seed=self.seed,
        )
        masks = options.get("attention_mask", torch.ones_like(context))
        written = []
        for row, mask in zip(context, masks, strict=True):
            prompt = row[mask.bool()].tolist()
            text = write(self.variant, self.tokenizer, prompt, sampling)
            written.append(torch.cat([row.cpu(), torch.tensor(text.token_ids, dtype=row.dtype)]))
        return torch.nn.utils.rnn.pad_sequence(
            written, batch_first=True, padding_value=self.eot_token_id
        )
