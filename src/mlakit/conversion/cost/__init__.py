"""What a conversion will need: peak memory, disk and time, from its plan alone. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlakit.conversion.amounts import SENSITIVITY_TOKENS
from mlakit.conversion.cost import operations
from mlakit.conversion.cost.dimensions import Dimensions, dimensions
from mlakit.conversion.cost.memory import footprint, peak
from mlakit.conversion.cost.operations import Work
from mlakit.conversion.rotary_sizes import freqfold_candidates
from mlakit.spec import ModelSpec

if TYPE_CHECKING:
    from mlakit.conversion.plan import ConversionPlan


@dataclass(frozen=True)
class Estimate:
    """What the run will need: peak memory and disk in bytes, time in seconds."""

    memory_bytes: int
    disk_bytes: int
    seconds: float


def forecast_cost(plan: ConversionPlan, model: ModelSpec, device: str) -> Estimate:
    """Peak memory of the largest phase, the result and work files on disk, and the time."""
    size, goal = dimensions(plan, model, device), plan.goal
    survey = goal.method == "mlakit" and plan.calibration is not None
    refined = plan.calibration is not None and goal.steps > 0
    sensed = goal.has("downstream") or (refined and goal.weighs_predictions)
    phases = footprint(size, survey=survey, sensed=sensed, refined=refined)
    new = [tensor for tensor in plan.tensors if not tensor.copied]
    last = sum(tensor.nbytes for tensor in new if tensor.shard == plan.shards)
    work, once = Work(), Work()
    if plan.calibration is None:
        work += operations.equal_cache(size)
    else:
        folds = 0 if survey else _folds(plan)
        once += operations.predictions(size, sensed, folds)
        work += operations.writing(size)
        if survey:
            work += operations.survey(size, passes=1 if goal.has("frequencies") else 2)
        else:
            work += operations.moments(size, folds)
        if sensed:
            work += operations.sensitivity(size)
        if refined:
            work += operations.refinement(size, goal.steps)
    disk = plan.nbytes + _work_files(size, survey=survey, sensed=sensed, refined=refined)
    seconds = operations.seconds(work.times(size.layers) + once, size, device)
    return Estimate(max(peak(phases), last), disk, round(seconds, 1))


def _folds(plan: ConversionPlan) -> int:
    if plan.goal.freqfold != "auto":
        return 0
    rope = plan.target.qk_rope_head_dim or 2
    return len(freqfold_candidates(plan.source_layer.rotary_dim, rope))


def _work_files(size: Dimensions, *, survey: bool, sensed: bool, refined: bool) -> int:
    """Bytes beside the result while it is made."""
    states, keys = 4 * size.hidden * size.tokens, size.width // 2
    found = 2 * states + 8 * keys**2 * size.layers
    if survey:
        found += 8 * (size.width**2 + keys**2) * len(size.ropes) * size.layers
    if sensed:
        tokens = min(size.tokens, SENSITIVITY_TOKENS)
        found += 4 * size.hidden * ((size.layers + 2) * tokens + size.layers * size.hidden)
    return found + (3 * states if refined else 0)
