"""What calibration text says about each layer: second moments, and how well a rotation does.

Every statistic of the method follows from ``E[x x^T]`` of a layer's inputs, because queries, keys
and values are linear in them; activations are looked at once and forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mlakit.conversion.adapt import source_weights
from mlakit.conversion.amounts import BATCH_TOKENS
from mlakit.conversion.factor import AttentionWeights, compress_query
from mlakit.conversion.head import Head
from mlakit.conversion.observe import hide, query_blocks
from mlakit.conversion.rotate import Rotation
from mlakit.conversion.stream import LayerReader, run_layer
from mlakit.conversion.windows import held_out_count
from mlakit.errors import MlakitError
from mlakit.spec import AttentionSpec


def split_held_out(windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows statistics are taken from, and the last eighth, at least one, held out."""
    held_out = held_out_count(len(windows))
    return windows[:-held_out], windows[-held_out:]


def batch_size(length: int) -> int:
    """Windows of ``length`` tokens that go through a layer together."""
    return max(1, BATCH_TOKENS // length)


class Moment:
    """``E[x x^T]`` of what a layer's keys are linear in, with a one appended, float64.

    Attach it to a layer, run the layer, read ``value``.

    Args:
        weights: the source layer.
    """

    def __init__(self, weights: AttentionWeights) -> None:
        self.weights = weights
        self._sum: torch.Tensor | None = None
        self._count = 0

    def watch(self, attention: nn.Module) -> None:
        """Sees every input of this attention module from now on."""
        attention.register_forward_pre_hook(self._see, with_kwargs=True)

    @property
    def value(self) -> torch.Tensor:
        """``[D+1, D+1]``."""
        if self._sum is None:
            raise MlakitError("No calibration window went through the layer")
        return self._sum / self._count

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        for x in self.weights.inputs(hidden):
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
            square = x.mT @ x  # of one window, as exact as its factors; their sum is float64
            self._sum = square.double() if self._sum is None else self._sum.add_(square)
            self._count += len(x)


class PartialRope(nn.Module):
    """Attention of the partial-RoPE model: rotated keys shared by all heads, the rest unrotated.

    Stands in for the family's attention module inside its decoder layer. Between the source and
    the compressed model: exact but for the dropped rotation.

    Args:
        weights: the source layer.
        rotation: which components stay rotated.
        spec: the source layer.
        o_proj: the source's output projection.
    """

    def __init__(
        self,
        weights: AttentionWeights,
        rotation: Rotation,
        spec: AttentionSpec,
        o_proj: nn.Module,
    ) -> None:
        super().__init__()
        half = rotation.frequencies + spec.rotary_dim // 2
        self.spec = spec
        self.columns = torch.cat([rotation.frequencies, half])
        self.weights = weights
        rows = compress_query(weights, rotation)
        if weights.normed is None:
            self.query = _linear(rows)
        else:
            self.lift = rows[:, :-1].unflatten(0, (spec.num_attention_heads, -1)).float()
        self.key = _linear(rotation.nope.mT @ (rotation.nope @ weights.keys))
        self.rope = _linear(rotation.rope @ weights.keys)
        self.value = _linear(weights.values)
        self.o_proj = o_proj

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """The block's output ``[B, T, D]``; arguments as the family's attention takes them."""
        dim, groups = self.spec.head_dim, self.spec.num_key_value_heads
        heads, normed = self.spec.num_attention_heads, self.weights.normed

        def split(x: torch.Tensor, count: int) -> torch.Tensor:
            return x.unflatten(-1, (count, -1)).transpose(1, 2)  # [B, heads, T, size]

        def turn(x: torch.Tensor) -> torch.Tensor:
            if self.spec.rope is None:
                return x
            cos, sin = (angle[:, None][..., self.columns] for angle in position_embeddings)
            real, imag = x.chunk(2, -1)
            return x * cos + torch.cat([-imag, real], -1) * sin

        if normed is None:
            query = split(self.query(hidden_states), heads)
        else:
            query = torch.einsum("bhtd,hrd->bhtr", normed.queries(hidden_states), self.lift)
        inputs = self.weights.inputs(hidden_states)
        query, query_rope = query.split([dim, len(self.columns)], -1)
        query = torch.cat([query, turn(query_rope)], -1)
        rope = turn(self.rope(inputs)[:, None]).expand(-1, groups, -1, -1)
        key = torch.cat([split(self.key(inputs), groups), rope], -1)
        value = split(self.value(inputs), groups)
        repeats = heads // groups
        out = attend(
            query,
            key.repeat_interleave(repeats, 1),
            value.repeat_interleave(repeats, 1),
            attention_mask,
            self.spec,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    spec: AttentionSpec,
) -> torch.Tensor:
    """Attention ``[B, H, N, V]`` of a source layer, its scores soft-capped where it does so.

    No ``[N, T]`` of all heads is ever held.

    Args:
        query: ``[B, H, N, K]``.
        key: ``[B, H, T, K]``.
        value: ``[B, H, T, V]``.
        mask: ``[..., N, T]``, what a query sees or what is added; None for a causal one, N = T.
        spec: of the layer.
    """
    scale, cap = spec.softmax_scale, spec.logit_softcap
    if cap is None:
        # Kernels that do not hold all scores want values as wide as keys.
        missing = max(0, query.shape[-1] - value.shape[-1])
        out = functional.scaled_dot_product_attention(
            query,
            key,
            functional.pad(value, (0, missing)),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
        )
        return out[..., : value.shape[-1]]
    parts, (queries, keys) = [], (query.shape[2], key.shape[2])
    for first, last in query_blocks(query.shape[0] * query.shape[1], keys, queries):
        met = last if queries == keys else keys
        scores = query[..., first:last, :] @ key[..., :met, :].mT * (scale / cap)
        seen = None if mask is None else mask[..., first:last, :met]
        weights = hide(torch.tanh(scores) * cap, first, seen).softmax(-1)
        parts.append(weights @ value[..., :met, :])
    return torch.cat(parts, 2)


def layer_weights(reader: LayerReader, index: int) -> AttentionWeights:
    """The float64 projections of a source layer, on the reader's device."""
    return source_weights(reader, index)


def partial_rope_layer(
    reader: LayerReader, index: int, weights: AttentionWeights, rotation: Rotation
) -> Any:
    """The one-layer model of ``LayerReader.layer`` with its attention partially unrotated."""
    model = reader.layer(index)
    layer = model.layers[0]
    spec = reader.spec.layers[index]
    layer.self_attn = PartialRope(weights, rotation, spec, layer.self_attn.o_proj)
    return model


@torch.no_grad()
def partial_rope_perplexity(
    reader: LayerReader,
    windows: torch.Tensor,
    rotation_of: Callable[[int], Rotation],
    on_layer: Callable[[], None],
) -> float:
    """Perplexity of the partial-RoPE model on held-out windows ``[windows, T]``."""
    size = batch_size(windows.shape[1])
    hidden: Sequence[torch.Tensor] = list(reader.embed(windows, size))
    for index in range(reader.spec.num_hidden_layers):
        weights = layer_weights(reader, index)
        model = partial_rope_layer(reader, index, weights, rotation_of(index))
        hidden = list(run_layer(model, hidden, reader.device))
        on_layer()
    head, total = Head(reader), 0.0
    for batch, ids in zip(hidden, windows.split(size), strict=True):
        total += float(head.loss(batch[:, :-1], ids[:, 1:]).sum())
    return math.exp(total / windows[:, 1:].numel())


def _linear(augmented: torch.Tensor) -> nn.Linear:
    """A float32 layer from ``[rows, D+1]``, bias last."""
    rows, columns = augmented.shape
    layer = nn.Linear(columns - 1, rows, device="meta")
    layer.weight = nn.Parameter(augmented[:, :-1].float(), requires_grad=False)
    layer.bias = nn.Parameter(augmented[:, -1].float(), requires_grad=False)
    return layer
