"""Attention over a latent cache: tensors in, tensors out.

This room imports torch alone and is useful on its own. ``mla_decode`` is the operator.
"""

from __future__ import annotations

from mlakit.ops.decode import mla_decode

__all__ = ["mla_decode"]
