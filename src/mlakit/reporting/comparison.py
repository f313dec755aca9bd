"""The comparison: many ways to shrink one model's cache, each with its bytes and its quality."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mlakit.reporting.schema import (
    Environment,
    Estimate,
    ModelSummary,
    Recall,
    Record,
    TaskScore,
    Text,
)

Family = Literal[
    "original",
    "latent",
    "bits",
    "tokens",
    "heads",
    "dimensions",
    "layers",
    "states",
    "reads",
    "weights",
]
"""What a method shrinks."""

FAMILY_WORDS: dict[Family, str] = {
    "original": "original",
    "latent": "latent (MLA)",
    "bits": "fewer bits",
    "tokens": "fewer tokens",
    "heads": "fewer heads",
    "dimensions": "fewer dimensions",
    "layers": "shared layers",
    "states": "constant state",
    "reads": "fewer reads",
    "weights": "fewer weights",
}


class MethodEntry(Record):
    """One method, as tables introduce it.

    Attributes:
        source: where it comes from.
        differs: what of the original is not reproduced.
    """

    name: str
    title: str
    family: Family
    source: str
    differs: str


class Pace(Record):
    """Speed on the machine of the run, in this package's code, in turn with the original.

    Attributes:
        tokens_per_second: decoded one by one after a prefix, batch 1.
        of_original: the same over the original's.
        first_token_seconds: to read the prefix and to compress its cache.
        first_token_of_original: the same over the original's.
    """

    tokens_per_second: float
    of_original: float
    first_token_seconds: float
    first_token_of_original: float


class Point(Record):
    """One setting of one method, measured.

    Attributes:
        bytes_per_token: cache bytes really held after the prefix, overheads included, over its
            tokens, all layers.
        peak_bytes_per_token: the same while the prefix was read.
        percent_of_own: of the source's bytes per token; likewise ``percent_of_mha``.
        read_percent: bytes that one decoded token reads of the cache, of the source's own.
        weight_percent: weight bytes of the source's.
        simulated: the weights ran unpacked, so their bytes are by account: drawn grey.
        calibration_tokens: looked at to choose numbers; ``trained_tokens``: to take gradients.
        kl: mean KL(source || this) of each window, nats per token; likewise ``nll``.
        perplexity: of the continuation, through the cache.
        recall: beside the source's, on the same questions.
        recall_seen: the same where the question was read with the text, before compression.
        pace: None where nobody looked at the clock, or where savings are by account.
        tasks: scores beside the source's on the same problems; the original's stand alone.
    """

    method: str
    setting: str
    bytes_per_token: float
    peak_bytes_per_token: float
    percent_of_own: float
    percent_of_mha: float
    read_percent: float
    weight_percent: float
    simulated: bool = False
    calibration_tokens: int = 0
    trained_tokens: int = 0
    kl: list[float]
    nll: list[float]
    kl_mean: Estimate
    kl_p999: float
    top1: Estimate
    perplexity: Estimate
    nll_difference: Estimate
    recall: Recall | None = None
    recall_seen: Recall | None = None
    pace: Pace | None = None
    tasks: list[TaskScore] = Field(default_factory=list)

    @property
    def trained(self) -> bool:
        """Whether gradients were taken: drawn hollow."""
        return self.trained_tokens > 0

    @property
    def key(self) -> tuple[str, str]:
        """Method and setting: no two points of a comparison share them."""
        return self.method, self.setting


class Missing(Record):
    """A setting that this model does not take, and why."""

    method: str
    setting: str
    reason: str


class Sized(Record):
    """A kind of model that would have to be trained: its cache by account, no score.

    Attributes:
        nbytes: of one sequence of ``length`` tokens.
        percent_of_own: of the source's cache at that length.
    """

    title: str
    source: str
    note: str
    nbytes: int
    length: int
    percent_of_own: float


class Answer(Record):
    """One of the questions that a comparison answers.

    Attributes:
        best: method and setting; likewise ``ties``, which are as good to measurement.
        untrained: the best that saw no gradient, where ``best`` did.
        text: the answer in words, bytes with quality.
    """

    question: str
    best: tuple[str, str]
    ties: list[tuple[str, str]]
    untrained: tuple[str, str] | None
    text: str


class Comparison(Record):
    """All points of one model.

    Attributes:
        budgets: shares of the source's cache that were asked for.
        measured_length: tokens that were cached to weigh it.
        recall: the source's own, of every kind and length; points hold those that it can do.
        points: the original first.
        missing: what could not be measured.
        sized: what was only counted.
        environment: where it ran; without the clock, so that the same run gives the same file.
    """

    schema_version: Literal[1] = 1
    source: ModelSummary
    text: Text
    prefix_length: int
    suffix_length: int
    windows: int
    measured_length: int
    budgets: list[float]
    seed: int
    recall: Recall | None
    methods: list[MethodEntry]
    points: list[Point]
    missing: list[Missing]
    sized: list[Sized] = Field(default_factory=list)
    answers: list[Answer] = Field(default_factory=list)
    environment: Environment

    @property
    def original(self) -> Point:
        """The source itself."""
        return self.points[0]

    def method(self, point: Point) -> MethodEntry:
        """What a point is a setting of."""
        return next(m for m in self.methods if m.name == point.method)

    def title(self, point: Point) -> str:
        """Method and setting in words."""
        entry = self.method(point)
        return entry.title if entry.family == "original" else f"{entry.title}, {point.setting}"
