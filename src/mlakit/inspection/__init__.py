"""``inspect``: what a checkpoint costs now, and as MHA, MQA and latent attention."""

from mlakit.inspection.measure import Inspection, LayerGroup, Variant, inspect
from mlakit.inspection.view import print_inspection

__all__ = ["Inspection", "LayerGroup", "Variant", "inspect", "print_inspection"]
