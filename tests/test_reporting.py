"""The report as data, as a table, as pictures and as an offline page."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console

from mlakit.errors import MlakitError, VerificationError
from mlakit.reporting.files import read_report, write_file
from mlakit.reporting.folder import write_report
from mlakit.reporting.html import render_html, write_html
from mlakit.reporting.plots import as_svg, draw
from mlakit.reporting.schema import (
    Agreement,
    CacheSize,
    Environment,
    Estimate,
    LayerError,
    Likelihood,
    Memory,
    ModelSummary,
    Quality,
    Recall,
    RecallCell,
    Report,
    Sample,
    Speed,
    SpeedPoint,
    Stage,
    Text,
)
from mlakit.reporting.summary import estimate, headline, number, percent, rows
from mlakit.reporting.table import print_report, print_verification
from mlakit.reporting.verified import Difference, Verification


def summary(name: str, share: float) -> ModelSummary:
    return ModelSummary(
        name=name,
        attention="gqa" if share == 1 else "mla compress",
        layers=2,
        parameters=1000,
        weight_bytes=4000,
        dtype="float32",
        context=256,
        fingerprint="abc123",
        bytes_per_token=1280 * share,
        percent_of_own=100 * share,
        percent_of_mha=50 * share,
    )


def likelihood(nll: float) -> Likelihood:
    return Likelihood(
        nll=Estimate(value=nll, low=nll - 0.1, high=nll + 0.1),
        perplexity=Estimate(value=5.31, low=5.12, high=5.5),
        nll_by_position=[nll, nll + 0.1],
    )


def points(rate: float, joules: float | None = None) -> list[SpeedPoint]:
    return [
        SpeedPoint(
            length=n,
            prefill_seconds=n / 1e4,
            decode_tokens_per_second=rate,
            bytes_moved=10**6,
            decode_joules_per_token=joules,
        )
        for n in (64, 128)
    ]


def one_model() -> Report:
    return Report(
        source=summary("tiny", 1),
        quality=Quality(
            text=Text(name="a <b>text</b> & more", sha256="f00d"),
            prefix_length=192,
            suffix_length=64,
            windows=8,
            positions=[32, 64],
            source=likelihood(1.67),
        ),
        memory=Memory(
            length=256, batch=1, source=CacheSize(measured_bytes=327680, accounted_bytes=327680)
        ),
        environment=Environment(
            created="2026-01-01T00:00:00+00:00",
            command="mlakit eval tiny 'tiny mla' --seed 7",
            seed=7,
            device="cpu",
            threads=1,
            hardware="a processor",
            versions={"torch": "2.11"},
        ),
    )


def two_models() -> Report:
    """Everything a report can hold."""
    alone = one_model()
    agreement = Agreement(
        kl_mean=Estimate(value=0.0123, low=0.0101, high=0.0144),
        kl_p999=0.456,
        kl_max=0.789,
        top1=Estimate(value=0.9712, low=0.96, high=0.98),
        nll_difference=Estimate(value=0.01, low=-0.01, high=0.03),
        kl_by_position=[0.01, 0.015],
    )
    cells = [
        RecallCell(kind=kind, length=n, depth=d, trials=2, source_hits=hits, result_hits=1)
        for kind in ("passkey", "key_value")
        for n, hits in ((64, 2), (128, 0))
        for d in (0.0, 0.5, 1.0)
    ]
    return alone.model_copy(
        update={
            "result": summary("tiny mla", 0.375),
            "quality": alone.quality.model_copy(
                update={"result": likelihood(1.68), "agreement": agreement}
            ),
            "memory": alone.memory.model_copy(
                update={"result": CacheSize(measured_bytes=122880, accounted_bytes=122880)}
            ),
            "recall": Recall(cells=cells),
            "speed": Speed(
                decoded_tokens=16,
                repeats=3,
                copy_bandwidth=2e10,
                source=points(100.0),
                result=points(150.0),
            ),
            "samples": [Sample(prompt="<Once>", source=" upon & a time", result=" there was")],
            "stages": [
                Stage(name=name, bytes_per_token=bytes_, kl_mean=kl, perplexity=5 + kl)
                for name, bytes_, kl in (("original", 1280, 0), ("low rank", 480, 0.2))
            ],
            "layer_errors": [LayerError(layer=i, error=0.01 * (i + 1)) for i in range(2)],
        }
    )


REPORTS = pytest.mark.parametrize("report", [one_model(), two_models()], ids=["one", "two"])


@REPORTS
def test_json_round_trips(report: Report) -> None:
    text = report.model_dump_json()
    assert Report.model_validate_json(text) == report
    assert '"schema_version":1' in text


@settings(deadline=None)
@given(st.floats(allow_nan=False))
def test_every_number_round_trips(value: float) -> None:
    text = Estimate(value=value).model_dump_json()
    assert Estimate.model_validate_json(text).value == value


def test_quality_and_bytes_need_each_other() -> None:
    whole = one_model().model_dump()
    for part in ("quality", "memory"):
        with pytest.raises(ValidationError, match=part):
            Report.model_validate({key: x for key, x in whole.items() if key != part})
    with pytest.raises(ValidationError, match="unknown"):
        Report.model_validate({**whole, "unknown": 1})


class Links(HTMLParser):
    """Collects what a page would fetch, and checks that tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = ("src", "href", "xlink:href", "srcset", "data", "action")
        self.links += [value or "" for name, value in attrs if name in names]
        if tag not in ("meta", "link", "br", "img", "path", "use", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()


@REPORTS
def test_the_page_needs_no_network(report: Report) -> None:
    page = render_html(report)
    parser = Links()
    parser.feed(page)
    assert all(link.startswith("#") for link in parser.links)
    assert parser.open == []
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", page)
    assert not re.search(r"""url\(\s*["']?(?!#)|@import|<script|<link""", page)


@REPORTS
def test_the_page_shows_every_number(report: Report) -> None:
    page = render_html(report)
    for row in rows(report):
        for text in row:
            assert text.replace("&", "&amp;") in page
    assert headline(report) in page
    assert "a &lt;b&gt;text&lt;/b&gt; &amp; more" in page
    assert "mlakit eval tiny &#39;tiny mla&#39; --seed 7" in page
    assert page.count("<svg") == len(draw(report))
    for colour in ("var(--ink)", "var(--source)"):
        assert colour in page.partition("</style>")[2]


def test_own_cache_first_mha_second() -> None:
    text = headline(two_models())
    assert text == "37.5 % of your own cache (18.8 % of MHA), KL 0.0123 nats, top-1 97.1 %"
    assert headline(one_model()).startswith("tiny caches 1,280 bytes per token (50 % of MHA)")


def test_a_source_that_fails_makes_the_column_na() -> None:
    listed = {row.label: row for row in rows(two_models())}
    assert listed["passkey recall at 64"].result == "50 %"
    assert listed["passkey recall at 128"].source == "0 %"
    assert listed["passkey recall at 128"].result == "n/a"
    assert "a tie" in listed["perplexity after the prefix"].note


@REPORTS
def test_plain_lines_without_a_terminal(report: Report) -> None:
    stream = io.StringIO()
    print_report(report, Console(file=stream))
    lines = stream.getvalue().splitlines()
    assert lines[0] == headline(report)
    assert len(lines) == len(rows(report)) + 3
    assert "\x1b" not in stream.getvalue()
    columns = {row.label: line.split("\t") for row, line in zip(rows(report), lines[2:])}
    assert columns["cache, bytes per token"][1] == "1,280"


def test_table_on_a_terminal_keeps_brackets() -> None:
    stream = io.StringIO()
    print_report(two_models(), Console(file=stream, force_terminal=True, width=120))
    assert "5.31 [5.12, 5.50]" in stream.getvalue()


def test_pictures_are_drawn_for_what_is_there() -> None:
    assert list(draw(one_model())) == ["cache", "quality"]
    assert list(draw(two_models())) == ["cache", "quality", "recall", "stages", "layers", "speed"]


def test_pictures_are_the_same_twice() -> None:
    first, second = (
        {name: as_svg(figure) for name, figure in draw(two_models()).items()} for _ in range(2)
    )
    assert first == second


def test_a_folder_holds_all_views_and_no_leftovers(tmp_path: Path) -> None:
    write_report(two_models(), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    pictures = {f"{name}.png" for name in draw(two_models())}
    assert names == {"report.json", "report.html"} | pictures
    for picture in pictures:
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    assert read_report(tmp_path / "out") == two_models()
    write_report(one_model(), tmp_path / "out")
    assert not (tmp_path / "out" / "speed.png").exists()
    assert read_report(tmp_path / "out" / "report.json") == one_model()


def test_one_page_alone(tmp_path: Path) -> None:
    write_html(one_model(), tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_what_cannot_be_written_or_read_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MlakitError, match="cannot write"):
        write_file(tmp_path / "file" / "report.json", b"")
    with pytest.raises(MlakitError, match="cannot read"):
        read_report(tmp_path / "absent.json")
    (tmp_path / "report.json").write_text('{"schema_version": 99}')
    with pytest.raises(MlakitError, match="not a report of this version"):
        read_report(tmp_path)


@pytest.mark.parametrize(
    "value,expected",
    [
        (0, "0"),
        (1280.0, "1,280"),
        (0.01234, "0.0123"),
        (0.9, "0.900"),
        (1234.56, "1,234.6"),
        (1.3e-5, "1.30e-05"),
        (float("inf"), "inf"),
        (float("nan"), "nan"),
    ],
)
def test_numbers(value: float, expected: str) -> None:
    assert number(value) == expected


def test_percent_and_estimate() -> None:
    assert [percent(x) for x in (100, 37.5, 18.75)] == ["100 %", "37.5 %", "18.8 %"]
    assert estimate(Estimate(value=2.0)) == "2"
    assert estimate(Estimate(value=2.5, low=2.25, high=3)) == "2.50 [2.25, 3]"


def verification(**changes: object) -> Verification:
    equal = Difference(absolute=1e-5, relative=1e-6, rms=1e-7)
    return Verification(
        source="tiny",
        result="tiny mla",
        one_pass=equal,
        through_cache=equal,
        own_cache=equal,
        kl_mean=1e-9,
        kl_max=1e-8,
        top1=1.0,
        source_bytes=1280.0,
        result_bytes=640.0,
        tolerance=1e-4,
        tokens=512,
        promises=["it is equal"],
        failures=[],
    ).model_copy(update=changes)


def test_a_verification_prints_bytes_with_quality() -> None:
    stream = io.StringIO()
    print_verification(verification(), Console(file=stream))
    assert stream.getvalue().startswith("50 % of your own cache, KL 1.00e-09 nats, top-1 100 %")
    assert "kept: it is equal" in stream.getvalue()
    verification().require()


def test_a_failed_verification_raises() -> None:
    failed = verification(failures=["it is equal: off by 0.5"])
    stream = io.StringIO()
    print_verification(failed, Console(file=stream))
    assert stream.getvalue().startswith("FAILED: ")
    assert "broken: it is equal: off by 0.5" in stream.getvalue()
    with pytest.raises(VerificationError, match=r"off by 0\.5"):
        failed.require()
    assert Verification.model_validate_json(
        verification().model_dump_json(exclude={"percent_of_own"})
    )


def test_joules_stand_where_both_models_have_them() -> None:  # D40
    report = two_models()
    assert report.speed is not None
    for result, expected in ((0.25, ["0.500", "0.250"]), (None, None)):
        both = {"source": points(100.0, 0.5), "result": points(150.0, result)}
        found = report.model_copy(update={"speed": report.speed.model_copy(update=both)})
        listed = {row.label: [row.source, row.result] for row in rows(found)}
        assert listed.get("decode at 64, joules/token") == expected
