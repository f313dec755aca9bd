"""Cache bytes from the storage a filled cache really holds, beside what the account predicts."""

from __future__ import annotations

import torch

from mlakit.account import as_mha, cache_bytes, cache_bytes_per_token
from mlakit.evaluation.subject import Subject
from mlakit.nn.hf import attention_specs, cache_nbytes, new_cache
from mlakit.reporting.schema import CacheSize, Memory, ModelSummary
from mlakit.spec import BLOCK_SIZE


def whole_pages(length: int) -> int:
    """The largest multiple of the page size up to ``length``; shorter lengths stay.

    On it a paged and an unpaged cache are compared without the rounding of the last page.
    """
    return length // BLOCK_SIZE * BLOCK_SIZE or length


@torch.inference_mode()
def measure_cache(subject: Subject, length: int, batch: int = 1) -> CacheSize:
    """Fills a cache of ``batch`` sequences with ``length`` tokens and weighs it, in bytes."""
    model = subject.model
    ids = torch.ones(batch, length, dtype=torch.long, device=model.device)
    cache = new_cache(model, batch, length)
    model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    specs = attention_specs(model)
    pages = BLOCK_SIZE if specs[0].kind == "mla" else None
    itemsize = model.dtype.itemsize
    return CacheSize(
        measured_bytes=cache_nbytes(cache),
        accounted_bytes=cache_bytes(specs, batch, length, itemsize, block_size=pages),
    )


def measure_memory(
    source: Subject, result: Subject | None, *, length: int, batch: int = 1
) -> Memory:
    """Cache bytes of one model or two at the same length and batch."""
    return Memory(
        length=length,
        batch=batch,
        source=measure_cache(source, length, batch),
        result=None if result is None else measure_cache(result, length, batch),
    )


def summarise_models(
    source: Subject, result: Subject | None, memory: Memory
) -> tuple[ModelSummary, ModelSummary | None]:
    """Both models with bytes per token, as a share of the source's own cache and of its MHA.

    A converted model that is measured alone is held against the cache of the model it was
    converted from.
    """
    tokens = memory.length * memory.batch
    mha = cache_bytes_per_token(
        [as_mha(spec) for spec in attention_specs(source.model)], source.model.dtype.itemsize
    )
    own = memory.source.measured_bytes / tokens
    if result is None or memory.result is None:
        return _summary(source, own, _original_bytes(source) or own, mha), None
    return _summary(source, own, own, mha), _summary(
        result, memory.result.measured_bytes / tokens, own, mha
    )


def _original_bytes(subject: Subject) -> int | None:
    """Cache bytes per token before the conversion; None for a model that was not converted."""
    provenance = getattr(subject.model.config, "mlakit", None)
    if not provenance:
        return None
    layer = provenance["source_attention"]
    width = 2 * layer["num_key_value_heads"] * layer["head_dim"]
    return width * subject.model.config.num_hidden_layers * subject.model.dtype.itemsize


def _summary(subject: Subject, bytes_per_token: float, own: float, mha: float) -> ModelSummary:
    specs = attention_specs(subject.model)
    parameters = list(subject.model.parameters())
    kinds = dict.fromkeys(f"{s.kind} {s.mla_form}" if s.mla_form else s.kind for s in specs)
    return ModelSummary(
        name=subject.name,
        attention=" + ".join(kinds),
        layers=len(specs),
        parameters=sum(p.numel() for p in parameters),
        weight_bytes=sum(p.nbytes for p in parameters),
        dtype=subject.dtype,
        context=subject.context,
        fingerprint=subject.fingerprint,
        bytes_per_token=bytes_per_token,
        percent_of_own=100 * bytes_per_token / own,
        percent_of_mha=100 * bytes_per_token / mha,
    )
