"""The method ``mlakit``, second half: surveyed layers, cut at the ranks that were decided on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from mlakit.conversion import closed_form
from mlakit.conversion.adapt import own_heads
from mlakit.conversion.calibrate import layer_weights
from mlakit.conversion.factor import Tensors
from mlakit.conversion.plan import ConversionPlan
from mlakit.conversion.survey import Survey
from mlakit.conversion.transmla import LayerResult


class Fit:
    """One compress conversion in progress.

    Args:
        survey: of the source, completed.
        plan: the rank of each layer.
    """

    def __init__(self, survey: Survey, plan: ConversionPlan) -> None:
        self.survey, self.plan = survey, plan

    def layers(self, done: Callable[[int], bool]) -> Iterator[LayerResult]:
        """Converts every layer that is not done yet, in order."""
        count = len(self.plan.layers)
        for index in range(count):
            self.survey.progress("convert", index, count)
            if not done(index):
                yield index, *self._cut(index)
        self.survey.progress("convert", count, count)

    def _cut(self, index: int) -> tuple[Tensors, dict[str, Any]]:
        """The layer's tensors at its rank, and what is known of it."""
        reader, has = self.survey.reader, self.plan.goal.has
        found = self.survey.layer(index)
        low_rank = found.axes.cut(self.plan.layers[index].kv_lora_rank or 0)
        facts = {**found.facts, "kept": low_rank.kept}
        variance = max(facts.pop("variance"), 1e-30)
        if has("downstream"):
            facts["predicted_kl"] = facts["rope_kl"] + low_rank.lost / 2
        elif has("metric"):
            facts["predicted_error"] = facts["rope_error"] + low_rank.lost / variance
        weights, spec = layer_weights(reader, index), reader.spec.layers[index].absorbed
        tensors = closed_form.latent_tensors(weights, spec, found.rope, low_rank)
        return own_heads(tensors, weights, self.plan.layers[index]), facts
