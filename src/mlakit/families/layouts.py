"""From the tensors of an attention layer as a family stores them to one standard order of rows.

In the standard layer q, k and v are projections of their own, and dimensions j and j + d/2 of a
query or key head turn together: the rotated pairs first in both halves, those that never turn
last. Reordering the rows of q and k alike changes no score. No torch here: tensors are only cut
and indexed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlakit.spec import AttentionSpec

FUSED = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Layout:
    """How a family stores the projections of attention.

    Attributes:
        fused: q, k and v are one projection, ``qkv_proj``, in this order.
        interleaved: dimensions 2j and 2j + 1 turn together, instead of halves.
        latent: attention is latent already. Queries and what is cached are made as before, so the
            projection to the cached row becomes ``kv_proj`` and ``kv_norm`` of the standard
            layer; nothing is reordered in it.
    """

    fused: bool = False
    interleaved: bool = False
    latent: bool = False

    def stored_shapes(self, spec: AttentionSpec) -> dict[str, tuple[int, ...]]:
        """The layer's tensors as they lie on disk, named below ``self_attn.``."""
        shapes = spec.tensor_shapes()
        if not self.fused or spec.kv_lora_rank is not None:
            return shapes
        parts = {kind: [shapes.pop(f"{name}.{kind}", None) for name in FUSED] for kind in KINDS}
        for kind, found in parts.items():
            given = [shape for shape in found if shape is not None]
            if given:
                shapes[f"qkv_proj.{kind}"] = (sum(s[0] for s in given), *given[0][1:])
        return shapes

    def unchanged(self, spec: AttentionSpec) -> set[str]:
        """The stored tensors that the standard layer has too, under the same name, bit for bit."""
        same = set(self.stored_shapes(spec)) & set(spec.tensor_shapes())
        if self.latent:
            return {name for name in same if not name.startswith("kv_")}
        return same if self.order(spec) is None else same - REORDERED

    def standard(self, tensors: Mapping[str, Any], spec: AttentionSpec) -> dict[str, Any]:
        """The tensors of a stored layer as those of the standard one.

        Args:
            tensors: named below ``self_attn.``; anything with a length that can be cut and indexed.
            spec: the layer.
        """
        found = dict(tensors)
        if self.latent:
            return {_renamed(name): tensor for name, tensor in found.items()}
        if self.fused:
            sizes = {name: spec.tensor_shapes()[f"{name}.weight"][0] for name in FUSED}
            for kind in KINDS & {name.removeprefix("qkv_proj.") for name in found}:
                whole, start = found.pop(f"qkv_proj.{kind}"), 0
                for name, rows in sizes.items():
                    found[f"{name}.{kind}"] = whole[start : start + rows]
                    start += rows
        order = self.order(spec)
        if order is None:
            return found
        for name in REORDERED & set(found):
            heads = len(found[name]) // spec.head_dim
            found[name] = found[name][
                [h * spec.head_dim + row for h in range(heads) for row in order]
            ]
        return found

    def order(self, spec: AttentionSpec) -> list[int] | None:
        """For each dimension of a standard head the stored one; None where they are the same.

        Of a cached row (``AttentionSpec.absorbed``) it is the last dimensions that turn.
        """
        dim, turning = spec.head_dim, spec.rope.dim if spec.rope else 0
        stored = list(range(dim))
        if self.latent:
            stored = stored[dim - turning :] + stored[: dim - turning]
        turns, still = stored[:turning], stored[turning:]
        first, second = turns[: turning // 2], turns[turning // 2 :]
        if self.interleaved:
            first, second = turns[::2], turns[1::2]
        half = len(still) // 2
        order = first + still[:half] + second + still[half:]
        return None if order == list(range(dim)) else order


def _renamed(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    names = {"kv_a_proj_with_mqa": "kv_proj", "kv_a_layernorm": "kv_norm"}
    return f"{names.get(module, module)}.{kind}"


KINDS = {"weight", "bias"}
REORDERED = {f"{name}.{kind}" for name in ("q_proj", "k_proj") for kind in KINDS} | {
    "q_norm.weight",
    "k_norm.weight",
}
