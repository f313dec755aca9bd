"""``mlakit compare``: resumable, repeatable, and its two answers."""

from __future__ import annotations

import html
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from benchmarks import compare_kept
from typer.testing import CliRunner

from mlakit.baselines import METHODS
from mlakit.baselines.states import ARCHITECTURES
from mlakit.cli import app
from mlakit.comparison import Plan, compare, latent
from mlakit.comparison.journal import Journal, code
from mlakit.errors import MlakitError, UsageError
from mlakit.evaluation import open_subject
from mlakit.evaluation.quality import cut_windows
from mlakit.reporting.answers import best_at, smallest, tied, within_one_percent
from mlakit.reporting.comparison import FAMILY_WORDS, Comparison, MethodEntry, Pace, Point
from mlakit.reporting.comparison_page import render_comparison
from mlakit.reporting.comparison_rows import table
from mlakit.reporting.pareto import pareto, pareto_front
from mlakit.reporting.schema import (
    Environment,
    Estimate,
    ModelSummary,
    Recall,
    RecallCell,
    Text,
)
from tiny_models import TEXT, save_tiny

FAST = ("fp8", "kivi", "window", "snapkv")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def run(tiny: Path, text: Path, output: Path, **options: Any) -> Comparison:
    found = compare(
        tiny,
        output,
        **{
            "methods": FAST,
            "text": text,
            "windows": 3,
            "budgets": (0.5,),
            "speed": False,
            **options,
        },
    )
    assert isinstance(found, Comparison)
    return found


def test_the_original_is_exact_and_first(tiny: Path, text: Path, tmp_path: Path) -> None:
    found = run(tiny, text, tmp_path / "out")
    original = found.original
    assert original.method == "original" and original.percent_of_own == 100
    assert original.kl_mean.value == 0 and original.top1.value == 1
    assert original.percent_of_mha == 50  # 4 heads on 2
    assert [p.method for p in found.points[1:]] == ["fp8", "kivi", "kivi", "window", "snapkv"]
    halves = [p for p in found.points if p.method in ("window", "snapkv")]
    assert all(p.percent_of_own == 50 and p.peak_bytes_per_token == 256 for p in halves)
    assert found.recall is None  # the context has no room for a question


def test_same_seed_same_file(tiny: Path, text: Path, tmp_path: Path) -> None:
    first, second = (run(tiny, text, tmp_path / name).model_dump_json() for name in "ab")
    assert first == second


def test_one_comparison_at_a_time_writes_to_a_folder(tmp_path: Path) -> None:
    with Journal(tmp_path / "out", "this") as first:
        first.models.mkdir(parents=True)
        with pytest.raises(MlakitError, match="Another process is writing"):
            Journal(tmp_path / "out", "this")
        assert first.models.is_dir()
    assert not first.models.exists()
    with pytest.raises(UsageError, match="another comparison"):
        Journal(tmp_path / "out", "that")
    with pytest.raises(KeyboardInterrupt), Journal(tmp_path / "out", "this") as second:
        second.models.mkdir(parents=True)
        raise KeyboardInterrupt
    assert second.models.is_dir()  # for the run that goes on


def test_an_interrupted_run_goes_on(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tiny, text, tmp_path / "whole")
    out = tmp_path / "cut"
    run(tiny, text, out, methods=["fp8"])
    kept = {path: path.stat().st_mtime_ns for path in (out / "points").iterdir()}
    again = run(tiny, text, out)
    assert again == whole
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_points_of_other_code_are_measured_again(tiny: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = run(tiny, text, out, methods=["fp8"])
    path = next((out / "points").glob("fp8*"))
    kept = json.loads(path.read_text())
    assert kept["code"] == code()
    kept["point"]["kl_p999"] = 7.0
    path.write_text(json.dumps(kept))
    assert run(tiny, text, out, methods=["fp8"]).points[1].kl_p999 == 7  # taken as it is
    path.write_text(json.dumps(kept | {"code": "older"}))
    assert run(tiny, text, out, methods=["fp8"]) == found


def test_another_run_in_the_same_folder_is_refused(tiny: Path, text: Path, tmp_path: Path) -> None:
    run(tiny, text, tmp_path / "out", methods=["fp8"])
    with pytest.raises(UsageError, match="another comparison"):
        run(tiny, text, tmp_path / "out", methods=["fp8"], seed=1)
    other = tmp_path / "other"
    other.mkdir()
    (other / "note.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        run(tiny, text, other)


def test_what_makes_no_sense_is_refused(tiny: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no method 'snap'"):
        run(tiny, text, tmp_path / "out", methods=["snap"])
    with pytest.raises(UsageError, match="not a share"):
        run(tiny, text, tmp_path / "out", budgets=(25,))
    with pytest.raises(UsageError, match="lies in the model"):
        run(tiny, text, tiny / "out")
    assert not (tmp_path / "out").exists()


def test_latent_rows_keep_their_bytes(tiny: Path, text: Path, tmp_path: Path) -> None:
    methods = ["mla-equal", "mla", "mla-exact-prefix", "mla-evict"]
    found = run(tiny, text, tmp_path / "out", methods=methods, calibration=text,
                prefix_length=48, suffix_length=12)  # fmt: skip
    equal, half, exact, thin = found.points[1:]
    assert exact.percent_of_own == half.percent_of_own == thin.percent_of_own  # one page each
    assert exact.kl_mean.value != half.kl_mean.value != thin.kl_mean.value
    # Pages of 64 tokens, and 48 of them are used: the overhead is counted.
    assert equal.percent_of_own == pytest.approx(100 * 64 / 48)
    assert half.percent_of_own <= 50 * 64 / 48
    assert equal.kl_mean.value < 1e-6  # float32 rounding
    assert half.calibration_tokens > 0 and not half.trained
    assert not (tmp_path / "out" / "models").exists()


def test_what_exists_only_trained_needs_steps(tiny: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists only trained"):
        run(tiny, text, tmp_path / "out", methods=["mlkv-trained"])
    found = run(tiny, text, tmp_path / "out", methods=["mlkv-trained"], calibration=text,
                train_steps=2)  # fmt: skip
    point = found.points[1]
    assert point.setting == "2 layers share, 2 steps" and point.trained
    assert point.trained_tokens == 2 * 4 * 64 and point.percent_of_own == 50
    plan = compare(tiny, tmp_path / "plan", train_steps=2, dry_run=True)
    assert isinstance(plan, Plan)
    assert {"yoco", "rwkv", "mamba"} <= {method.name for method, _ in plan.steps}


def test_a_dry_run_lists_and_writes_nothing(tiny: Path, tmp_path: Path) -> None:
    plan = compare(tiny, tmp_path / "out", dry_run=True)
    assert isinstance(plan, Plan) and not (tmp_path / "out").exists()
    names = [method.name for method, _ in plan.steps]
    assert names[0] == "original" and "mla" in names and "mla-refined" not in names
    assert "mlkv-trained" not in names
    named = compare(tiny, tmp_path / "out", methods=["mla-refined"], dry_run=True)
    assert isinstance(named, Plan) and named.steps[1][0].slow
    done = CliRunner().invoke(app, ["compare", str(tiny), "--dry-run", "--json"])
    rows = json.loads(done.output)
    assert [row["method"] for row in rows] == [m.name for m, _ in plan.steps]
    assert all(row["differs"].endswith(".") for row in rows)


def test_the_verb_prints_and_writes(tiny: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(
        app,
        ["compare", str(tiny), "-o", str(out), "--text", str(text), "--windows", "2",
         "--methods", "window, fp8", "--budgets", "0.5,0.25"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "Best quality at 25 %" in done.output and "sink + window\t50 %" in done.output
    written = Comparison.model_validate_json((out / "compare.json").read_bytes())
    page = (out / "compare.html").read_text()
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "")
    assert all(html.escape(entry.differs) in page for entry in written.methods[1:])
    assert all(each.title in page and each.title in done.output for each in written.sized)


def test_windows_are_those_of_eval(tiny: Path, text: Path, tmp_path: Path) -> None:
    found = run(tiny, text, tmp_path / "out", methods=[])
    cut = cut_windows(open_subject(str(tiny)), None, text=text, count=3)
    assert (found.prefix_length, found.suffix_length) == (cut.prefix_length, cut.suffix_length)
    assert found.text == cut.text


def point(method: str, share: float, kl: list[float], ppl: float = 10.0, **more: Any) -> Point:
    mean = sum(kl) / len(kl)
    return Point(
        method=method, setting="x", bytes_per_token=1000 * share, peak_bytes_per_token=1000,
        percent_of_own=100 * share, percent_of_mha=100 * share, read_percent=1,
        weight_percent=1, kl=kl,
        nll=kl, kl_mean=Estimate(value=mean), kl_p999=mean, top1=Estimate(value=0.9),
        perplexity=Estimate(value=ppl), nll_difference=Estimate(value=0), **more,
    )  # fmt: skip


def made(*points: Point) -> Comparison:
    return Comparison(
        source=ModelSummary(
            name="m", attention="gqa", layers=1, parameters=1, weight_bytes=1, dtype="float32",
            context=64, fingerprint=None, bytes_per_token=1000, percent_of_own=100,
            percent_of_mha=50,
        ),
        text=Text(name="t", sha256="0"), prefix_length=3, suffix_length=1, windows=3,
        measured_length=3, budgets=[0.5, 0.25], seed=0, recall=None,
        methods=[
            MethodEntry(name=name, title=name, family=family, source="", differs="")
            for name, family in {p.method: "bits" for p in points}.items()
        ],
        points=list(points), missing=[],
        environment=Environment(
            created=None, command="", seed=0, device="cpu", threads=1, hardware="", versions={}
        ),
    )  # fmt: skip


ORIGINAL = point("original", 1.0, [0.0, 0.0, 0.0])


def test_a_better_perplexity_is_not_within_one_percent() -> None:
    found = made(ORIGINAL, point("forgets", 0.1, [1, 1, 1], ppl=8.0))
    assert not within_one_percent(found, found.points[1])
    assert smallest(found).best == ORIGINAL.key


def test_ties_are_called_ties() -> None:
    one, same = point("one", 0.25, [0.1, 0.2, 0.3]), point("same", 0.25, [0.3, 0.1, 0.21])
    worse = point("worse", 0.25, [0.2, 0.3, 0.4])
    assert tied(one, same, 0) and not tied(one, worse, 0)
    answer = best_at(made(ORIGINAL, one, same, worse), 0.25)
    assert answer is not None and answer.best == one.key and answer.ties == [same.key]
    assert "A tie with same" in answer.text


def test_a_trained_winner_names_the_best_without_training() -> None:
    healed = point("healed", 0.5, [0.1, 0.1, 0.1], trained_tokens=1000)
    plain = point("plain", 0.5, [0.2, 0.2, 0.2])
    answer = best_at(made(ORIGINAL, healed, plain), 0.5)
    assert answer is not None and answer.best == healed.key and answer.untrained == plain.key
    assert best_at(made(ORIGINAL, healed, plain), 0.25) is None


def test_a_winner_that_forgets_is_said_to() -> None:
    def asked(hits: int) -> Recall:
        return Recall(cells=[RecallCell(kind="passkey", length=9, depth=0.5, trials=10,
                                        source_hits=10, result_hits=hits)])  # fmt: skip

    original = point("original", 1.0, [0.0, 0.0, 0.0], recall=asked(10))
    drops = point("drops", 0.5, [0.1, 0.1, 0.1], recall=asked(2))
    keeps = point("keeps", 0.5, [0.2, 0.2, 0.2], recall=asked(9))
    answer = best_at(made(original, drops, keeps), 0.5)
    assert answer is not None and answer.best == drops.key
    assert "It forgets: most questions are answered by keeps" in answer.text
    assert not within_one_percent(made(original, drops, keeps), keeps)


def test_the_front_is_what_nothing_beats() -> None:
    a, b, c = point("a", 0.5, [0.1]), point("b", 0.25, [0.3]), point("c", 0.5, [0.2])
    assert pareto_front([a, b, c]) == [b, a]


def test_names_in_the_picture_stand_apart_and_the_legend_fits() -> None:
    many = [point(f"{n} " + "m" * n, 0.4 + n / 1e3, [0.1 - n / 1e4]) for n in range(30)]
    figure = pareto(made(ORIGINAL, *many))
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) >= 2 and not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    inside = figure.axes[0].get_window_extent()
    assert all(inside.contains(*box.min) and inside.contains(*box.max) for box in boxes)
    legend = figure.legends[0].get_window_extent()
    assert figure.bbox.contains(*legend.min) and figure.bbox.contains(*legend.max)


def test_a_page_table_comes_from_what_is_kept() -> None:
    speed = Pace(tokens_per_second=1234.5, of_original=0.5, first_token_seconds=1,
                 first_token_of_original=1.25)  # fmt: skip
    kept = compare_kept.summary(made(ORIGINAL, point("one", 0.25, [0.1, 0.2, 0.3], pace=speed)))
    head, _, original, one = compare_kept.table("m", kept)
    assert head.endswith("| perplexity | tokens/s | of own | first token |")  # nobody was asked
    assert original.startswith("| original | x |") and original.endswith("| - | - | - |")
    assert "<!--n compare.json#m.points.one.x.pace.of_original|.2f--><!--/n-->x" in one
    page = compare_kept.with_table("a\n<!-- table m -->\nold\nold\n\nb", "m", ["new"])
    assert page == "a\n<!-- table m -->\nnew\n\nb"


def test_missing_points_say_why(tiny: Path, text: Path, tmp_path: Path) -> None:
    found = run(tiny, text, tmp_path / "out", methods=["mla-published"], budgets=(0.01,))
    assert [missing.method for missing in found.missing] == ["mla-published"]
    assert "not measured" in render_comparison(found)


def test_the_page_lists_every_method_as_the_code_does() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "compare.md").read_text("utf-8")
    for method in (*latent.METHODS, *METHODS):
        words = FAMILY_WORDS[method.family]
        row = f"| `{method.name}` | {method.title} | {words} | {method.source} | {method.differs} |"
        assert row in page, method.name
    for each in ARCHITECTURES:
        assert each.note in page and f"| {each.title} |" in page


def test_only_the_clock_differs_between_runs(tiny: Path, text: Path, tmp_path: Path) -> None:
    methods = ["fp8", "top-pages", "wanda"]
    timed, plain = (
        run(tiny, text, tmp_path / str(speed), methods=methods, calibration=text, speed=speed)
        for speed in (True, False)
    )
    paces = {p.method: p.pace for p in timed.points}
    assert paces["original"] and paces["fp8"] and not paces["top-pages"] and not paces["wanda"]
    assert all(value > 0 for value in paces["fp8"].model_dump().values())
    bare = [p.model_copy(update={"pace": None}) for p in timed.points]
    assert timed.model_copy(update={"points": bare}) == plain
    lines = {line["method"]: line for line in table(timed) if line["method"]}
    assert lines["fp8"]["tokens/s"].endswith("x)") and lines["page top-k"]["tokens/s"] == "-"
    assert "tokens/s" not in table(plain)[0]
