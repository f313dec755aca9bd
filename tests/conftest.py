"""Fixtures every test file may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real checkpoints and texts beside the repository; skips where it is absent."""
    default = Path(__file__).resolve().parents[1].parent / "shared"
    folder = Path(os.environ.get("MLAKIT_SHARED", default))
    if not (folder / "models").is_dir():
        pytest.skip(f"no real checkpoints at {folder} (set MLAKIT_SHARED)")
    return folder
