"""The numbers of a report as words: one headline and one table, whatever shows them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from mlakit.reporting.domains import disagreement
from mlakit.reporting.schema import Estimate, Recall, Report
from mlakit.reporting.style import number, percent
from mlakit.reporting.verified import Verification

KIND_WORDS = {"passkey": "passkey", "key_value": "key-value"}


class Row(NamedTuple):
    """One line of the table; ``result`` is empty when there is only a source."""

    label: str
    source: str
    result: str = ""
    note: str = ""

    @classmethod
    def of(cls, label: str, values: Iterable[str], note: str = "") -> Row:
        """A line from one value or two."""
        source, result = [*values, ""][:2]
        return cls(label, source, result, note)


def headline(report: Report) -> str:
    """The price and the quality in one sentence."""
    result, agreement = report.result, report.quality.agreement
    if result is None or agreement is None:
        source = report.source
        share = f"{percent(source.percent_of_mha)} of MHA"
        if source.percent_of_own != 100:
            share = f"{percent(source.percent_of_own)} of its source's own, {share}"
        return (
            f"{source.name} caches {number(source.bytes_per_token)} bytes per token "
            f"({share}); perplexity after a cached prefix "
            f"{number(report.quality.source.perplexity.value)}"
        )
    return (
        f"{percent(result.percent_of_own)} of your own cache "
        f"({percent(result.percent_of_mha)} of MHA), KL {number(agreement.kl_mean.value)} nats, "
        f"top-1 {percent(100 * agreement.top1.value)}"
    )


def rows(report: Report) -> list[Row]:
    """Every number of the report's table, bytes first."""
    return [
        *_cache_rows(report),
        *_quality_rows(report),
        *_domain_rows(report),
        *_recall_rows(report.recall),
        *_task_rows(report),
        *_speed_rows(report),
    ]


def _cache_rows(report: Report) -> list[Row]:
    pair = [report.source, *([report.result] if report.result else [])]
    sizes = [report.memory.source, *([report.memory.result] if report.memory.result else [])]
    held = f"{report.memory.length:,} tokens × batch {report.memory.batch}"
    return [
        Row.of("attention", (m.attention for m in pair)),
        Row.of("cache, bytes per token", (number(m.bytes_per_token) for m in pair)),
        Row.of("cache, % of your own", (percent(m.percent_of_own) for m in pair)),
        Row.of("cache, % of MHA", (percent(m.percent_of_mha) for m in pair)),
        Row.of("cache held, bytes", (f"{s.measured_bytes:,}" for s in sizes), held),
        Row.of("cache by account, bytes", (f"{s.accounted_bytes:,}" for s in sizes), held),
        Row.of("weights, bytes", (f"{m.weight_bytes:,}" for m in pair)),
        Row.of("dtype", (m.dtype for m in pair)),
    ]


def _quality_rows(report: Report) -> list[Row]:
    quality, agreement = report.quality, report.quality.agreement
    pair = [quality.source, *([quality.result] if quality.result else [])]
    tie = "a tie: the difference is inside its interval" if agreement and agreement.tie else ""
    listed = [Row.of("perplexity after the prefix", (estimate(x.perplexity) for x in pair), tie)]
    if agreement is None:
        return listed
    nats = "nats per token"
    return [
        *listed,
        Row("NLL difference", "", estimate(agreement.nll_difference), nats),
        Row("KL, mean", "", estimate(agreement.kl_mean), nats),
        Row("KL, 99.9th percentile", "", number(agreement.kl_p999), nats),
        Row("KL, largest", "", number(agreement.kl_max), nats),
        Row("top-1 agreement, %", "", estimate(_percentage(agreement.top1))),
    ]


def _domain_rows(report: Report) -> list[Row]:
    """One line per text where there were several: perplexities, and what the result lost."""
    listed = []
    for domain in report.domains:
        pair = [domain.source_nll, *([domain.result_nll] if domain.result_nll else [])]
        values = (number(math.exp(nll.value)) for nll in pair)
        listed.append(Row.of(f"perplexity on {domain.name}", values, f"{domain.windows} windows"))
        if domain.kl is not None and domain.top1 is not None:
            note = f"nats per token; top-1 {percent(100 * domain.top1.value)}"
            listed.append(Row(f"KL on {domain.name}", "", estimate(domain.kl), note))
    return listed


def notes(report: Report) -> list[str]:
    """What the numbers warn of, one sentence each."""
    losses = {
        domain.name: (domain.kl.value, domain.source_nll.value)
        for domain in report.domains
        if domain.kl is not None
    }
    warnings = dict.fromkeys(text for score in report.tasks for text in score.warnings)
    if report.before and report.before.missing:
        measures = "; ".join(report.before.missing)
        warnings[f"{report.before.name} was not asked in the same way before: {measures}"] = None
    return list(filter(None, [disagreement(losses), *warnings]))


def _recall_rows(recall: Recall | None) -> list[Row]:
    listed = []
    for column in recall.columns() if recall else ():
        label = f"{KIND_WORDS[column.kind]} recall at {column.length:,}"
        result = "" if column.result is None else percent(100 * column.result)
        note = f"{column.trials} questions"
        if not column.usable:
            result, note = result and "n/a", f"{note}; the source itself fails"
        listed.append(Row(label, percent(100 * column.source), result, note))
    return listed


def _task_rows(report: Report) -> list[Row]:
    """Each measure of each task, and under it what the result gained on the same problems."""
    listed = []
    for score in report.tasks:
        measure = f"{score.task}, {score.measure}"
        asked = f"{score.problems:,} problems, " if score.problems else ""
        pair = [score.source, *([score.result] if score.result else [])]
        values = [estimate(_percentage(x) if score.share else x) for x in pair]
        label = f"{measure}, %" if score.share else measure
        listed.append(Row.of(label, values, asked + score.settings))
        if report.before and (then := report.before.score(score)):
            shown = estimate(_percentage(then) if score.share else then)
            listed.append(Row(f"{measure}, before", "", shown, report.before.name))
        if score.difference is not None:
            note = "points"
            if score.p_value is not None:
                note += f"; McNemar's exact p = {number(score.p_value)}"
            gained = estimate(_percentage(score.difference))
            listed.append(Row(f"{measure}, difference", "", gained, note))
    return listed


def _percentage(share: Estimate) -> Estimate:
    return share.mapped(lambda x: 100 * x)


def _speed_rows(report: Report) -> list[Row]:
    if report.speed is None:
        return []
    listed = []
    lines = [report.speed.source, *([report.speed.result] if report.speed.result else [])]
    for points in zip(*lines, strict=True):
        at = f"at {points[0].length:,}"
        listed.append(Row.of(f"prefill {at}, seconds", (number(p.prefill_seconds) for p in points)))
        rates = (number(p.decode_tokens_per_second) for p in points)
        listed.append(Row.of(f"decode {at}, tokens/s", rates))
        spent = [p.decode_joules_per_token for p in points]
        joules = [number(value) for value in spent if value is not None]
        if len(joules) == len(points):
            listed.append(Row.of(f"decode {at}, joules/token", joules))
    return listed


def verification_headline(found: Verification) -> str:
    """The verdict, the price and the quality in one sentence."""
    verdict = "FAILED: " if found.failures else ""
    return (
        f"{verdict}{percent(found.percent_of_own)} of your own cache, "
        f"KL {number(found.kl_mean)} nats, top-1 {percent(100 * found.top1)}"
    )


def verification_rows(found: Verification) -> list[Row]:
    """Every number of a verification; the value is in ``source``."""
    differences = {
        "logits in one pass, result against source": found.one_pass,
        "logits through the cache, result against source": found.through_cache,
        "result through its cache, against its own one pass": found.own_cache,
    }
    return [
        Row("cache, bytes per token of the source", number(found.source_bytes)),
        Row("cache, bytes per token of the result", number(found.result_bytes)),
        Row("cache, % of your own", percent(found.percent_of_own)),
        *(
            Row(
                label,
                f"{d.rms:.2g} rms",
                note=f"at most {d.absolute:.2g}, {d.relative:.2g} of the largest logit",
            )
            for label, d in differences.items()
        ),
        Row("KL, mean", number(found.kl_mean), note="nats per token"),
        Row("KL, largest", number(found.kl_max), note="nats per token"),
        Row("top-1 agreement", percent(100 * found.top1), note=f"{found.tokens:,} tokens"),
        *(
            Row(f"KL on {name}", number(kl), note=f"the source's own loss is {number(loss)}")
            for name, (kl, loss) in found.domains.items()
        ),
    ]


def estimate(value: Estimate) -> str:
    """The value with its 95 % interval, e.g. ``5.31 [5.12, 5.50]``."""
    if value.low is None or value.high is None:
        return number(value.value)
    return f"{number(value.value)} [{number(value.low)}, {number(value.high)}]"
