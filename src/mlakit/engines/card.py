"""The model card of an export: what the model is, what it lost, and how an engine loads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from mlakit import __version__
from mlakit.checkpoint import Checkpoint
from mlakit.checkpoint.origin import front_matter, origin
from mlakit.conversion.card import NOT_HEALED
from mlakit.errors import MlakitError, UsageError
from mlakit.reporting.schema import Report
from mlakit.reporting.summary import headline, rows
from mlakit.reporting.verified import Verification

UNMEASURED = "Nobody has measured this export against its source: `mlakit eval SOURCE CONVERTED`."


def read_report(path: str | Path, checkpoint: Checkpoint) -> Report:
    """What ``mlakit eval SOURCE CONVERTED -o FOLDER`` measured.

    Args:
        path: ``report.json``, or the folder that holds it.
        checkpoint: the converted model that it has to be about.

    Raises:
        MlakitError: there is no report that can be read.
        UsageError: it is about another model.
    """
    file = Path(path).expanduser()
    file = file / "report.json" if file.is_dir() else file
    try:
        report = Report.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise MlakitError(
            f"{file} is no report that can be read: {reason}",
            remedy="make it: mlakit eval SOURCE CONVERTED -o FOLDER",
        ) from error
    if report.result is None or report.result.fingerprint != checkpoint.fingerprint:
        about = report.source.name if report.result is None else report.result.name
        raise UsageError(
            f"{file} is about {about}, not about {checkpoint.source} as it is now",
            remedy=f"measure again: mlakit eval SOURCE {checkpoint.source} -o FOLDER",
        )
    return report


def export_card(
    checkpoint: Checkpoint,
    to: str,
    load: Sequence[str],
    check: Verification,
    report: Report | None,
) -> str:
    """``README.md`` of an export: the converted model's own, and what the export adds.

    Args:
        checkpoint: the converted model; its card says how it was made and healed.
        to: the engine.
        load: lines that load it there.
        check: the export against the converted model.
        report: the converted model against its source.
    """
    return "\n".join(
        [
            _own_card(checkpoint).rstrip(),
            "",
            "## Quality",
            "",
            *([UNMEASURED] if report is None else _quality(report)),
            "",
            f"## Exported for {to}",
            "",
            f"By mlakit {__version__}: the same function as the converted model, checked on"
            f" {check.tokens:,} tokens: logits differ by {check.one_pass.rms:.2g} of their"
            f" deviation, KL divergence {check.kl_mean:.2g} nats per token.",
            "",
            "```",
            *load,
            "```",
            "",
        ]
    )


def _own_card(checkpoint: Checkpoint) -> str:
    """The converted folder's card; a short one where it was taken away."""
    path = checkpoint.path / "README.md"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    facts = checkpoint.config.get("mlakit") or {}
    trained = facts.get("healed", {}).get("steps")
    compressed = checkpoint.config.get("mla_form") == "compress"
    label = [f"{NOT_HEALED} The cache was compressed and nothing has been trained since.", ""]
    return "\n".join(
        [
            *front_matter({"library_name": "mlakit", **origin(checkpoint)}),
            "",
            f"# {facts.get('source', checkpoint.path.name)} with multi-head latent attention",
            "",
            *(label if compressed and not trained else []),
        ]
    )


def _quality(report: Report) -> list[str]:
    """The report's headline and its table."""
    quality = report.quality
    assert report.result is not None
    return [
        f"{headline(report)}. Scored on {quality.windows} windows of {quality.text.name},"
        f" {quality.suffix_length} tokens each after a cached prefix of {quality.prefix_length:,};"
        " brackets are 95 % intervals.",
        "",
        f"| | {report.source.name} | this model | |",
        "|---|---|---|---|",
        *(f"| {row.label} | {row.source} | {row.result} | {row.note} |" for row in rows(report)),
    ]
