"""The report: everything that was measured on one model or two, as plain versioned data.

Quality is never stored without the cache bytes it was bought with, nor bytes without quality: both
are required fields of `Report`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

RECALL_FLOOR = 0.5
"""A source below this recall cannot do the task; the column then says nothing about a cache."""


class Record(BaseModel):
    """Frozen, with no unknown keys; infinities survive JSON as strings."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Estimate(Record):
    """A mean over windows with its bootstrap 95 % interval (absent with a single window)."""

    value: float
    low: float | None = None
    high: float | None = None

    def mapped(self, function: Callable[[float], float]) -> Estimate:
        """The estimate after an increasing function of value and ends."""
        low, high = (None if end is None else function(end) for end in (self.low, self.high))
        return Estimate(value=function(self.value), low=low, high=high)

    @property
    def includes_zero(self) -> bool:
        """True when zero lies in the interval; without an interval only zero itself does."""
        if self.low is None or self.high is None:
            return self.value == 0.0
        return self.low <= 0.0 <= self.high


class ModelSummary(Record):
    """One model and the size of its cache.

    Attributes:
        attention: ``mha``, ``gqa``, ``mqa`` or ``mla``, with the MLA form where there is one.
        fingerprint: hash of the checkpoint; None for a model that was not read from a folder.
        bytes_per_token: cache bytes really held, over the tokens cached, all layers.
        percent_of_own: of the source's bytes per token; for a converted model measured alone, of
            the model it was converted from.
        percent_of_mha: of the same model with one K/V head per query head, in the source's dtype.
    """

    name: str
    attention: str
    layers: int
    parameters: int
    weight_bytes: int
    dtype: str
    context: int
    fingerprint: str | None
    bytes_per_token: float
    percent_of_own: float
    percent_of_mha: float


class Text(Record):
    """The text that was scored."""

    name: str
    sha256: str


class Likelihood(Record):
    """One model on the continuation: mean NLL (nats per token) and perplexity, exp of it."""

    nll: Estimate
    perplexity: Estimate
    nll_by_position: list[float]


class Agreement(Record):
    """Result against source, token by token, through their caches.

    Attributes:
        kl_mean: mean KL(source || result), nats per token.
        kl_p999: 99.9th percentile over all scored tokens.
        top1: share of tokens where both models' most likely token is the same.
        nll_difference: result minus source, nats per token, paired by window.
        kl_by_position: mean KL per bin of positions in the continuation.
    """

    kl_mean: Estimate
    kl_p999: float
    kl_max: float
    top1: Estimate
    nll_difference: Estimate
    kl_by_position: list[float]

    @property
    def tie(self) -> bool:
        """The interval of the NLL difference holds zero: the perplexities are a tie."""
        return self.nll_difference.includes_zero


class Quality(Record):
    """Scores of a continuation after a cached prefix.

    Attributes:
        positions: last position (1-based, in the continuation) of each bin of ``..._by_position``.
    """

    text: Text
    prefix_length: int
    suffix_length: int
    windows: int
    positions: list[int]
    source: Likelihood
    result: Likelihood | None = None
    agreement: Agreement | None = None


class DomainQuality(Record):
    """The continuation scores of one text among several.

    Attributes:
        name: of the text.
        source_nll: nats per token; likewise ``result_nll``.
        kl: mean KL(source || result), nats per token.
        top1: share of tokens where both models' most likely token is the same.
    """

    name: str
    windows: int
    source_nll: Estimate
    result_nll: Estimate | None = None
    kl: Estimate | None = None
    top1: Estimate | None = None


RecallKind = Literal["passkey", "key_value"]


class RecallCell(Record):
    """Answers found at one length and depth."""

    kind: RecallKind
    length: int
    depth: float
    trials: int
    source_hits: int
    result_hits: int | None = None


class RecallColumn(Record):
    """All depths of one kind and length together; shares between 0 and 1."""

    kind: RecallKind
    length: int
    trials: int
    source: float
    result: float | None

    @property
    def usable(self) -> bool:
        """False where the source itself fails: the column is then printed n/a."""
        return self.source >= RECALL_FLOOR


class Recall(Record):
    """Look-up of a line far back in the cached text: exact greedy answers."""

    cells: list[RecallCell]

    def columns(self) -> Iterator[RecallColumn]:
        """Sums the cells over depths, in the order of their first appearance."""
        for kind, length in dict.fromkeys((cell.kind, cell.length) for cell in self.cells):
            cells = [c for c in self.cells if (c.kind, c.length) == (kind, length)]
            trials = sum(c.trials for c in cells)
            found = [c.result_hits for c in cells if c.result_hits is not None]
            yield RecallColumn(
                kind=kind,
                length=length,
                trials=trials,
                source=sum(c.source_hits for c in cells) / trials,
                result=sum(found) / trials if found else None,
            )


class TaskScore(Record):
    """One measure of one task, over the same problems for both models.

    Attributes:
        problems: how many; None for a group of lm-eval's tasks.
        settings: how they were asked.
        share: the value is a share between 0 and 1, to be shown in percent.
        difference: result minus source, paired by problem.
        p_value: McNemar's exact test; None where marks are not just right or wrong.
        warnings: what a reader must know of the scores, one sentence each.
    """

    task: str
    measure: str
    problems: int | None
    settings: str
    share: bool = True
    source: Estimate
    result: Estimate | None = None
    difference: Estimate | None = None
    p_value: float | None = None
    warnings: list[str] = Field(default_factory=list)


class TasksBefore(Record):
    """Tasks of an earlier state of the result, as before healing.

    Attributes:
        tasks: that were asked in the same way; their ``result`` is the earlier state.
        missing: measures that were not.
    """

    name: str
    tasks: list[TaskScore]
    missing: list[str] = Field(default_factory=list)

    def score(self, now: TaskScore) -> Estimate | None:
        """What the earlier state reached by the same measure."""
        same = (then for then in self.tasks if (then.task, then.measure) == (now.task, now.measure))
        return next((then.result for then in same), None)


class CacheSize(Record):
    """Cache bytes of one model: held by its storage, and as the account predicts."""

    measured_bytes: int
    accounted_bytes: int


class Memory(Record):
    """Cache bytes at a stated length (tokens) and batch (sequences)."""

    length: int
    batch: int
    source: CacheSize
    result: CacheSize | None = None


class SpeedPoint(Record):
    """Timings at one cached length, batch 1; medians over repeats.

    Attributes:
        bytes_moved: weight and cache bytes one decoded token has to read at least.
        decode_joules_per_token: mean over repeats of what the whole device spent, idle draw
            included; None where it reports no energy.
    """

    length: int
    prefill_seconds: float
    decode_tokens_per_second: float
    bytes_moved: int
    decode_joules_per_token: float | None = None


class Speed(Record):
    """Tokens per second, source and result taken in turn on the same prompts.

    Attributes:
        copy_bandwidth: bytes/s that a large tensor copy read plus wrote on this device; the roof.
    """

    decoded_tokens: int
    repeats: int
    copy_bandwidth: float
    source: list[SpeedPoint]
    result: list[SpeedPoint] | None = None


class Sample(Record):
    """One prompt and what each model writes after it, greedily."""

    prompt: str
    source: str
    result: str | None = None


class Stage(Record):
    """One step of a conversion (original, rotated, low rank, refined, healed) and its price."""

    name: str
    bytes_per_token: float
    kl_mean: float
    perplexity: float


class LayerError(Record):
    """Relative error of one converted layer's attention output."""

    layer: int
    error: float


class Environment(Record):
    """Where and how the numbers were taken; enough to take them again.

    ``created`` is None where the same run is to give the same file.
    """

    created: str | None
    command: str
    seed: int
    device: str
    threads: int
    hardware: str
    versions: dict[str, str]


class Report(Record):
    """All that was measured on a source and, where there is one, on its result.

    ``domains`` holds the quality on each text where there were several, ``before`` the tasks of an
    earlier state of the result.
    """

    schema_version: Literal[1] = 1
    source: ModelSummary
    result: ModelSummary | None = None
    quality: Quality
    domains: list[DomainQuality] = Field(default_factory=list)
    memory: Memory
    recall: Recall | None = None
    tasks: list[TaskScore] = Field(default_factory=list)
    before: TasksBefore | None = None
    speed: Speed | None = None
    samples: list[Sample] = Field(default_factory=list)
    stages: list[Stage] = Field(default_factory=list)
    layer_errors: list[LayerError] = Field(default_factory=list)
    environment: Environment
