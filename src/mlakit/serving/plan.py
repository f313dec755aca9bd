"""What a cache holds: pages, tokens, requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlakit.account import ITEMSIZE, cache_bytes, parse_bytes
from mlakit.checkpoint import Checkpoint, open_checkpoint
from mlakit.errors import MlakitError, UsageError
from mlakit.families import read_model
from mlakit.families.model import tensor_shapes
from mlakit.spec import BLOCK_SIZE, AttentionSpec, CacheKind, ModelSpec

CONVERTED = "mla_"
"""What the model_type of a converted checkpoint begins with."""


@dataclass(frozen=True)
class CachePlan:
    """A pool of pages, and what fits in it.

    Attributes:
        model: its name.
        weight_bytes: of the checkpoint.
        bytes_per_token: of cache, all layers together.
        block_size: tokens per page.
        pages: in the pool.
        cache_bytes: of all pages.
        tokens: that fit at once, each counted once however many requests share it.
        request_tokens: most tokens of one request.
        requests: of that length that fit at once.
        max_batch_size: most requests that run at once.
    """

    model: str
    weight_bytes: int
    bytes_per_token: int
    block_size: int
    pages: int
    cache_bytes: int
    tokens: int
    request_tokens: int
    requests: int
    max_batch_size: int

    @classmethod
    def of(
        cls,
        model: str,
        weight_bytes: int,
        page_bytes: int,
        pages: int,
        request_tokens: int,
        max_batch_size: int,
    ) -> CachePlan:
        """The plan of so many pages."""
        return cls(
            model=model,
            weight_bytes=weight_bytes,
            bytes_per_token=page_bytes // BLOCK_SIZE,
            block_size=BLOCK_SIZE,
            pages=pages,
            cache_bytes=pages * page_bytes,
            tokens=pages * BLOCK_SIZE,
            request_tokens=request_tokens,
            requests=pages // -(-request_tokens // BLOCK_SIZE),
            max_batch_size=max_batch_size,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def plan_cache(
    model: str | Path,
    *,
    name: str,
    max_batch_size: int,
    cache_memory: str | None,
    max_tokens: int | None,
    cache_format: CacheKind | None,
    dtype: str | None,
    device: str,
) -> CachePlan:
    """What serving a checkpoint would take, from its config and headers.

    Args:
        model: folder or hub id of a converted checkpoint.
        name: to call it by.
        max_batch_size: most requests that run at once.
        cache_memory: bytes or a share, see ``pool_bytes``.
        max_tokens: of one request; the model's context at most, and by default.
        cache_format: of the latents; the checkpoint's own by default.
        dtype: of weights and cache; the checkpoint's own by default.
        device: whose free memory counts.

    Raises:
        UsageError: the model was not converted, or not one request fits.
        MlakitError: files are missing or do not hold what the config says.
    """
    checkpoint = open_checkpoint(model)
    spec = read_model(checkpoint.config)
    if not spec.model_type.startswith(CONVERTED):
        raise UsageError(
            f"{model} is no converted checkpoint: its model_type is '{spec.model_type}'",
            remedy="mlakit convert MODEL --equal-cache, which is exact and costs no bytes",
        )
    _require_tensors(checkpoint, spec)
    dtype = dtype or spec.dtype
    if dtype not in ITEMSIZE:
        raise UsageError(f"there is no dtype {dtype!r}", remedy="use float32, bfloat16 or float16")
    weights = checkpoint.nbytes_total * ITEMSIZE[dtype] // ITEMSIZE[spec.dtype]
    request = min(max_tokens or spec.max_position_embeddings, spec.max_position_embeddings)
    layers = spec.layers
    if cache_format is not None:
        layers = tuple(replace(layer, cache_format=cache_format) for layer in layers)
    page = page_bytes(layers, ITEMSIZE[dtype])
    enough = max_batch_size * -(-request // BLOCK_SIZE) * page
    pool = pool_bytes(cache_memory, device, taken=weights)
    if pool is None:
        pool = min(enough, pool_bytes(DEFAULT_SHARE, device, taken=weights) or enough)
    plan = CachePlan.of(name, weights, page, pool // page, request, max_batch_size)
    if not plan.requests:
        raise UsageError(
            f"the cache holds {plan.tokens} tokens, and one request may have {request}",
            remedy="give a larger --cache-memory or a smaller --max-tokens",
        )
    return plan


DEFAULT_SHARE = "0.8"
"""The engine's own, of the memory that is free beside the weights."""


def page_bytes(layers: Sequence[AttentionSpec], itemsize: int) -> int:
    """Bytes of one page in all layers."""
    return cache_bytes(layers, 1, BLOCK_SIZE, itemsize, BLOCK_SIZE)


def pool_bytes(cache_memory: str | None, device: str, taken: int = 0) -> int | None:
    """Bytes of cache that ``2GiB`` or a share like ``0.5`` or ``50%`` of the free memory mean.

    Args:
        cache_memory: as it is written; None is nobody's wish, and stays None.
        device: whose free memory a share is of.
        taken: bytes of it that weights will take.

    Raises:
        UsageError: it is neither, or the system does not say how much memory is free.
    """
    if cache_memory is None:
        return None
    share = share_of(cache_memory)
    if share is None:
        return parse_bytes(cache_memory)
    from mlakit.conversion.samples import free_memory

    free = free_memory(device)
    if free is None:
        raise UsageError(
            f"this system does not say how much memory is free, so {cache_memory} of it is unknown",
            remedy="give bytes: --cache-memory 2GiB",
        )
    return int(max(0, free - taken) * share)


def share_of(text: str) -> float | None:
    """A share of 1 from ``0.5`` or ``50%``; None for what is no share."""
    percent = text.strip().endswith("%")
    try:
        share = float(text.strip().removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        return None
    if not percent and share > 1:
        return None
    if not 0 < share <= 1:
        raise UsageError(f"{text} is no share of the memory", remedy="write 0.5, 50% or 2GiB")
    return share


def _require_tensors(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    wrong = [
        name
        for name, shape in tensor_shapes(spec).items()
        if name not in checkpoint.shapes or checkpoint.shapes[name] != shape
    ]
    if wrong:
        raise MlakitError(
            f"{len(wrong)} tensors are missing or of another shape than config.json says, the"
            f" first {wrong[0]}",
            remedy="convert or download it again",
        )
