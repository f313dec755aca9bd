"""What a cache holds: pages, tokens, requests."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlakit.account import ITEMSIZE, NO_LIMIT, cache_bytes, parse_bytes
from mlakit.checkpoint import Checkpoint, open_checkpoint
from mlakit.errors import MlakitError, UsageError
from mlakit.families import read_model
from mlakit.families.model import tensor_shapes
from mlakit.inspection.measure import format_bytes
from mlakit.serving.options import DEFAULTS, SHARE_OF_MEMORY, ServeOptions
from mlakit.spec import BLOCK_SIZE, ModelSpec

CONVERTED = "mla_"
"""What the model_type of a converted checkpoint begins with."""


@dataclass(frozen=True)
class CachePlan:
    """A pool of pages, and what fits in it.

    Attributes:
        model: its name.
        weight_bytes: of the checkpoint.
        pages: in the pool, of 64 tokens each.
        cache_bytes: of all pages.
        request_tokens: most tokens of one request: what it may have, and the pool can hold.
        max_batch_size: most requests that run at once.
    """

    model: str
    weight_bytes: int
    pages: int
    cache_bytes: int
    request_tokens: int
    max_batch_size: int

    @property
    def bytes_per_token(self) -> int:
        """Of cache, all layers together."""
        return self.cache_bytes // self.tokens

    @property
    def tokens(self) -> int:
        """That fit at once, each counted once however many requests share it."""
        return self.pages * BLOCK_SIZE

    @property
    def requests(self) -> int:
        """Of full length that fit at once."""
        return self.pages // -(-self.request_tokens // BLOCK_SIZE)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        derived = ("bytes_per_token", "tokens", "requests")
        return asdict(self) | {name: getattr(self, name) for name in derived}

    def __str__(self) -> str:
        """Four lines for a terminal."""
        rows = (
            ("model", f"{self.model}, weights {format_bytes(self.weight_bytes)}"),
            (
                "cache",
                f"{format_bytes(self.cache_bytes)}: {self.pages:,} pages of {BLOCK_SIZE} tokens,"
                f" {self.bytes_per_token:,} bytes per token",
            ),
            ("fits", f"{self.tokens:,} tokens: {self._fitting()}"),
            ("at once", f"{self.max_batch_size:,} are written, the others wait"),
        )
        return "\n".join(f"{name:<9}{words}" for name, words in rows)

    def _fitting(self) -> str:
        requests = "request" if self.requests == 1 else "requests"
        return f"{self.requests:,} {requests} of {self.request_tokens:,} tokens"


def plan_cache(model: str | Path, options: ServeOptions) -> CachePlan:
    """What serving a checkpoint would take, from its config and headers.

    Args:
        model: folder or hub id of a converted checkpoint.
        options: how it would be served.

    Raises:
        UsageError: the model was not converted, or not one page fits.
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
    dtype = options.dtype or spec.dtype
    if dtype not in ITEMSIZE:
        raise UsageError(f"there is no dtype {dtype!r}", remedy="use float32, bfloat16 or float16")
    weights = checkpoint.nbytes_total * ITEMSIZE[dtype] // ITEMSIZE[spec.dtype]
    batch = options.max_batch_size or DEFAULTS["max_batch_size"]
    request = min(options.max_tokens or NO_LIMIT, spec.max_position_embeddings)
    layers = spec.layers
    if options.cache_format is not None:
        layers = tuple(replace(layer, cache_format=options.cache_format) for layer in layers)
    page = cache_bytes(layers, 1, BLOCK_SIZE, ITEMSIZE[dtype], BLOCK_SIZE)
    device = device_of(options)
    pool = pool_bytes(options.cache_memory, device, taken=weights)
    if pool is None:  # as the engine chooses
        pool = batch * -(-request // BLOCK_SIZE) * page
        free = free_bytes(device, weights)
        pool = pool if free is None else min(pool, int(SHARE_OF_MEMORY * free))
    pages = pool // page
    if not pages:
        raise UsageError(
            f"a cache of {pool} bytes holds no page of {BLOCK_SIZE} tokens, which takes {page}",
            remedy="give more: --cache-memory 2GiB",
        )
    request = min(request, pages * BLOCK_SIZE)
    return CachePlan(options.called(model), weights, pages, pages * page, request, batch)


def device_of(options: ServeOptions) -> str:
    """The device that was asked for, or a GPU if there is one."""
    if options.device is not None:
        return options.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


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
    free = free_bytes(device, taken)
    if free is None:
        raise UsageError(
            f"this system does not say how much memory is free, so {cache_memory} of it is unknown",
            remedy="give bytes: --cache-memory 2GiB",
        )
    return int(free * share)


def free_bytes(device: str, taken: int) -> int | None:
    """Bytes that are free on a device once ``taken`` ones are used; None where nobody knows."""
    from mlakit.conversion.samples import free_memory

    free = free_memory(device)
    return None if free is None else max(0, free - taken)


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
