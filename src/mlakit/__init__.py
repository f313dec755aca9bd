"""mlakit: Multi-head Latent Attention for any checkpoint."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Verbs load on first use (PEP 562), so that ``import mlakit`` stays cheap."""
    # Not ``from mlakit import api``: that asks this function for ``api``, without end.
    api = import_module("mlakit.api")
    if name in api.__all__:
        return getattr(api, name)
    raise AttributeError(f"module 'mlakit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(["__version__", *import_module("mlakit.api").__all__])
