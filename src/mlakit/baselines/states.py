"""What needs training from scratch or nearly so: its size by account, and no score.

A model of the same depth and width is assumed, in the dtype of the source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mlakit.reporting.comparison import Sized
from mlakit.spec import ModelSpec

MAMBA_STATE, MAMBA_KERNEL, MAMBA_EXPAND = 16, 4, 2
RWKV_ROWS = 5
YOCO_WINDOW = 1024


@dataclass(frozen=True)
class Architecture:
    """A kind of model whose cache is counted, not measured.

    Attributes:
        nbytes: of one sequence, from the source's spec, the tokens and the bytes per number.
    """

    name: str
    title: str
    source: str
    note: str
    nbytes: Callable[[ModelSpec, int, int], int]


def linear_bytes(spec: ModelSpec, length: int, itemsize: int) -> int:
    """A d x d_v state and a normaliser of d per query head, in float32, whatever the length."""
    heads = ((x.num_attention_heads, x.head_dim, x.value_dim) for x in spec.layers)
    return sum(4 * count * dim * (value + 1) for count, dim, value in heads)


def rwkv_bytes(spec: ModelSpec, length: int, itemsize: int) -> int:
    """Five rows of the hidden size per layer: two shifted inputs, numerator, denominator, maximum.

    The last three are float32.
    """
    return len(spec.layers) * spec.hidden_size * (2 * itemsize + 3 * 4)


def mamba_bytes(spec: ModelSpec, length: int, itemsize: int) -> int:
    """State and convolution of an inner width of twice the hidden size."""
    inner = MAMBA_EXPAND * spec.hidden_size
    return len(spec.layers) * inner * (MAMBA_STATE + MAMBA_KERNEL) * itemsize


def yoco_window(spec: ModelSpec) -> int:
    """Of the layers below: a quarter of the context, at most 1,024."""
    return min(YOCO_WINDOW, spec.max_position_embeddings // 4)


def yoco_bytes(spec: ModelSpec, length: int, itemsize: int) -> int:
    """One global cache for the upper half, a window in each layer of the lower half."""
    row = spec.layers[0].cache_width * itemsize
    lower = len(spec.layers) // 2
    return row * (length + lower * min(length, YOCO_WINDOW))


ARCHITECTURES = (
    Architecture(
        "linear-attention", "linear attention", "arXiv 2006.16236",
        "needs training: the feature map replaces softmax in every layer", linear_bytes,
    ),
    Architecture(
        "rwkv", "RWKV-4", "arXiv 2305.13048", "needs training from scratch or distillation",
        rwkv_bytes,
    ),
    Architecture(
        "mamba", "Mamba", "arXiv 2312.00752", "needs training from scratch", mamba_bytes,
    ),
    Architecture(
        "yoco", "YOCO", "arXiv 2405.05254",
        f"needs training from scratch; windows of {YOCO_WINDOW:,} tokens in the lower half",
        yoco_bytes,
    ),
)  # fmt: skip


def sized(spec: ModelSpec, length: int, itemsize: int, own: float) -> list[Sized]:
    """Every architecture at a length.

    Args:
        spec: the source.
        length: tokens of the sequence.
        itemsize: bytes per cached number of the source's dtype.
        own: bytes per token that the source caches.
    """
    return [
        Sized(
            title=each.title,
            source=each.source,
            note=each.note,
            nbytes=each.nbytes(spec, length, itemsize),
            length=length,
            percent_of_own=100 * each.nbytes(spec, length, itemsize) / (own * length),
        )
        for each in ARCHITECTURES
    ]
