"""A short training towards the source's own predictions, for what exists only trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mlakit.baselines.method import Bench, Variant
from mlakit.baselines.prefix import NewCache
from mlakit.baselines.weights import decoder_layers
from mlakit.data import source_windows
from mlakit.nn.hf import new_cache

WINDOW, BATCH, RATE = 256, 4, 1e-3
"""Tokens of a window, windows of a step, and Adam's rate, which falls to zero."""


def training_windows(bench: Bench) -> Tensor:
    """All windows of the calibration texts, ``[n, T]``."""
    length = min(bench.source.context, WINDOW)
    tokenizer = bench.source.tokenizer
    windows = [w for text in bench.calibration for w in source_windows(text, tokenizer, length)]
    return torch.tensor(windows, device=bench.source.model.device)


def train(bench: Bench, student: PreTrainedModel, new_cache: NewCache = new_cache) -> Variant:
    """Trains the attention of a changed copy, in float32, and gives what it reached.

    The loss is KL(source || student) over all tokens of a window. All else stays the source's.

    Args:
        bench: with the steps to take.
        student: the copy; it is trained in place.
        new_cache: the cache that makes its layers share; read by the student as it trains.
    """
    source, windows = bench.source.model, training_windows(bench)
    student.float().requires_grad_(False)
    parts: list[nn.Module] = [layer.self_attn for layer in decoder_layers(student)]
    learned = [p.requires_grad_() for part in parts for p in part.parameters()]
    optimiser = torch.optim.Adam(learned, lr=RATE)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, bench.train_steps)
    generator = torch.Generator().manual_seed(bench.seed)
    with torch.enable_grad():
        for _ in range(bench.train_steps):
            rows = torch.randint(len(windows), (BATCH,), generator=generator)
            loss = divergence(source, student, windows[rows.to(windows.device)], new_cache)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(learned, 1.0)
            optimiser.step()
            falling.step()
    frozen: Any = student.requires_grad_(False)
    frozen.to(source.dtype)
    tokens = bench.train_steps * BATCH * windows.shape[1]
    return Variant(student, new_cache=new_cache, trained_tokens=tokens)


def divergence(
    source: PreTrainedModel, student: PreTrainedModel, ids: Tensor, new_cache: NewCache
) -> Tensor:
    """Mean KL(source || student) over the tokens of windows ``[B, T]``."""
    with torch.no_grad():
        wanted = source(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    cache: Any = new_cache(student, *ids.shape)
    out = student(input_ids=ids, past_key_values=cache, use_cache=True)
    return nn.functional.kl_div(
        out.logits.flatten(0, 1).log_softmax(-1), wanted.flatten(0, 1),
        log_target=True, reduction="batchmean",
    )  # fmt: skip
