"""The method ``mlakit``, second half: surveyed layers, cut at the sizes that were decided on."""

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
        plan: the rank of each layer, and the rotary width.
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
        target, spec = self.plan.layers[index], reader.spec.layers[index].absorbed
        found = self.survey.layer(index, target.qk_rope_head_dim or 0)
        weights = layer_weights(reader, index)
        low_rank = found.axes.cut(
            closed_form.unrotated_keys(weights, found.rope.kept),
            weights.values,
            target.kv_lora_rank or 0,
            bias=spec.kv_bias and weights.normed is None,
        )
        facts = {**found.facts, "kept": low_rank.kept}
        variance = max(facts.pop("variance"), 1e-30)
        if has("downstream"):
            facts["predicted_kl"] = facts["rope_kl"] + low_rank.lost / 2
        elif has("metric"):
            facts["predicted_error"] = facts["rope_error"] + low_rank.lost / variance
        tensors = closed_form.latent_tensors(
            weights, spec, found.rope, low_rank, query_up=target.query_up
        )
        return own_heads(tensors, weights, target), facts
