"""Model families: how each spells its config and its tensors, one row per family."""

from mlakit.families.model import (
    beyond_last_layer,
    convertible,
    read_model,
    rope_parameters,
    tensor_shapes,
    with_ranks,
)
from mlakit.families.rows import FAMILIES, Family

__all__ = [
    "FAMILIES",
    "Family",
    "beyond_last_layer",
    "convertible",
    "read_model",
    "rope_parameters",
    "tensor_shapes",
    "with_ranks",
]
