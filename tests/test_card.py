"""Model cards: base model, licence, a label when not healed, quality with bytes, how to load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import metadata_load

from mlakit.checkpoint import open_checkpoint
from mlakit.checkpoint.origin import origin
from mlakit.conversion.apply import convert
from mlakit.conversion.card import NOT_HEALED
from mlakit.engines.export import export
from mlakit.errors import MlakitError, UsageError
from mlakit.evaluation import evaluate
from mlakit.reporting.html import write_html
from tiny_models import TEXT, save_tiny

FAST = {"refine_steps": 0, "calibration_tokens": 1024}
CARD = """---
license: other
license_name: toy-license
license_link: https://example.org/licence
language: [en]
tags: [something]
---
# A toy
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source with a card and a licence, and its conversion for transformers."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.txt").write_text(TEXT)
    source = save_tiny(folder / "source")
    (source / "README.md").write_text(CARD)
    (source / "LICENSE").write_text("do what you like")
    convert(source, folder / "small", cache_ratio=0.5, qk_rope_head_dim=8, engine="transformers",
            calibration=folder / "text.txt", **FAST)  # fmt: skip
    return folder


def test_a_conversion_names_licence_and_that_nothing_was_healed(made: Path) -> None:
    card = (made / "small" / "README.md").read_text()
    fields = metadata_load(made / "small" / "README.md")
    assert fields["license"] == "other" and fields["license_name"] == "toy-license"
    assert fields["license_link"] == "https://example.org/licence" and "base_model" not in fields
    assert "something" not in fields["tags"] and "mla" in fields["tags"]
    lost = json.loads((made / "small" / "plan.json").read_text())["measured"]["held_out_kl"]
    assert f"{NOT_HEALED} The cache was compressed" in card and f"{lost:.3g} nats" in card
    assert "Licence: toy-license" in card
    assert (made / "small" / "LICENSE").read_text() == "do what you like"
    convert(made / "source", made / "exact", equal_cache=True)
    assert NOT_HEALED not in (made / "exact" / "README.md").read_text()


@pytest.mark.parametrize("card", [None, "no front matter", "---\nlicense: [\n---\n", "\xff"])
def test_a_source_without_a_card_that_can_be_read(card: str | None, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    if card is not None:
        (source / "README.md").write_bytes(card.encode("latin-1"))
    assert origin(open_checkpoint(source)) == {}
    convert(source, tmp_path / "out", equal_cache=True)
    assert "names no licence" in (tmp_path / "out" / "README.md").read_text()


def test_an_export_shows_quality_with_bytes_and_how_to_load(made: Path, tmp_path: Path) -> None:
    report = evaluate(made / "source", made / "small", text=str(made / "text.txt"),
                      windows=2, recall=False, max_new_tokens=0)  # fmt: skip
    write_html(report, tmp_path / "report.html")
    (tmp_path / "report.json").write_text(report.model_dump_json())
    export(made / "small", tmp_path / "out", text=made / "text.txt", report=tmp_path)
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        NOT_HEALED, "## Quality", "cache, % of your own", "KL, mean", "| this model |",
        "## Exported for transformers", "AutoModelForCausalLM", "Licence: toy-license",
    ):  # fmt: skip
        assert part in card, part
    assert metadata_load(tmp_path / "out" / "README.md")["license"] == "other"


def test_a_report_of_another_model_is_refused_before_anything_is_written(
    made: Path, tmp_path: Path
) -> None:
    report = evaluate(made / "source", text=str(made / "text.txt"), windows=2, recall=False,
                      max_new_tokens=0)  # fmt: skip
    (tmp_path / "report.json").write_text(report.model_dump_json())
    with pytest.raises(UsageError, match="about source, not about"):
        export(made / "small", tmp_path / "out", report=tmp_path)
    (tmp_path / "report.json").write_text("{}")
    for place in (tmp_path, tmp_path / "nowhere.json"):
        with pytest.raises(MlakitError, match="no report that can be read"):
            export(made / "small", tmp_path / "out", report=place)
    assert not (tmp_path / "out").exists()


def test_an_export_without_card_or_report_says_so(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "small", tmp_path / "small")
    (tmp_path / "small" / "README.md").unlink()
    export(tmp_path / "small", tmp_path / "out", text=made / "text.txt")
    card = (tmp_path / "out" / "README.md").read_text()
    assert NOT_HEALED in card and "Nobody has measured" in card
