"""Model families: how each spells its config and its tensors, one row per family."""

from mlakit.families.model import convertible, read_model, rope_parameters, tensor_shapes
from mlakit.families.rows import FAMILIES, Family

__all__ = ["FAMILIES", "Family", "convertible", "read_model", "rope_parameters", "tensor_shapes"]
