"""Student and teacher as one module, so that one wrapper (FSDP, DDP) holds both.

Whatever touches their weights runs inside ``forward``: only there have wrappers gathered them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from mlakit.errors import UsageError
from mlakit.families import FAMILIES
from mlakit.healing.loss import CHUNK_LOGITS, LogitLoss, chunked
from mlakit.healing.recipe import Recipe
from mlakit.healing.trainable import attention_modules, is_converted

T = TypeVar("T")
FIGURES = ("ce", "kl", "layers")
"""What a step measures, per counted token; zero where its loss was not computed."""


class Pair(nn.Module):
    """A student that trains and a frozen teacher.

    Args:
        student: with its trainable weights chosen.
        teacher: of the same tokens.
        recipe: the losses.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, recipe: Recipe) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False)
        self.recipe = recipe
        self.logit_loss = LogitLoss(
            recipe.ce_weight, recipe.kl_weight, recipe.temperature, recipe.top_k
        )
        self._finish = [finish_logits(model) for model in (student, teacher)]
        if recipe.checkpointing:
            # Its name before transformers 5.23 was gradient_checkpointing_enable.
            old = student.gradient_checkpointing_enable
            getattr(student, "activation_checkpointing_enable", old)({"use_reentrant": False})
        layers = [model._no_split_modules or [] for model in (student, teacher)]
        blocks = {type(module).__name__ for _, module in attention_modules(student)}
        self._no_split_modules = sorted({*layers[0], *layers[1], *blocks})
        """What FSDP makes units of: decoder layers, and attention, which is also called alone."""

    def train(self, mode: bool = True) -> Pair:
        """The teacher never leaves evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, work: Callable[[], T]) -> T:
        """Runs ``work``, which may use both models."""
        return work()

    def losses(self, ids: Tensor, targets: Tensor, *, matching: bool) -> tuple[Tensor, Tensor]:
        """Sums over the counted tokens of a micro batch.

        Args:
            ids: ``[B, T]``.
            targets: the next tokens ``[B, T]``; -100 where a token does not count.
            matching: only match the layers, as in a run's first stage.

        Returns:
            The weighted loss, and the sums of ``FIGURES``.
        """
        total, facts = torch.zeros((), device=ids.device), torch.zeros(3, device=ids.device)
        states = None
        weight = 1.0 if matching else self.recipe.layer_weight
        if weight:
            errors, states = self._layer_errors(ids, targets >= 0)
            total = total + weight * errors
            facts[2] = errors.detach()
        if not matching and self.recipe.ce_weight + self.recipe.kl_weight:
            loss, found = self._logit_losses(ids, targets, states)
            total = total + loss
            facts[:2] = found
        return total, facts

    def _logit_losses(
        self, ids: Tensor, targets: Tensor, teacher_states: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        counted = targets >= 0
        ours = self.student.base_model(input_ids=ids, use_cache=False).last_hidden_state[counted]
        theirs = None
        if self.recipe.kl_weight:
            if teacher_states is None:
                teacher_states = self._teacher_states(ids)
            theirs = teacher_states[counted]
        wanted = targets[counted]
        output: Any = self.student.get_output_embeddings()
        parameters = [p for p in (output.weight, output.bias) if p is not None]
        names = [name for name in ("weight", "bias") if getattr(output, name) is not None]

        def part(hidden: Tensor, weights: list[Tensor], rows: slice) -> tuple[Tensor, Tensor]:
            state = dict(zip(names, weights, strict=True))
            logits = self._finish[0](functional.linear(hidden, **state))
            other = None
            if theirs is not None:
                with torch.no_grad():
                    head: Any = self.teacher.get_output_embeddings()
                    other = self._finish[1](head(theirs[rows]))
            return self.logit_loss(logits, other, wanted[rows])

        rows = max(16, CHUNK_LOGITS // output.weight.shape[0])
        return chunked(part, ours, parameters, rows)

    @torch.no_grad()
    def _teacher_states(self, ids: Tensor) -> Tensor:
        states: Tensor = self.teacher.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return states

    def _layer_errors(self, ids: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """Summed over counted tokens, averaged over layers: squared error over variance.

        Every attention block of the student gets what the teacher's got, so layers learn side by
        side and no error of one reaches the next.
        """
        with watch_attention(self.teacher) as seen:
            states = self._teacher_states(ids)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        total = torch.zeros((), device=ids.device)
        blocks = [module for _, module in attention_modules(self.student)]
        rotary: Any = getattr(self.student.base_model, "rotary_emb", None)
        for block, (inputs, options, output) in zip(blocks, seen, strict=True):
            if is_converted(self.student):
                angles = rotary(inputs, positions)
                options = {**options, "position_embeddings": angles}
            found = block(hidden_states=inputs, **options)[0]
            total = total + relative_errors(found, output, counted).sum()
        return total / len(blocks), states


def relative_errors(found: Tensor, wanted: Tensor, counted: Tensor) -> Tensor:
    """Squared error of each window, ``[B]``: of all counted tokens, over their mean variance.

    Args:
        found: ``[B, T, D]``.
        wanted: likewise.
        counted: ``[B, T]``.
    """
    mask, wanted = counted.unsqueeze(-1), wanted.float()
    count = mask.sum(1, keepdim=True).clamp_min(1)
    mean = (wanted * mask).sum(1, keepdim=True) / count
    spread = ((wanted - mean).square() * mask).sum((1, 2)) / count.flatten()
    return ((found.float() - wanted).square() * mask).sum((1, 2)) / spread.clamp_min(1e-12)


Seen = list[tuple[Tensor, dict[str, Any], Tensor]]


@contextmanager
def watch_attention(model: PreTrainedModel) -> Iterator[Seen]:
    """Collects inputs, options and output of every attention block that runs meanwhile."""
    seen: Seen = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        kept = {name: kwargs.get(name) for name in ("position_embeddings", "attention_mask")}
        seen.append((hidden, kept, output[0]))

    blocks = [module for _, module in attention_modules(model)]
    hooks = [block.register_forward_hook(note, with_kwargs=True) for block in blocks]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def finish_logits(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """What the model's family makes of the product with the output matrix: soft caps, factors."""
    config = model.config.to_dict()
    family = FAMILIES[str(config["model_type"]).removeprefix("mla_")]
    return partial(family.logits, {**family.defaults, **config})


def require_matching_layers(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuses to match layers of models that do not have the same ones.

    Raises:
        UsageError: another number of layers, or another width.
    """
    sizes = [
        (model.config.num_hidden_layers, model.config.hidden_size) for model in (student, teacher)
    ]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"the student has {sizes[0][0]} layers of width {sizes[0][1]}, the teacher"
            f" {sizes[1][0]} of {sizes[1][1]}: their layers cannot be matched",
            remedy="leave out --layer-steps and --layer-weight",
        )
