"""The model under measurement: a name, the model itself and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mlakit.checkpoint import open_checkpoint
from mlakit.errors import MlakitError, UsageError
from mlakit.nn.hf import load, register
from mlakit.spec import CacheKind


class Subject(NamedTuple):
    """A loaded model under the name that reports print.

    Attributes:
        fingerprint: hash of the checkpoint it was read from, None when it was built in memory.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str | None = None

    @property
    def context(self) -> int:
        """Longest sequence, in tokens, that the model was made for."""
        return int(self.model.config.max_position_embeddings)

    @property
    def dtype(self) -> str:
        """Name of the weights' dtype, e.g. ``bfloat16``."""
        return str(self.model.dtype).removeprefix("torch.")


ModelLike = str | Path | tuple[str, PreTrainedModel, PreTrainedTokenizerBase] | Subject
"""What every measurement accepts: a folder, a hub id, or (name, model, tokenizer)."""


def open_subject(
    model: ModelLike,
    *,
    dtype: torch.dtype | str | None = None,
    device: str = "cpu",
    cache_format: CacheKind | None = None,
) -> Subject:
    """Loads a folder or hub id; takes a model that is already loaded as it is.

    Args:
        model: a folder, a hub id, or (name, model, tokenizer).
        dtype: dtype to load in; the checkpoint's own by default.
        device: device to load on.
        cache_format: quantises the cached latents of a converted model, see ``load``.
    """
    if not isinstance(model, str | Path):
        return Subject(*model)
    checkpoint = open_checkpoint(model)
    path = checkpoint.download()
    register()  # or transformers warns that it does not know a converted folder's config
    tokenizer = open_tokenizer(path)
    loaded = load(path, dtype=dtype, device=device, cache_format=cache_format)
    return Subject(Path(model).name, loaded, tokenizer, checkpoint.fingerprint)


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint's folder.

    Raises:
        MlakitError: there is none that can be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # a damaged tokenizer raises whatever its parser does
        reason = str(error).splitlines() or [type(error).__name__]
        raise MlakitError(
            f"{folder} has no tokenizer that can be loaded: {reason[0].rstrip(' :')}",
            remedy="copy the tokenizer files of the source into that folder",
        ) from error


def open_pair(
    source: ModelLike,
    result: ModelLike | None,
    *,
    dtype: torch.dtype | str | None = None,
    device: str = "cpu",
    cache_format: CacheKind | None = None,
) -> tuple[Subject, Subject | None]:
    """Opens a source and, where there is one, its result, whose cache the format is for then."""
    if result is None:
        alone = open_subject(source, dtype=dtype, device=device, cache_format=cache_format)
        return alone, None
    ours = open_subject(source, dtype=dtype, device=device)
    return ours, open_subject(result, dtype=dtype, device=device, cache_format=cache_format)


def require_same_tokens(source: Subject, result: Subject, text: str) -> None:
    """Refuses two models that do not speak the same token ids.

    Raises:
        UsageError: if vocabularies differ in size, or a piece of ``text`` is cut differently.
    """
    sizes = source.model.config.vocab_size, result.model.config.vocab_size
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"{source.name} has {sizes[0]} tokens and {result.name} has {sizes[1]}: "
            "their predictions cannot be compared token by token",
            remedy="compare a model with its own conversion",
        )
    piece = text[:2000]
    ours, theirs = (s.tokenizer(piece, verbose=False)["input_ids"] for s in (source, result))
    if ours != theirs:
        raise UsageError(
            f"the tokenizers of {source.name} and {result.name} cut the same text differently",
            remedy="copy the source's tokenizer files into the result's folder",
        )
