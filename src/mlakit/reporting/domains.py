"""Whether texts of different kinds agree about a converted model. Plain Python."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping

FACTOR = 2.0
"""A text that loses so many times the usual share was not served by the calibration: the shares of
kinds of text that were calibrated on differ by less (docs/conversion.md)."""


def disagreement(
    losses: Mapping[str, tuple[float, float]], calibrated: Collection[str] = ()
) -> str | None:
    """A sentence where held-out texts disagree, or None.

    A text that the source itself reads badly has a larger KL divergence whatever it was calibrated
    on, so each is taken as a share of the source's own loss.

    Args:
        losses: on each text the mean KL divergence of the result from the source, and the source's
            own log loss, nats per token.
        calibrated: the names of those that were calibrated on; all where nobody knows.

    Returns:
        Which shares are above FACTOR times the median of the calibrated ones (of two the lower).
    """
    shares = {name: kl / max(loss, 1e-9) for name, (kl, loss) in losses.items()}
    usual = [share for name, share in shares.items() if not calibrated or name in calibrated]
    if len(shares) < 2 or not usual:
        return None
    reference = max(statistics.median_low(usual), 1e-9)
    far = {name: share / reference for name, share in shares.items() if share > FACTOR * reference}
    if not far:
        return None
    middle = "the median of the texts calibrated on" if calibrated else "the median text's"
    worst = ", ".join(f"{name} {ratio:.1f} times" for name, ratio in far.items())
    return (
        f"texts disagree: as a share of the source's own loss, the KL divergence is on {worst}"
        f" {middle}; calibrate with texts of every kind that the model will see (--calib,"
        " repeatable)"
    )
