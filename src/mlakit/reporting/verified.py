"""The quick check of a result against its source, as plain data."""

from __future__ import annotations

from pydantic import Field, computed_field

from mlakit.errors import VerificationError
from mlakit.reporting.schema import Record


class Difference(Record):
    """How far logits are from a reference.

    Attributes:
        absolute: the largest difference.
        relative: the same over the reference's largest logit.
        rms: root mean square difference over the standard deviation of the reference.
    """

    absolute: float
    relative: float
    rms: float


class Verification(Record):
    """What a quick check of a result against its source found.

    Attributes:
        one_pass: result against source, both reading each window in one call.
        through_cache: the same for the continuation fed through each model's own cache.
        own_cache: the result's cached logits against its own one-pass logits.
        kl_mean: mean KL(source || result) through the caches, nats per token.
        kl_max: the largest of them.
        top1: share of tokens with the same most likely token.
        source_bytes: cache bytes per token of the source.
        result_bytes: cache bytes per token of the result.
        tolerance: rms difference that rounding explains in the coarser dtype of the two.
        tokens: continuation tokens compared.
        domains: mean KL and the source's own loss, nats per token, of each text where there
            were several.
        promises: what was checked, in words.
        failures: which of them were not kept, and by how much; empty when all is well.
    """

    source: str
    result: str
    one_pass: Difference
    through_cache: Difference
    own_cache: Difference
    kl_mean: float
    kl_max: float
    top1: float
    source_bytes: float
    result_bytes: float
    tolerance: float
    tokens: int
    domains: dict[str, tuple[float, float]] = Field(default_factory=dict)
    promises: list[str]
    failures: list[str]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def percent_of_own(self) -> float:
        """Cache bytes of the result in percent of the source's."""
        return 100 * self.result_bytes / self.source_bytes

    def require(self) -> None:
        """Raises VerificationError when anything promised was not kept."""
        if not self.failures:
            return
        remedies = []
        if any("rounding" in failure for failure in self.failures):
            remedies.append(
                "compare with --dtype float32 to rule out rounding; if it fails there too, the"
                " folder is damaged or the conversion is wrong: please report it"
            )
        if any("KL" in failure for failure in self.failures):
            remedies.append("convert again with more cache or --refine-steps, or allow a larger KL")
        raise VerificationError(
            f"{self.result} does not match {self.source}: " + "; ".join(self.failures),
            remedy="; ".join(remedies),
        )
