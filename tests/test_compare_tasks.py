"""Tasks in ``mlakit compare``: texts written and weighed through what is left of a cache."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from mlakit.baselines import METHODS, Bench, Variant
from mlakit.checkpoint import open_checkpoint
from mlakit.comparison import Comparison, compare
from mlakit.comparison.plan import make_plan
from mlakit.comparison.writing import weigh, write
from mlakit.data import BUILTIN, named_sources
from mlakit.errors import MlakitError, UsageError
from mlakit.evaluation import Subject, open_subject
from mlakit.evaluation.tasks import TaskOptions
from mlakit.evaluation.tasks.harness import ask_harness, open_harness, ordinary_model
from mlakit.families import read_model
from mlakit.generation import generate, prompt_ids
from mlakit.generation.sampling import Sampling
from mlakit.reporting.comparison_page import render_comparison
from mlakit.reporting.comparison_rows import notes, table
from test_tasks import SUMS, write_rows
from tiny_models import TEXT, save_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def subject(tiny: Path) -> Subject:
    return open_subject(tiny)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_an_exact_cache_writes_what_generate_does(subject: Subject, temperature: float) -> None:
    prompts = ["to be or not to be", "a", "to be or not to be"]
    sampling = Sampling(9, temperature, top_p=0.95, stop=("zz",), seed=3)
    wanted = generate(
        subject.model, subject.tokenizer, prompts, max_new_tokens=9, temperature=temperature,
        top_p=0.95, stop=("zz",), seed=3, batch_size=1,
    )  # fmt: skip
    rows = [prompt_ids(subject.tokenizer, prompt, False) for prompt in prompts]
    for place, row in enumerate(rows):
        before = rows[:place].count(row)
        text = write(Variant(subject.model), subject.tokenizer, row, sampling, before)
        assert text.token_ids == wanted.token_ids[place]
        assert text.stream.text == wanted.texts[place]


def test_weights_are_log_likelihoods(subject: Subject) -> None:
    torch.manual_seed(0)
    context = torch.randint(3, 40, (12,)).tolist()
    likely = write(Variant(subject.model), subject.tokenizer, context, Sampling(4, 0.0)).token_ids
    choices = [[5, 6, 7], likely, [9]]
    for cut in (12, 1):
        found = weigh(Variant(subject.model), context[:cut], choices)
        for ids, (value, greedy) in zip(choices, found, strict=True):
            whole = torch.tensor([[*context[:cut], *ids]])
            with torch.no_grad():
                logits = subject.model(whole).logits[0, cut - 1 : -1].double()
            picked = logits.log_softmax(-1)[range(len(ids)), ids]
            # The same float32 sums in another order: 2e-7 of a nat a token was seen.
            assert value == pytest.approx(float(picked.sum()), abs=1e-5)
            assert greedy == (logits.argmax(-1).tolist() == ids)
    assert weigh(Variant(subject.model), context, choices)[1][1]


@pytest.mark.parametrize("method", [m for m in METHODS if not m.trained], ids=lambda m: m.name)
def test_short_prompts_are_answered(
    method: Any, subject: Subject, tiny: Path, tmp_path: Path
) -> None:
    """Tasks ask of a few tokens what the protocol asks of thousands."""
    spec = read_model(open_checkpoint(tiny).config)
    bench = Bench(subject, spec, tiny, tmp_path, named_sources(BUILTIN), seed=0)
    plan = make_plan(spec, methods=[method.name], budgets=(0.5, 0.25))
    for setting in plan.steps[1][1]:
        variant = method.build(bench, setting.value)
        for length in (1, 2, 5, 18):
            text = write(variant, subject.tokenizer, range(3, 3 + length), Sampling(3, 0.0))
            assert text.finish_reason is not None
            [(value, _)] = weigh(variant, range(3, 3 + length), [[4, 5]])
            assert -100 < value < 0


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def test_tasks_stand_beside_the_source(tiny: Path, text: Path, tmp_path: Path) -> None:
    sums = write_rows(tmp_path / "sums.jsonl", SUMS)
    out = tmp_path / "out"

    def run(**more: Any) -> Any:
        options: dict[str, Any] = {"methods": ["fp8", "window"], "budgets": (0.5,), "windows": 2}
        options |= {"text": text, "speed": False, "recall": False, **more}
        return compare(tiny, out, **options)

    asked: dict[str, Any] = {"tasks": [f"gsm8k={sums}"], "limit": 3, "shots": 0}
    found = run(**asked)
    assert isinstance(found, Comparison)
    measures = ["strict match", "flexible match"]
    for point in found.points:
        assert [(s.task, s.measure, s.problems) for s in point.tasks] == [
            ("gsm8k", measure, 3) for measure in measures
        ]
    assert all(s.result is None for s in found.original.tasks)
    for point in found.points[1:]:
        for score, own in zip(point.tasks, found.original.tasks, strict=True):
            assert score.source == own.source and score.difference is not None
    texts = sorted(path.name for path in (out / "tasks").iterdir())
    assert texts == [
        "gsm8k.fp8-8-bits.jsonl", "gsm8k.original.jsonl", "gsm8k.window-50.jsonl",
    ]  # fmt: skip
    lines = table(found)
    assert all("gsm8k, strict match, %" in line for line in lines)
    assert "task gsm8k: 3 problems, greedy" in notes(found)
    assert "gsm8k, flexible match, %" in render_comparison(found)
    stamps = [path.stat().st_mtime_ns for path in sorted((out / "points").iterdir())]
    assert run(**asked).points == found.points
    assert stamps == [path.stat().st_mtime_ns for path in sorted((out / "points").iterdir())]
    for other in ({}, {**asked, "limit": 2}):
        with pytest.raises(UsageError, match="holds another comparison"):
            run(**other)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="no lm-eval")
def test_lm_eval_asks_variants(subject: Subject, tmp_path: Path) -> None:
    """An exact cache gets the marks of lm-eval's own model; whole texts are refused by name."""
    from mlakit.comparison.harness_model import VariantModel

    rows = [
        {"q": "to be or" + i * " so", "choices": [" not", " x y"], "label": i % 2, "a": "be"}
        for i in range(4)
    ]
    data = write_rows(tmp_path / "data.jsonl", rows)
    head = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
    )
    asks = {
        "multiple_choice": 'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{label}}"\n'
        "metric_list:\n  - metric: acc\n",
        "generate_until": 'doc_to_target: "{{a}}"\ngeneration_kwargs:\n  max_gen_toks: 6\n'
        '  until: ["zz"]\nmetric_list:\n  - metric: bleu\n',
        "loglikelihood_rolling": 'doc_to_target: "{{q}}"\n'
        "metric_list:\n  - metric: byte_perplexity\n",
    }
    for kind, rest in asks.items():
        name = f"task: tiny_{kind}\noutput_type: {kind}\n"
        (tmp_path / f"{kind}.yaml").write_text(f'{name}{head}doc_to_text: "{{{{q}}}}"\n{rest}')
    names = ["tiny_multiple_choice", "tiny_generate_until"]
    manager, options = open_harness(dict.fromkeys(names, str(tmp_path))), TaskOptions(limit=4)
    variant = VariantModel(Variant(subject.model), subject, 0)
    ours, theirs = (
        ask_harness(manager, names, model, "it", options, 0)
        for model in (variant, ordinary_model(subject, options))
    )
    for own, other in zip(*(each["samples"]["tiny_generate_until"] for each in (ours, theirs))):
        assert own["filtered_resps"] == other["filtered_resps"]
    for own, other in zip(*(each["samples"]["tiny_multiple_choice"] for each in (ours, theirs))):
        weights = [[value for value, _ in sample["filtered_resps"]] for sample in (own, other)]
        assert weights[0] == pytest.approx(weights[1], abs=1e-4)  # lm-eval sums in float32
        assert own["acc"] == other["acc"]
    with pytest.raises(MlakitError, match="reads no cache"):
        ask_harness(manager, ["tiny_loglikelihood_rolling"], variant, "it", options, 0)
