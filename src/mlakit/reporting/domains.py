"""Whether texts of different kinds agree about a converted model. Plain Python."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping

FACTOR = 2.0
"""A text whose KL is so many times the usual one was not served by the calibration. Kinds of text
that are calibrated on differ by less (docs/conversion.md), and windows of one text by far less."""


def disagreement(kl: Mapping[str, float], calibrated: Collection[str] = ()) -> str | None:
    """A sentence where held-out texts disagree, or None.

    Args:
        kl: mean KL divergence of the result from the source on each text, nats per token.
        calibrated: the names of those that were calibrated on; all where nobody knows.

    Returns:
        Which texts are above FACTOR times the median of the calibrated ones (of two the lower).
    """
    usual = [value for name, value in kl.items() if not calibrated or name in calibrated]
    if len(kl) < 2 or not usual:
        return None
    reference = statistics.median_low(usual)
    far = {name: value / reference for name, value in kl.items() if value > FACTOR * reference}
    if not far:
        return None
    worst = ", ".join(f"{name} {ratio:.1f} times" for name, ratio in far.items())
    return (
        f"texts disagree: the KL divergence on {worst} the median of the texts calibrated on;"
        " calibrate with texts of every kind that the model will see (--calib, repeatable)"
    )
