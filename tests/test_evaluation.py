"""Quality after a cached prefix, recall, memory, speed and verification, on tiny models."""

from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from mlakit.data import NEUTRAL_LINES, passkey_prompt
from mlakit.errors import MlakitError, UsageError, VerificationError
from mlakit.evaluation import Subject, check, evaluate, verify
from mlakit.evaluation.energy import EnergyMeter
from mlakit.evaluation.memory import measure_cache, whole_pages
from mlakit.evaluation.quality import (
    bootstrap,
    continuation_logits,
    cut_windows,
    kl_divergence,
    score_windows,
    summarise,
    window_lengths,
)
from mlakit.evaluation.recall import finds, measure_recall, recall_lengths, token_counter
from mlakit.evaluation.speed import measure_speed
from mlakit.reporting.schema import Estimate, Report
from mlakit.reporting.summary import notes, rows

CONTEXT = 256
SHORT = {"prefix_length": 48, "suffix_length": 16}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and a bos."""
    symbols = ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    """Two GQA layers whose attention matters: weights far larger than transformers draws."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def source() -> Subject:
    return Subject("source", tiny_model(), byte_tokenizer())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = random.Random(0).choices(NEUTRAL_LINES, k=200)
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def story(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The beginning of a real text: tokenising all of it takes longer than the tests."""
    path = tmp_path_factory.mktemp("story") / "story.txt"
    path.write_text((shared / "data" / "tinystories" / "train.txt").read_text()[:30_000])
    return path


@pytest.fixture(scope="module")
def folder(source: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    source.model.save_pretrained(path)
    source.tokenizer.save_pretrained(path)
    return path


def perturbed(source: Subject, amount: float) -> Subject:
    """The same model with noise on its keys' and values' weights."""
    model = copy.deepcopy(source.model)
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                noise = torch.randn_like(projection.weight)
                projection.weight.add_(amount * noise)
    return Subject(f"perturbed {amount}", model, source.tokenizer)


def forgetful(source: Subject, rows: int) -> Subject:
    """The same weights, but after every call the first cached rows are wiped out."""
    model = copy.deepcopy(source.model)

    def wipe(module: torch.nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        cache = kwargs.get("past_key_values")
        for layer in cache.layers if cache is not None else []:
            layer.keys[:, :, :rows] = 0
            layer.values[:, :, :rows] = 0

    model.register_forward_hook(wipe, with_kwargs=True)
    return Subject("forgetful", model, source.tokenizer)


def test_kl_equals_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = 5 * torch.randn(2, 7, 50, generator=generator)

    def softmax(row: list[float]) -> list[float]:
        weights = [math.exp(x - max(row)) for x in row]
        return [w / math.fsum(weights) for w in weights]

    for row in range(7):
        p, q = softmax(a[row].double().tolist()), softmax(b[row].double().tolist())
        expected = math.fsum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
        # Both are float64: a few hundred roundings of 1.1e-16.
        assert float(kl_divergence(a, b)[row]) == pytest.approx(expected, rel=1e-12)


@settings(deadline=None)
@given(
    logits=st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=20),
    shift=st.floats(-100, 100),
)
def test_kl_is_zero_for_equal_distributions_and_never_negative(
    logits: list[float], shift: float
) -> None:
    a = torch.tensor([logits], dtype=torch.float64)
    assert float(kl_divergence(a, a)) == 0.0
    assert 0.0 <= float(kl_divergence(a, a + shift)) < 1e-12
    assert float(kl_divergence(a, a.flip(-1))) >= 0.0


def test_continuation_equals_one_pass_and_step_by_step(source: Subject, text: Path) -> None:
    ids = cut_windows(source, None, text=text, **SHORT, count=1).ids[0, :-1]
    with torch.inference_mode():
        one_pass = source.model(input_ids=ids[None]).logits[0, 48:]
    # float32: the two orders of summation differ by some units in the last place.
    tolerance = 1e-4 * float(one_pass.abs().max())
    for chunk in (None, 1, 5):
        logits = continuation_logits(source.model, ids, 48, chunk=chunk)
        assert logits.shape == (16, 257)
        assert float((logits - one_pass).abs().max()) < tolerance


def test_perplexity_equals_direct_computation(source: Subject, text: Path) -> None:
    cut = cut_windows(source, None, text=text, **SHORT, count=3)
    quality = summarise(score_windows(source, None, cut), cut, seed=0)
    with torch.inference_mode():
        logits = source.model(input_ids=cut.ids[:, :-1]).logits[:, 48:]
    targets = cut.ids[:, 49:]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), targets.flatten())
    # The direct computation reads in one batched pass: float32 rounding of logits.
    assert quality.source.nll.value == pytest.approx(float(expected), rel=1e-5)
    assert quality.source.perplexity.value == pytest.approx(math.exp(expected), rel=1e-4)
    assert quality.result is None and quality.agreement is None


def test_windows_are_scored_alone(source: Subject, text: Path) -> None:
    cut = cut_windows(source, None, text=text, **SHORT, count=3)
    together = score_windows(source, None, cut).source_nll
    for index in range(3):
        alone = type(cut)(cut.ids[index : index + 1], 48, 16, cut.text, cut.domains[:1])
        assert np.array_equal(score_windows(source, None, alone).source_nll[0], together[index])


def test_a_model_against_itself(source: Subject, text: Path) -> None:
    report = evaluate(source, source, text=text, windows=3, recall=False, **SHORT)
    agreement = report.quality.agreement
    assert agreement is not None and report.result is not None
    assert agreement.kl_mean.value == agreement.kl_p999 == agreement.kl_max == 0.0
    assert agreement.top1.value == 1.0
    assert agreement.tie
    assert report.result.percent_of_own == 100.0
    assert report.result.percent_of_mha == 50.0


def test_kl_grows_with_the_perturbation(source: Subject, text: Path) -> None:
    cut = cut_windows(source, None, text=text, **SHORT, count=3)
    means = [
        summarise(score_windows(source, perturbed(source, amount), cut), cut, seed=0)
        for amount in (0.0, 0.003, 0.03, 0.3)
    ]
    kl = [quality.agreement.kl_mean.value for quality in means if quality.agreement]
    assert kl[0] == 0.0
    assert kl == sorted(set(kl))


def test_a_corrupted_cache_is_seen_where_one_pass_is_blind(source: Subject, text: Path) -> None:
    damaged = forgetful(source, rows=24)
    cut = cut_windows(source, None, text=text, **SHORT, count=2)
    with torch.inference_mode():
        one_pass = [s.model(input_ids=cut.ids[:, :-1]).logits for s in (source, damaged)]
    assert torch.equal(*one_pass)
    agreement = summarise(score_windows(source, damaged, cut), cut, seed=0).agreement
    assert agreement is not None
    assert agreement.kl_mean.value > 0.01
    assert agreement.top1.value < 1.0
    found = check(source, damaged, text=text)
    assert found.one_pass.absolute == 0.0
    assert any("through its cache" in failure for failure in found.failures)
    with pytest.raises(VerificationError, match="through its cache"):
        verify(source, damaged, text=text)


def test_verify_holds_the_threshold(source: Subject, text: Path) -> None:
    changed = perturbed(source, 0.05)
    kl = check(source, changed, text=text).kl_mean
    assert kl > 0
    assert verify(source, changed, text=text, max_kl=2 * kl).failures == []
    with pytest.raises(VerificationError, match="mean KL at most") as raised:
        verify(source, changed, text=text, max_kl=kl / 2)
    assert raised.value.exit_code == 4
    with pytest.raises(UsageError, match="never below 0"):
        verify(source, changed, text=text, max_kl=-1.0)


def test_two_dtypes_of_one_model(source: Subject, text: Path) -> None:
    half = Subject("half", copy.deepcopy(source.model).bfloat16(), source.tokenizer)
    found = verify(source, half, text=text, max_kl=0.5)
    assert found.percent_of_own == 50.0
    assert 0 < found.kl_mean < 0.5


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=2, max_size=12), st.integers(0, 2**31))
def test_bootstrap_is_deterministic_and_holds_the_mean(values: list[float], seed: int) -> None:
    first, second = bootstrap(values, seed=seed), bootstrap(values, seed=seed)
    assert first == second
    assert first.low is not None and first.high is not None
    assert min(values) - 1e-9 <= first.low <= first.high <= max(values) + 1e-9


def test_bootstrap_interval_is_about_right() -> None:
    values = np.random.default_rng(0).normal(size=400)
    estimate = bootstrap(values, seed=0)
    assert estimate.low is not None and estimate.high is not None
    # Normal theory: 2 * 1.96 / sqrt(400) = 0.196; the sample's own spread varies by some percent.
    assert estimate.high - estimate.low == pytest.approx(0.196, rel=0.15)
    assert bootstrap([1.5], seed=0).low is None


@settings(deadline=None)
@given(st.integers(2, 10_000))
def test_default_lengths_fit_every_context(context: int) -> None:
    prefix, suffix = window_lengths(context, None, None)
    assert prefix >= 1 and suffix >= 1 and prefix + suffix <= context
    if context >= 2304:
        assert (prefix, suffix) == (2048, 256)


def test_lengths_that_do_not_fit_are_refused(source: Subject, text: Path) -> None:
    for prefix, suffix in ((CONTEXT, 1), (0, 4), (4, 0)):
        with pytest.raises(UsageError, match=f"context of {CONTEXT}"):
            evaluate(source, text=text, prefix_length=prefix, suffix_length=suffix)
    with pytest.raises(UsageError, match="at least one window"):
        evaluate(source, text=text, windows=0)


def test_a_text_too_short_is_refused(source: Subject, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(MlakitError, match="10 tokens"):
        evaluate(source, text=short)


def test_models_of_different_tokens_are_refused(source: Subject, text: Path) -> None:
    other = copy.deepcopy(source.model)
    other.resize_token_embeddings(300)
    with pytest.raises(UsageError, match="257 tokens and other has 300"):
        evaluate(source, ("other", other, source.tokenizer), text=text)


def test_nan_logits_are_refused(source: Subject, text: Path) -> None:
    broken = copy.deepcopy(source.model)
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(MlakitError, match="broken computes NaN"):
        evaluate(source, ("broken", broken, source.tokenizer), text=text, recall=False)
    assert check(source, ("broken", broken, source.tokenizer), text=text, max_kl=9.0).failures


def test_measured_bytes_equal_the_account(source: Subject) -> None:
    size = measure_cache(source, 96, batch=2)
    # 2 (K and V) * 2 kv heads * 8 * 2 layers * 4 bytes = 256 bytes per token.
    assert size.measured_bytes == size.accounted_bytes == 256 * 96 * 2
    assert [whole_pages(length) for length in (5, 64, 127, 256)] == [5, 64, 64, 256]


class Oracle(torch.nn.Module):
    """Predicts a known sequence with certainty."""

    def __init__(self, ids: list[int], config: LlamaConfig) -> None:
        super().__init__()
        self.sequence = torch.tensor([*ids, 0])
        self.config = config
        self.device = torch.device("cpu")

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: object
    ) -> SimpleNamespace:
        end = attention_mask.shape[1]
        targets = self.sequence[end - input_ids.shape[1] + 1 : end + 1]
        return SimpleNamespace(logits=torch.nn.functional.one_hot(targets, 257)[None].float())


def test_recall_is_exact_and_only_that(source: Subject) -> None:
    tokenizer = source.tokenizer
    probe = passkey_prompt(200, 0.5, count_tokens=token_counter(source), seed=3)
    wrong = f"{int(probe.answer) ^ 1:05d}"
    for written, expected in ((probe.answer, True), (wrong, False)):
        whole = [0, *tokenizer(f"{probe.prompt} {written}", add_special_tokens=False)["input_ids"]]
        oracle = Subject("oracle", Oracle(whole, source.model.config), tokenizer)
        assert finds(oracle, probe) is expected


def test_recall_of_an_untrained_model_is_not_usable(source: Subject) -> None:
    recall = measure_recall(source, source, lengths=(160,), depths=(0.0, 1.0), trials=1)
    assert recall is not None
    assert [cell.kind for cell in recall.cells] == ["passkey"] * 2 + ["key_value"] * 2
    assert not any(column.usable for column in recall.columns())
    assert recall_lengths(512) == (128, 256, 512)
    with pytest.raises(UsageError, match="at least one trial"):
        measure_recall(source, trials=0)


def test_lengths_too_short_for_a_probe_are_left_out(source: Subject) -> None:
    tiny = Subject("tiny", copy.deepcopy(source.model), source.tokenizer)
    tiny.model.config.max_position_embeddings = 40
    assert measure_recall(tiny) is None


def test_speed_has_both_models_at_every_length(source: Subject) -> None:
    speed = measure_speed(source, source, lengths=(8, 16), decoded_tokens=2, repeats=1)
    assert speed.result is not None
    for points in (speed.source, speed.result):
        assert [point.length for point in points] == [8, 16]
        assert all(p.prefill_seconds > 0 and p.decode_tokens_per_second > 0 for p in points)
        # The cache grows by 256 bytes per token.
        assert points[1].bytes_moved - points[0].bytes_moved == 8 * 256
    assert speed.copy_bandwidth > 0
    counted = EnergyMeter(source.model.device).counters
    assert all((p.decode_joules_per_token is not None) == bool(counted) for p in speed.source)
    with pytest.raises(UsageError, match="context of 256"):
        measure_speed(source, lengths=(256,))


def test_evaluate_is_the_same_twice(source: Subject, text: Path) -> None:
    other = perturbed(source, 0.05)
    reports = [
        evaluate(source, other, text=text, windows=2, max_new_tokens=4, **SHORT) for _ in range(2)
    ]
    same = [report.model_dump(exclude={"environment": {"created"}}) for report in reports]
    assert same[0] == same[1]
    assert len(reports[0].samples) == 2
    assert reports[0].recall is not None


def test_prompts_are_written_as_far_as_the_context_reaches(source: Subject, text: Path) -> None:
    found = evaluate(source, text=text, windows=1, recall=False, prompts=["a" * 246], **SHORT)
    (sample,) = found.samples
    assert len(source.tokenizer(sample.source).input_ids) <= 10
    scored: list[str] = []
    with pytest.raises(UsageError, match="prompt 0 has 256 tokens"):  # before anything is measured
        evaluate(source, text=text, windows=1, prompts=["a" * 256], **SHORT,
                 progress=lambda what, done, total: scored.append(what))  # fmt: skip
    assert not scored


def test_eval_and_verify_from_the_command_line(folder: Path, text: Path, tmp_path: Path) -> None:
    from mlakit.cli import app

    runner = CliRunner()
    common = [str(folder), str(folder), "--text", str(text), "--json"]
    out = tmp_path / "out"
    done = runner.invoke(
        app, ["eval", *common, "--windows", "2", "--no-recall", "-o", str(out)],
        catch_exceptions=False,
    )  # fmt: skip
    assert done.exit_code == 0
    report = Report.model_validate_json(done.stdout)
    assert report.source.fingerprint and report.quality.agreement
    assert report.quality.agreement.kl_max == 0.0
    assert (out / "report.html").is_file() and (out / "cache.png").is_file()
    done = runner.invoke(app, ["verify", *common], catch_exceptions=False)
    assert done.exit_code == 0
    assert json.loads(done.stdout)["percent_of_own"] == 100.0


def test_a_real_checkpoint(shared: Path, story: Path) -> None:
    model = shared / "models" / "stories260k"
    report = evaluate(model, model, text=story, windows=2, recall=False, max_new_tokens=8)
    assert (report.quality.prefix_length, report.quality.suffix_length) == (384, 128)
    assert report.source.bytes_per_token == 5 * 2 * 4 * 8 * 4
    assert report.source.percent_of_mha == 50.0
    # Its README: 4.5 to 5.6 inside stories; two windows that cross stories scatter above.
    assert 3.0 < report.quality.source.perplexity.value < 15.0
    assert report.quality.agreement and report.quality.agreement.kl_max == 0.0


@pytest.fixture(scope="module")
def converted(
    shared: Path, story: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """stories260k converted both ways."""
    from mlakit.conversion.apply import convert

    root = tmp_path_factory.mktemp("converted")
    model = shared / "models" / "stories260k"
    convert(model, root / "equal", equal_cache=True)
    convert(model, root / "half", cache_ratio=0.5, calibration=story, calibration_tokens=4096)
    return {"source": model, **{name: root / name for name in ("equal", "half")}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_equal_cache_is_equal_to_rounding(
    converted: dict[str, Path], story: Path, dtype: str
) -> None:
    found = verify(converted["source"], converted["equal"], text=story, windows=1, dtype=dtype)
    assert len(found.promises) == 3
    assert found.percent_of_own == 100.0


def test_compressed_report_has_real_bytes(converted: dict[str, Path], story: Path) -> None:
    options = {"text": story, "windows": 2, "recall": False, "max_new_tokens": 0}
    report = evaluate(converted["source"], converted["half"], **options)
    assert report.result is not None and report.memory.result is not None
    assert report.result.attention == "mla compress"
    assert (report.result.percent_of_own, report.result.percent_of_mha) == (50.0, 25.0)
    size = report.memory.result
    assert size.measured_bytes == size.accounted_bytes == 512 * 640
    assert report.quality.agreement and report.quality.agreement.kl_mean.value > 0.01
    alone = evaluate(converted["half"], **options)
    assert (alone.source.percent_of_own, alone.source.percent_of_mha) == (50.0, 25.0)
    # A compressed model keeps one promise without a threshold: its cache is its one pass.
    assert len(verify(converted["source"], converted["half"], text=story).promises) == 1


def test_several_texts_are_scored_each(source: Subject, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    texts = [str(text), f"backwards={other}"]
    report = evaluate(source, source, text=texts, **SHORT, windows=2, recall=False, prompts=["a"])
    assert [domain.name for domain in report.domains] == ["lines", "backwards"]
    assert report.quality.windows == 4 and all(d.windows == 2 for d in report.domains)
    parts = [domain.source_nll.value for domain in report.domains]
    assert sum(parts) / 2 == pytest.approx(report.quality.source.nll.value)
    assert all(d.kl is not None and d.kl.value == 0.0 for d in report.domains)
    labels = [row.label for row in rows(report)]
    assert "KL on backwards" in labels and "perplexity on lines" in labels
    assert (
        evaluate(source, text=text, **SHORT, windows=2, recall=False, prompts=["a"]).domains == []
    )
    found = check(source, source, text=texts, windows=1)
    assert found.domains.keys() == {"lines", "backwards"}
    assert all(kl == 0.0 and loss > 0 for kl, loss in found.domains.values())
    bad = report.domains[1].model_copy(update={"kl": Estimate(value=5.0)})
    good = report.domains[0].model_copy(update={"kl": Estimate(value=0.1)})
    assert "backwards" in notes(report.model_copy(update={"domains": [good, bad]}))[0]
