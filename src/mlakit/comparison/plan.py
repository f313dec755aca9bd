"""What a comparison will measure, decided before any weight is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlakit.baselines import METHODS, Method, Setting, Variant
from mlakit.comparison import latent
from mlakit.errors import UsageError
from mlakit.reporting.comparison import MethodEntry
from mlakit.spec import ModelSpec

BUDGETS = (0.5, 0.25, 0.125)
"""Shares of the source's own cache, beside all of it."""

Steps = tuple[tuple[Method, tuple[Setting, ...]], ...]

ORIGINAL = Method(
    "original",
    "original",
    "original",
    "the model as it is",
    "Nothing is changed.",
    lambda spec, budgets: [Setting("100 %", 1.0)],
    lambda bench, share: Variant(bench.source.model, needs_queries=True),
)


@dataclass(frozen=True)
class Plan:
    """Methods with their settings.

    Attributes:
        budgets: shares of the source's cache, descending.
        steps: every method and what of it is measured, the original first.
    """

    budgets: tuple[float, ...]
    steps: Steps

    @property
    def entries(self) -> list[MethodEntry]:
        """The methods as reports introduce them."""
        return [
            MethodEntry(
                name=m.name, title=m.title, family=m.family, source=m.source, differs=m.differs
            )
            for m, _ in self.steps
        ]


def make_plan(
    spec: ModelSpec,
    *,
    methods: Sequence[str] | None,
    budgets: Sequence[float],
    train_steps: int = 0,
) -> Plan:
    """Chooses methods and settings.

    Args:
        spec: the model.
        methods: by name; all that take no many minutes if None, trained ones where there are steps.
        budgets: shares of its cache.
        train_steps: of methods that exist only trained; their settings name them.

    Raises:
        UsageError: an unknown method, one that needs steps, or a budget that is no share.
    """
    for budget in budgets:
        if not 0 < budget <= 1:
            raise UsageError(
                f"a budget of {budget:g} is not a share of the cache",
                remedy="give shares between 0 and 1: 0.5,0.25,0.125",
            )
    known = {method.name: method for method in (*latent.METHODS, *METHODS)}
    usual = [name for name, m in known.items() if not m.slow and (train_steps or not m.trained)]
    names = list(dict.fromkeys(methods if methods is not None else usual))
    for name in names:
        if name not in known:
            raise UsageError(f"there is no method {name!r}", remedy=f"known: {', '.join(known)}")
        if known[name].trained and not train_steps:
            raise UsageError(
                f"{name} exists only trained", remedy="add --train-steps 200, or leave it out"
            )
    shares = tuple(sorted(set(budgets), reverse=True))
    chosen = (ORIGINAL, *(known[name] for name in names))
    return Plan(shares, tuple((m, _settings(m, spec, shares, train_steps)) for m in chosen))


def _settings(
    method: Method, spec: ModelSpec, shares: Sequence[float], steps: int
) -> tuple[Setting, ...]:
    """The doses of a method, with the steps they are trained for."""
    found = method.settings(spec, shares)
    if method.trained:
        found = [Setting(f"{item.label}, {steps:,} steps", item.value) for item in found]
    return tuple(found)


def identity(parts: Mapping[str, object]) -> str:
    """A hash of everything that a point depends on beside its method and setting."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
