"""What a model card has to say of where a checkpoint comes from: base model and licence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlakit.checkpoint.reading import Checkpoint

FIELDS = ("license", "license_name", "license_link", "language")
"""Of a card's front matter, what holds for everything that is made of the model."""


def origin(checkpoint: Checkpoint) -> dict[str, Any]:
    """Front matter of a card for what is made of a checkpoint.

    Args:
        checkpoint: the source; its ``README.md`` names the licence, if it has one.

    Returns:
        ``base_model`` where the source has a hub id, and what its own card says of ``FIELDS``.
    """
    found: dict[str, Any] = {}
    if checkpoint.revision is not None:
        found["base_model"] = checkpoint.source
    card = _front_matter(checkpoint.path / "README.md")
    return found | {name: card[name] for name in FIELDS if card.get(name)}


def _front_matter(path: Path) -> dict[str, Any]:
    """The YAML block on top of a card; nothing where there is none that can be read."""
    from huggingface_hub import metadata_load

    if not path.is_file():
        return {}
    try:
        return metadata_load(path) or {}
    except Exception:  # a card is written by hand: a broken one is no reason to stop
        return {}


def front_matter(fields: dict[str, Any]) -> list[str]:
    """The lines of a card's YAML block."""
    from huggingface_hub import ModelCardData

    return ["---", *ModelCardData(**fields).to_yaml().splitlines(), "---"]
