"""The tokenizer of a result opens as the source's does."""

from __future__ import annotations

import json
from pathlib import Path

from mlakit.checkpoint import write_json_atomic


def name_tokenizer_class(source: Path, folder: Path) -> None:
    """Names the class that transformers opens the source's tokenizer with, where it differs.

    For some families transformers goes by ``model_type`` and ignores ``tokenizer_class``; the
    result's own ``model_type`` would then get another tokenizer, which cuts text differently.
    """
    from transformers import AutoTokenizer

    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    try:
        opened = type(AutoTokenizer.from_pretrained(source)).__name__
    except Exception:  # a source may lack a tokenizer that works, and so may its conversion
        return
    if opened == "TokenizersBackend":
        opened = "PreTrainedTokenizerFast"  # the same class, under the name every version knows
    config = json.loads(path.read_text(encoding="utf-8"))
    if str(config.get("tokenizer_class")).removesuffix("Fast") != opened.removesuffix("Fast"):
        write_json_atomic(path, {**config, "tokenizer_class": opened})
