"""GSM8K and HumanEval: prompts, marks, intervals, resuming and the report."""

from __future__ import annotations

import gzip
import importlib.util
import io
import itertools
import json
import math
import random
import re
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from mlakit.errors import MlakitError, UsageError
from mlakit.evaluation import evaluate, open_subject
from mlakit.evaluation.tasks import TaskOptions, asking, fit_tasks, open_tasks, run_tasks
from mlakit.evaluation.tasks.gsm8k import final_number, marked_number, write_prompt
from mlakit.evaluation.tasks.gsm8k_examples import EXAMPLES
from mlakit.evaluation.tasks.harness import (
    ask_harness,
    harness_scores,
    open_harness,
    ordinary_model,
)
from mlakit.evaluation.tasks.humaneval import STOP, grade, program
from mlakit.evaluation.tasks.intervals import mcnemar, mean_gain, mean_score, pass_at_k, wilson
from mlakit.evaluation.tasks.problems import read_problems
from mlakit.reporting.html import render_html
from mlakit.reporting.schema import Report, TaskScore
from mlakit.reporting.summary import rows
from mlakit.reporting.table import print_report
from mlakit.reporting.task_scores import require_same_source, task_scores, tasks_before
from tiny_models import save_tiny

SUMS = [
    {"question": f"What is {a} plus {a}?", "answer": f"Add them.\n#### {2 * a:,}"}
    for a in (1, 2, 3, 700)
]
PROGRAMS = [
    {
        "task_id": f"Test/{n}",
        "prompt": f'def add{n}(x):\n    """Adds {n}."""\n',
        "entry_point": f"add{n}",
        "test": f"def check(candidate):\n    assert candidate(1) == {n + 1}\n",
    }
    for n in range(3)
]


def write_rows(path: Path, rows_: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_))
    return path


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "sums.jsonl", SUMS)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "programs.jsonl", PROGRAMS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes nonsense, with room for a few examples."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    return save_tiny(path, max_position_embeddings=2048, eos_token_id=None)


def solve(prompt: str) -> str:
    """A right answer to the last problem of a prompt."""
    if "def add" in prompt:
        return f"    return x + {prompt.rpartition('def add')[2].partition('(')[0]}\n"
    number = int(prompt.rpartition("What is ")[2].partition(" ")[0])
    return f" Twice {number} is {2 * number}.\n#### {2 * number}"


class Writer:
    """Stands in for `generate`; right where ``knows`` says so, and keeps what it was asked."""

    def __init__(self, knows: Any = lambda model, prompt: True) -> None:
        self.knows = knows
        self.calls: list[dict[str, Any]] = []

    def __call__(self, model: Any, tokenizer: Any, prompts: list[str], **how: Any) -> Any:
        self.calls.append({"prompts": prompts, **how})
        return SimpleNamespace(
            texts=[solve(p) if self.knows(model, p) else " I do not know 5." for p in prompts]
        )


def score(given: list[str], model: Path, **options: Any) -> list[Any]:
    """Scores of one model on tasks."""
    subject = open_subject(model)
    chosen = fit_tasks(open_tasks(given, TaskOptions(**options)), subject, None)
    return run_tasks(chosen, subject, None)


@pytest.mark.parametrize(
    "text,strict,flexible",
    [
        ("so 2 + 3 = 5.\n#### 5", "5", "5"),
        ("#### $1,234.50 and 7 more", "1234.5", "1234.5"),
        ("#### -3", "-3", "-3"),
        ("####18", "18", "18"),
        ("the answer is 18.00", None, "18"),
        ("it costs $2,125.", None, "2125"),
        ("10-4 = 6", None, "6"),
        ("that is 7-3", None, "3"),
        ("minus: -3", None, "-3"),
        ("minus: −3", None, "-3"),
        ("1,2 or 12,3456", None, "3456"),
        ("a half, .5", None, "0.5"),
        ("#### none, but 4", None, "4"),
        ("no number at all", None, None),
        ("", None, None),
        ("100% of 40%", None, "40"),
        ("#### $-7", "-7", "-7"),
        ("#### 5\n#### 6", "5", "5"),
    ],
)
def test_answers_are_read(text: str, strict: str | None, flexible: str | None) -> None:
    assert marked_number(text) == (None if strict is None else Decimal(strict))
    assert final_number(text) == (None if flexible is None else Decimal(flexible))


@given(st.text(alphabet="0123456789.,$-−# ab\n", max_size=40))
def test_reading_never_fails_and_flexible_covers_strict(text: str) -> None:
    strict = marked_number(text)
    assert strict is None or final_number(text) == strict


@given(st.decimals(-(10**9), 10**9, places=2), st.sampled_from(["{}", "${}", "is {}.", "{:,}"]))
def test_any_number_is_read_back(number: Decimal, form: str) -> None:
    written = form.format(number)
    assert marked_number(f"#### {written.removeprefix('is ')}") == number
    assert final_number(f"it {written}") == number


def test_examples_are_solved_rightly() -> None:
    for _, answer in EXAMPLES:
        last = [*re.finditer(r"([\d.]+(?: [-+*/] [\d.]+)+) = (\d+)", answer)]
        for equation in last:
            assert math.isclose(eval(equation[1]), float(equation[2])), equation[0]
        assert last and marked_number(answer) == Decimal(last[-1][2])


def test_prompts() -> None:
    plain = write_prompt(SUMS[0], 2)
    assert plain.count("Question: ") == 3 and plain.endswith("plus 1?\nAnswer:")
    assert write_prompt(SUMS[0], 0) == "Question: What is 1 plus 1?\nAnswer:"
    assert "####" in write_prompt(SUMS[0], 0, chat=True)


@pytest.mark.parametrize(
    "text",
    [
        "    return x + 1\n",
        "Here:\n```python\ndef add1(x):\n    return x + 1\n```\nThat is all.",
        "```\n    return x + 1\n```",
        "```python\ndef add1(x):\n    return x + 1\n",
    ],
)
def test_programs_are_put_together(text: str) -> None:
    assert grade(PROGRAMS[1], [text]).marks == {"pass@1": 1.0}


def test_helpers_of_the_prompt_stay() -> None:
    row = {
        "task_id": "x",
        "prompt": "from math import sqrt\n\n\ndef f(x):\n    '''Root.'''\n",
        "entry_point": "f",
        "test": "def check(c):\n    assert c(4) == 2\n",
    }
    assert grade(row, ["```python\ndef f(x):\n    return sqrt(x)\n```"]).marks["pass@1"] == 1.0
    assert "check(f)" in program(row, "    return 2")


@settings(deadline=None)
@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_pass(samples: int, data: Any) -> None:
    passed = data.draw(st.integers(0, samples))
    k = data.draw(st.integers(1, samples))
    chosen = list(itertools.combinations([1] * passed + [0] * (samples - passed), k))
    # Exact but for one division.
    assert pass_at_k(samples, passed, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))


def test_intervals_are_the_known_ones() -> None:
    # Wilson: solves (share - p)^2 = z^2 p (1 - p) / n at both ends.
    for hits, trials in ((0, 4), (3, 10), (10, 10), (1000, 1319)):
        found = wilson(hits / trials, trials)
        assert found.low is not None and found.high is not None
        assert 0 <= found.low <= found.value <= found.high <= 1 and found.low < found.high
        for end in (found.low, found.high):
            if 0 < end < 1:
                left, right = (found.value - end) ** 2, 1.959964**2 * end * (1 - end) / trials
                assert left == pytest.approx(right, rel=1e-9)
    # Exact binomial by hand: 5 wins, 1 loss: 2 * (1 + 6) / 64.
    source, result = [0.0] * 5 + [1.0] + [1.0] * 4, [1.0] * 5 + [0.0] + [1.0] * 4
    assert mcnemar(source, result) == pytest.approx(2 * 7 / 64)
    assert mcnemar(source, source) == 1.0
    assert mcnemar([0.5], [1.0]) is None


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(*[st.sampled_from([0.0, 0.3, 1.0])] * 2), min_size=1, max_size=30),
    st.booleans(),
)
def test_every_score_has_an_interval_that_holds_it(
    pairs: list[tuple[float, float]], whole: bool
) -> None:
    source, result = ([float(round(x)) if whole else x for x in column] for column in zip(*pairs))
    for found in (mean_score(source, seed=0), mean_gain(source, result, seed=0)):
        assert found.low is not None and found.high is not None
        # The bootstrap's ends are means too: rounding of a sum of thirty.
        assert found.low - 1e-12 <= found.value <= found.high + 1e-12
    same = mean_gain(source, source, seed=0)
    assert same.value == 0 and same.low < 0 < same.high


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """95 % in the mean over these shares; a simulation of 400 has a deviation of 1.1 %."""
    draw = random.Random(0)
    for share, gain in ((0.1, 0.05), (0.5, 0.0), (0.8, 0.1)):
        held = [0, 0]
        for _ in range(400):
            rolls = [draw.random() for _ in range(100)]
            source = [float(roll < share) for roll in rolls]
            result = [float(roll < share + gain) for roll in rolls]
            one, two = mean_score(source, seed=0), mean_gain(source, result, seed=0)
            held[0] += one.low <= share <= one.high
            held[1] += two.low <= gain <= two.high
        assert min(held) >= 0.92 * 400


def test_right_answers_are_marked_right(
    folder: Path, sums: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(lambda model, prompt: "700" not in prompt.rpartition("Question")[2])
    monkeypatch.setattr(asking, "generate", writer)
    found = score(
        [f"gsm8k={sums},humaneval={programs}"], folder, run_generated_code=True, batch_size=3
    )
    values = {f"{s.task} {s.measure}": s.source.value for s in found}
    assert values == {
        "gsm8k strict match": 0.75,
        "gsm8k flexible match": 0.75,
        "humaneval pass@1": 1.0,
    }
    assert [len(call["prompts"]) for call in writer.calls] == [3, 1, 3]
    assert writer.calls[0]["stop"] == ("Question:",) and writer.calls[2]["stop"] == STOP
    assert all(call["temperature"] == 0 for call in writer.calls)
    assert all(s.source.low < s.source.high for s in found)


def test_samples_give_pass_at_k(
    folder: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()
    writer = Writer(lambda model, prompt: next(calls) % 10 == 0)
    monkeypatch.setattr(asking, "generate", writer)
    found = score([f"humaneval={programs}"], folder, run_generated_code=True, samples=10, limit=2)
    assert {s.measure: s.source.value for s in found} == {
        "pass@1": pytest.approx(0.1),
        "pass@10": 1.0,
    }
    assert found[0].settings == "10 samples at temperature 0.8"
    assert writer.calls[0]["temperature"] == 0.8 and len(set(writer.calls[0]["prompts"])) == 1
    with pytest.raises(UsageError, match="all be the same"):
        score([f"humaneval={programs}"], folder, run_generated_code=True, samples=2, temperature=0)


def test_a_short_context_gets_fewer_examples(sums: Path, tmp_path: Path) -> None:
    long = write_rows(
        tmp_path / "long.jsonl", [*SUMS, {"question": "word " * 400, "answer": "#### 1"}]
    )
    folder = save_tiny(tmp_path / "short", max_position_embeddings=600)
    subject = open_subject(folder)
    chosen = open_tasks([f"gsm8k={sums}"], TaskOptions())
    (fitted,) = fit_tasks(chosen, subject, None).own
    assert 0 <= fitted.shots < 8 and fitted.max_new_tokens == 300
    assert any(f"{fitted.shots} of 8 examples fit" in text for text in fitted.warnings)
    (fitted,) = fit_tasks(open_tasks([f"gsm8k={long}"], TaskOptions()), subject, None).own
    assert fitted.shots == 0
    assert any("1 of 5 problems do not fit" in text for text in fitted.warnings)


def test_a_run_that_was_cut_off_goes_on(
    folder: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "texts"

    class Killed(Writer):
        def __call__(self, *args: Any, **how: Any) -> Any:
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().__call__(*args, **how)

    given = [f"gsm8k={sums}"]
    options = {"batch_size": 1, "generations": out}
    monkeypatch.setattr(asking, "generate", Killed())
    with pytest.raises(KeyboardInterrupt):
        score(given, folder, **options)
    path = out / "gsm8k.source.jsonl"
    assert len(path.read_text().splitlines()) == 3
    path.write_text(path.read_text() + '{"problem": 2, "te')  # killed while it wrote
    writer = Writer()
    monkeypatch.setattr(asking, "generate", writer)
    resumed = score(given, folder, **options)
    assert len(writer.calls) == 2
    assert [json.loads(line)["problem"] for line in path.read_text().splitlines()[1:]] == [
        *range(4)
    ]
    assert resumed == score(given, folder, batch_size=1)
    assert len(writer.calls) == 6
    score(given, folder, shots=1, **options)  # another prompt: nothing of it counts
    assert len(writer.calls) == 10


def test_an_interrupted_command_says_how_to_go_on(
    folder: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlakit.cli import app

    def interrupt(*args: Any, **how: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(asking, "generate", interrupt)
    (tmp_path / "text.txt").write_text("it is so. " * 60)
    done = CliRunner().invoke(
        app,
        [
            *("eval", str(folder), "--text", str(tmp_path / "text.txt"), "--windows", "1"),
            *("--prefix-length", "64", "--suffix-length", "16", "--no-recall"),
            *("--tasks", f"gsm8k={sums}", "-o", str(tmp_path / "out")),
        ],
    )  # fmt: skip
    assert done.exit_code == 130
    assert "answers to tasks are kept. To go on:" in done.output


def test_humaneval_is_refused_unless_allowed(folder: Path, programs: Path) -> None:
    with pytest.raises(UsageError, match=r"runs the programs.*on this machine") as raised:
        evaluate(folder / "absent", tasks=[f"humaneval={programs}"])
    assert "--run-generated-code" in raised.value.remedy


@pytest.mark.parametrize(
    "given,options,message",
    [
        (["gsm8k", "gsm8k"], {}, "given twice"),
        ([], {"limit": 3}, "no tasks"),
        (["gsm8k"], {"samples": 3}, "for humaneval only"),
        (["gsm8k"], {"limit": 0}, "limit of tasks must be at least 1"),
        (["gsm8k"], {"shots": 9}, "8 worked examples"),
        (["gsm8k=/nowhere.jsonl"], {}, "cannot read the problems"),
        (["=x"], {}, "no name"),
    ],
)
def test_what_makes_no_sense_is_refused(given: list[str], options: Any, message: str) -> None:
    with pytest.raises(MlakitError, match=message):
        open_tasks(given, TaskOptions(**options))


def test_bad_problems_are_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    for text, message in (
        ('{"question": "a", "answer": "#### 1"}\n{nonsense', "line 2 is not JSON"),
        ('\n{"question": "a"}', "line 2 is no problem of gsm8k: it has no text under 'answer'"),
        ("[1]", "line 1 is no problem"),
        ('{"question": "a", "answer": "b"}', "problem 1 of gsm8k has no number"),
        ("", "holds no problem"),
    ):
        path.write_text(text)
        with pytest.raises(MlakitError, match=message):
            open_tasks([f"gsm8k={path}"], TaskOptions())
    (tmp_path / "bad.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(MlakitError, match="cannot read the problems"):
        open_tasks([f"gsm8k={path}.gz"], TaskOptions())


def test_without_a_file_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="come from the hub") as raised:
        open_tasks(["gsm8k"], TaskOptions())
    assert "--tasks gsm8k=FILE.jsonl" in raised.value.remedy
    with pytest.raises(UsageError, match="lm-eval, which is not installed") as raised:
        open_tasks(["mmlu"], TaskOptions())
    assert "mlakit[tasks]" in raised.value.remedy


def test_a_report_of_two_models_shows_tasks(
    folder: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlakit.cli import app

    writer = Writer(lambda model, prompt: len(writer.calls) == 1)
    monkeypatch.setattr(asking, "generate", writer)
    text = tmp_path / "text.txt"
    text.write_text("it is so. " * 60)
    out = tmp_path / "out"
    command = [
        *("eval", str(folder), str(folder), "--text", str(text), "--windows", "2"),
        *("--prefix-length", "64", "--suffix-length", "16", "--no-recall"),
        *("--tasks", f"gsm8k={sums}", "--limit", "4", "--shots", "1", "--json", "-o"),
    ]
    done = CliRunner().invoke(app, [*command, str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report = Report.model_validate_json(done.stdout)
    assert {s.measure for s in report.tasks} == {"strict match", "flexible match"}
    first = report.tasks[0]
    assert first.result is not None and first.difference is not None
    assert (first.source.value, first.result.value, first.difference.value) == (1, 0, -1)
    assert first.p_value == 2 / 2**4
    listed = {row.label: row for row in rows(report)}
    row = listed["gsm8k, strict match, %"]
    assert row.source == "100 [51.0, 100]" and row.result == "0 [0, 49.0]"
    assert row.note == "4 problems, 1 example, greedy"
    page, stream = render_html(report), io.StringIO()
    print_report(report, Console(file=stream))
    for shown in (page, stream.getvalue()):
        assert row.source in shown and "difference" in shown
    assert {path.name for path in (out / "tasks").iterdir()} == {
        "gsm8k.source.jsonl",
        "gsm8k.result.jsonl",
    }
    assert (out / "tasks.png").stat().st_size > 5_000
    monkeypatch.setattr(asking, "generate", Writer(lambda model, prompt: True))
    done = CliRunner().invoke(app, [*command, str(tmp_path / "healed"), "--before", str(out)])
    assert done.exit_code == 0, done.output
    healed = Report.model_validate_json(done.stdout)
    assert healed.before and not healed.before.missing
    listed = {row.label: row for row in rows(healed)}
    assert listed["gsm8k, strict match, %"].result == "100 [51.0, 100]"
    assert listed["gsm8k, strict match, before"].result == "0 [0, 49.0]"
    bars = task_scores(healed)
    assert bars is not None and len(bars.axes) == 2 and len(bars.axes[0].get_yticks()) == 3


def test_an_earlier_report_has_to_fit(folder: Path, sums: Path, tmp_path: Path) -> None:
    estimate = {"value": 0.5}
    score = TaskScore(
        task="gsm8k", measure="strict match", problems=4, settings="greedy",
        source=estimate, result=estimate,
    )  # fmt: skip
    earlier = SimpleNamespace(
        source=SimpleNamespace(fingerprint="one"), result=SimpleNamespace(name="small"),
        tasks=[score],
    )  # fmt: skip
    require_same_source(earlier, "one", "original")
    for fingerprint, result in (("two", earlier.result), ("one", None)):
        other = SimpleNamespace(**{**vars(earlier), "result": result})
        with pytest.raises(UsageError, match="does not compare a result with original"):
            require_same_source(other, fingerprint, "original")
    longer = score.model_copy(update={"settings": "8 examples, greedy"})
    found = tasks_before(earlier, [score, longer])
    assert found.tasks == [score] and found.missing == ["gsm8k, strict match"]


def test_prompts_go_through_the_chat_template(
    folder: Path, sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer()
    monkeypatch.setattr(asking, "generate", writer)
    options = TaskOptions(chat=True, shots=1)
    subject = open_subject(folder)
    chosen = open_tasks([f"gsm8k={sums}"], options)
    with pytest.raises(UsageError, match="no chat template"):
        fit_tasks(chosen, subject, None)
    subject.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    found = run_tasks(fit_tasks(chosen, subject, None), subject, None)
    assert found[0].source.value == 1 and "chat template" in found[0].settings
    assert writer.calls[0]["chat"] and writer.calls[0]["stop"] == ()
    assert all("#### and the number" in prompt for prompt in writer.calls[0]["prompts"])


def test_running_out_of_memory_says_what_to_do(
    folder: Path, sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **how: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(asking, "generate", full)
    with pytest.raises(MlakitError, match="no memory for 8 prompts of gsm8k") as raised:
        score([f"gsm8k={sums}"], folder)
    assert "--batch-size" in raised.value.remedy


def test_a_real_model_answers_and_repeats_itself(folder: Path, sums: Path, programs: Path) -> None:
    """Nothing faked: nonsense in, nonsense out, twice the same."""
    given = [f"gsm8k={sums}", f"humaneval={programs}"]
    options = {"run_generated_code": True, "limit": 1, "shots": 0}
    first = score(given, folder, **options)
    assert first == score(given, folder, **options)
    assert [s.source.value for s in first] == [0, 0, 0]


def test_the_real_problems(shared: Path) -> None:
    data = shared / "data"
    files = [f"gsm8k={data / 'gsm8k' / 'test.jsonl'}"]
    files += [f"humaneval={data / 'humaneval' / 'HumanEval.jsonl.gz'}"]
    sums_, programs_ = open_tasks(files, TaskOptions(run_generated_code=True)).own
    assert (len(sums_.rows), len(programs_.rows)) == (1319, 164)
    for row in sums_.rows:
        assert all(sums_.grade(row, [row["answer"]]).marks.values())
        wanted = Decimal(row["answer"].partition("####")[2].strip().replace(",", ""))
        assert final_number(f"The answer is {wanted}.") == wanted
    asked = " ".join(row["question"] for row in sums_.rows)
    assert not any(question in asked for question, _ in EXAMPLES)
    packed = (data / "humaneval" / "HumanEval.jsonl.gz").read_bytes()
    lines = gzip.decompress(packed).decode().splitlines()
    solutions = [json.loads(line)["canonical_solution"] for line in lines]
    for row, solution in list(zip(programs_.rows, solutions, strict=True))[::16]:
        whole = f"```python\n{row['prompt']}{solution}\n```"
        assert programs_.grade(row, [solution]).marks == {"pass@1": 1.0}, row["task_id"]
        assert programs_.grade(row, [whole, ""]).marks == {"pass@1": 0.5}, row


def test_limits_and_packed_files(tmp_path: Path, sums: Path) -> None:
    packed = tmp_path / "sums.jsonl.gz"
    packed.write_bytes(gzip.compress(sums.read_bytes()))
    keys = ("question", "answer")
    for path in (sums, packed):
        for limit, count in ((None, 4), (2, 2), (9, 4)):
            found = read_problems("gsm8k", str(path), None, keys, limit)
            assert found == SUMS[:count]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="no lm-eval")
def test_lm_eval_asks_its_own_tasks(folder: Path, tmp_path: Path) -> None:
    write_rows(
        tmp_path / "data.jsonl",
        [
            {"q": "to be or" + i * " so", "choices": [" not", " x"], "label": i % 2}
            for i in range(4)
        ],
    )
    (tmp_path / "tiny_choice.yaml").write_text(
        "task: tiny_choice\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path}/data.jsonl\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{label}}"\n'
        "metric_list:\n  - metric: acc\n"
    )
    (tmp_path / "tiny_words.yaml").write_text(
        "task: tiny_words\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path}/data.jsonl\ntest_split: test\n"
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{q}}"\n'
        "metric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte\n"
    )
    manager = open_harness({"tiny_choice": str(tmp_path)})
    subject = open_subject(folder)
    names, options = ["tiny_choice", "tiny_words"], TaskOptions(limit=4)
    model = ordinary_model(subject, options)
    record = ask_harness(manager, names, model, subject.name, options, 0)
    found, *words = harness_scores([record, record], 0)
    for score_ in words:
        assert not score_.share and score_.result == score_.source
        assert score_.source.low < score_.source.value < score_.source.high
    assert [score_.measure for score_ in words] == ["word_perplexity", "bits_per_byte"]
    assert found.problems == 4 and found.share and found.source.value == 0.5
    assert found.difference.value == 0 and found.p_value == 1.0
    assert found.source.low < 0.5 < found.source.high
    with pytest.raises(UsageError, match="knows no task nonsense"):
        open_harness({"nonsense": None})
