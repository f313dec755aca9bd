"""``bench``: what it counts, what it refuses to time, what it shows. No test looks at a time."""

from __future__ import annotations

import json
import math

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import mlakit
from decode_cases import problem as decode_problem
from mlakit.benching.clock import Ceilings, Clock, DeviceLost, Timing, kernel_timing
from mlakit.benching.contenders import RIVALS, Absent, ours
from mlakit.benching.problem import Shape, make_problem
from mlakit.benching.published import PUBLISHED
from mlakit.benching.result import Bench, Missing, ShapeResult, make_points
from mlakit.benching.roofline import roofline
from mlakit.benching.sweep import run_sweep, standard_sweeps
from mlakit.benching.truth import DENSE, dense_truth, judge, sample_truth, selected_truth
from mlakit.benching.view import print_bench
from mlakit.cli import app
from mlakit.errors import UsageError
from mlakit.ops import CacheFormat, mla_sparse_decode
from mlakit.ops import reference as reference_module
from mlakit.reporting.style import as_png

CPU = torch.device("cpu")
TINY = {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "page_size": 16}


def roofs() -> Ceilings:
    return Ceilings(4300.0, 4500.0, 790.0, "bfloat16", 8192)


def sweep(shapes, kernels=("cpu",), **options) -> list[ShapeResult]:
    return list(run_sweep(shapes, kernels, Clock(CPU), roofs(), 2, **options))


@pytest.mark.parametrize(
    "heads,length,gigaflop,megabytes",
    [(16, 4096, 18.3, 608), (32, 4096, 36.5, 613), (128, 4096, 146.0, 640), (128, 8192, 292, 1244)],
)
def test_flop_and_bytes_are_flashmlas(heads, length, gigaflop, megabytes) -> None:
    shape = Shape(heads, length, 128)
    assert shape.flops == 2 * 128 * heads * length * (576 + 512)
    assert shape.nbytes == 2 * (128 * heads * 576 + 128 * length * 576 + 128 * heads * 512)
    assert shape.flops / 1e9 == pytest.approx(gigaflop, rel=3e-3)
    assert shape.nbytes / 1e6 == pytest.approx(megabytes, rel=2e-3)


def test_other_caches_are_counted_as_they_are_stored() -> None:
    plain, fp8 = Shape(16, 4096, 8), Shape(16, 4096, 8, cache_format="fp8")
    assert plain.nbytes - fp8.nbytes == 8 * 4096 * (1152 - 656)
    exact = Shape(32, 100, 2, kv_lora_rank=1024, qk_rope_head_dim=1024, rope_scores=True)
    assert exact.flops == 2 * 2 * 32 * 100 * (1024 + 1024)
    assert exact.nbytes == 2 * 2 * (32 * 2048 + 100 * 2048)


def test_ragged_lengths_are_the_same_every_time() -> None:
    shape = Shape(16, 1000, 64, queries=2, varlen=True)
    assert shape.lengths == shape.lengths and len(set(shape.lengths)) > 30
    assert min(shape.lengths) >= 2 and 800 < sum(shape.lengths) / 64 < 1200


def test_standard_sweeps() -> None:
    cases = standard_sweeps(on_cuda=True, quick=False)
    assert {h for h, *_ in cases} == {16, 32, 64, 128}
    wide = {case for case in cases if case[0] == 128}
    assert {length for _, length, *_ in wide} == {1024, 2048, 4096, 8192, 16384, 32768}
    assert {(s, ragged) for _, _, s, ragged in wide} == {
        (1, False), (1, True), (2, False), (2, True),
    }  # fmt: skip
    assert len(cases) == len(set(cases))


@pytest.mark.parametrize("options", [{}, {"sliding_window": 9}, {"soft_cap": 2.0}])
def test_dense_truth_is_the_readable_one(options) -> None:
    case = decode_problem(
        [70, 0, 1, 33], 6, kv_heads=2, queries=2, rank=16, rope=8, block_size=16,
        causal=True, softmax_scale=0.3, **options,
    )  # fmt: skip
    asked = {"softmax_scale": 0.3, "causal": True, **options}
    out, lse = dense_truth(*case.args, **asked)
    true_out, true_lse = case.shaped(*reference_module.decode(case.call))
    # Both are float64 in different orders of summation.
    torch.testing.assert_close(out, true_out, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lse, true_lse, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["fp32", "fp8", "int4"])
def test_selected_truth_is_what_the_operator_computes(kind) -> None:
    fmt = CacheFormat(kind, 32, 16)
    pages = fmt.allocate(3, 8)
    fmt.append(pages, torch.arange(24), torch.randn(24, 48))
    q = torch.randn(2, 3, 5, 48)
    indices = torch.randint(-1, 25, (2, 3, 12), dtype=torch.int32)
    counts, sink = torch.tensor([0, 9], dtype=torch.int32), torch.randn(5)
    found = mla_sparse_decode(
        q, pages, indices, 32, softmax_scale=0.2, topk_length=counts, attn_sink=sink,
        cache_format=fmt,
    )  # fmt: skip
    caches = [(pages, fmt, indices, counts)]
    true = selected_truth(q, caches, 32, softmax_scale=0.2, attn_sink=sink)
    for value, truth in zip(found, true, strict=True):
        # float32 sums of 48 products and 12 weights
        torch.testing.assert_close(value.double(), truth, rtol=1e-4, atol=1e-5)


def test_poison_reaches_no_result() -> None:
    for kind in ("", "fp8", "model1", "int4"):
        shape = Shape(4, 21, 3, 2, varlen=True, cache_format=kind, **TINY)
        problem = make_problem(shape, CPU, poison=True)
        out, _ = ours("cpu")(problem)()
        _, true_out, _ = sample_truth(problem)
        assert out.isfinite().all() and true_out.isfinite().all()


def test_judge_names_what_is_wrong() -> None:
    out, lse = torch.randn(2, 3, 4, 8), torch.randn(2, 4, 3)
    assert judge(out, out, lse, lse, DENSE).wrong == ""
    assert "off by up to" in judge(out + 0.5, out, lse, lse, DENSE).wrong
    assert "lse is off" in judge(out, out, lse + 0.1, lse, DENSE).wrong
    assert "infinite" in judge(out, out, lse.clone().fill_(math.inf), lse, DENSE).wrong
    assert "not finite" in judge(out * math.nan, out, None, lse, DENSE).wrong
    assert "shape" in judge(out[:1], out, None, lse, DENSE).wrong
    # Each of these errors is allowed, and all point the same way.
    small = torch.full((2, 3, 4, 8), 1e-2)
    tilt = torch.tensor([7e-4, -7e-4]).repeat(4)
    assert "cosine" in judge(small + tilt, small, None, lse, DENSE).wrong


def test_a_wrong_kernel_is_not_timed_and_the_sweep_goes_on() -> None:
    def wrong(problem):
        right = ours("cpu")(problem)
        return lambda: (right()[0] + 1, None)

    def broken(problem):
        raise RuntimeError("misaligned address\nand more")

    def away(problem):
        raise Absent("it is away")

    rivals = {"wrong": wrong, "broken": broken, "away": away, "torch SDPA": RIVALS["torch SDPA"]}
    (found,) = sweep([Shape(4, 40, 2, 2, **TINY)], rivals=rivals)
    assert [point.contender for point in found.points] == ["cpu", "torch SDPA"]
    reasons = {gone.contender: gone for gone in found.missing}
    assert reasons["wrong"].failed and "off by" in reasons["wrong"].reason
    assert reasons["broken"] == Missing("broken", "RuntimeError: misaligned address", True)
    assert reasons["away"] == Missing("away", "it is away", False)
    mine, rival = found.points
    assert mine.ratio_to_best_rival == pytest.approx(rival.whole.median / mine.whole.median)
    assert rival.ratio_to_best_rival is None and found.matmul_tflops


def test_a_kernel_that_breaks_while_it_is_timed_is_named() -> None:
    def later(problem):
        right, calls = ours("cpu")(problem), iter(range(9))

        def run():
            if next(calls) == 2:
                raise RuntimeError("an illegal memory access\nand more")
            return right()

        return run

    with pytest.raises(DeviceLost, match="later broke the device: an illegal memory access"):
        sweep([Shape(4, 40, 2, **TINY)], rivals={"later": later})


def test_results_survive_json() -> None:
    found = sweep([Shape(4, 40, 2, varlen=True, **TINY)])[0]
    assert ShapeResult.from_dict(json.loads(json.dumps(found.as_dict()))) == found


def test_a_sweep_without_time_says_so() -> None:
    (found,) = sweep([Shape(4, 40, 2, **TINY)], seconds=-1)
    assert not found.points and "used up" in found.missing[0].reason


def test_rivals_say_why_they_are_not_here() -> None:
    problem = make_problem(Shape(16, 64, 2), CPU)
    for name, rival in RIVALS.items():
        if name != "torch SDPA":
            with pytest.raises(Absent, match=r"not installed|CUDA only|failed|not on"):
                rival(problem)


@pytest.mark.parametrize("queries,varlen", [(1, False), (2, True)])
def test_sdpa_in_mqa_form_is_the_same_attention(queries, varlen) -> None:
    problem = make_problem(Shape(4, 50, 3, queries, varlen, dtype="float32", **TINY), CPU)
    out, _ = RIVALS["torch SDPA"](problem)()
    chosen, true_out, _ = sample_truth(problem)
    # float32 against float64: sums of 50 products, then of 50 weighted values of about 1
    torch.testing.assert_close(out[chosen].double(), true_out, rtol=1e-4, atol=1e-5)


def test_device_time_of_calls_between_flushes() -> None:
    flush = "void at::native::bitwise_not_kernel_cuda(...)"
    events = [(-1.0, "warm-up", 9.0)]
    for call in range(2):
        start = 10.0 * call
        events += [
            (start, flush, 5.0), (start + 1, "plan", 0.1), (start + 2, "attend", 2.0 + call),
            (start + 3, "combine", 0.4),
        ]  # fmt: skip
    found = kernel_timing(events[::-1])
    assert found is not None and found.name == "attend"
    assert found.longest.median == pytest.approx(2.5) and found.longest.runs == 2
    assert found.together.median == pytest.approx(3.0)
    assert kernel_timing([(0.0, flush, 1.0)]) is None


def measured(count: int) -> Bench:
    """Made-up figures of the standard sweep on a GPU."""
    found = []
    for heads, length, queries, varlen in standard_sweeps(on_cuda=True, quick=False)[:count]:
        shape = Shape(heads, length, 128, queries, varlen)
        seconds = shape.flops / roofs().roof(shape.intensity) / 1e12
        timings = {n: Timing(k * seconds, seconds, 3 * seconds, 9) for k, n in ((1.3, "gluon"),
                   (2.1, "torch SDPA"))}  # fmt: skip
        errors = dict.fromkeys(timings, 1e-4)
        found.append(
            ShapeResult(shape, make_points(shape, timings, {}, errors, ("gluon",), roofs()), ())
        )
    settings = {"device": "cuda", "kernels": ["gluon"], "kv_lora_rank": 512, "batch": 128,
                "qk_rope_head_dim": 64, "cache_format": "", "dtype": "bfloat16", "page_size": 64,
                "rope_scores": False}  # fmt: skip
    return Bench(settings, {"gpu": "a GPU"}, roofs(), tuple(found), PUBLISHED)


@pytest.mark.parametrize("count", [0, 1, 32])
def test_roofline_with_none_one_and_many_points(count) -> None:
    done = measured(count)
    assert as_png(roofline(done)).startswith(b"\x89PNG")


def test_table_marks_what_was_not_measured_here() -> None:
    console = Console(record=True, width=80, force_terminal=True)
    print_bench(measured(2), console)
    shown = console.export_text()
    assert "77 %" in shown and "1.62x" in shown
    assert "published, not measured here: FlashMLA" in shown


def test_verb_prints_and_writes(tmp_path) -> None:
    command = ["bench", "decode", "--device", "cpu", "--heads", "4,8", "--lengths", "40",
               "--batch", "2", "--queries", "1,2", "--varlen", "--kv-lora-rank", "32",
               "--qk-rope-head-dim", "16", "--quick", "--kernel", "cpu", "--kernel", "torch",
               "--json", "-o", str(tmp_path)]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "bench.json").read_text())
    assert (tmp_path / "roofline.png").stat().st_size > 10_000
    assert written["environment"]["torch"] == torch.__version__
    assert len(written["shapes"]) == 4 and written["ceilings"]["copy_gb_per_s"] > 0
    for found in written["shapes"]:
        assert [p["contender"] for p in found["points"]] == ["cpu", "torch", "torch SDPA"]
        assert all(p["largest_error"] < 0.01 for p in found["points"])


def test_python_function_has_the_same_names() -> None:
    done = mlakit.bench(
        "decode", device="cpu", heads=[4], lengths=[64], batch=1, kv_lora_rank=64,
        qk_rope_head_dim=64, rope_scores=True, cache_format="int8", rivals=False, quick=True,
        kernel=["cpu"],
    )  # fmt: skip
    assert [point.contender for point in done.shapes[0].points] == ["cpu"]
    assert not done.failures and done.absences == {}


@pytest.mark.parametrize(
    "options,words",
    [
        ({"what": "prefill"}, "no benchmark named 'prefill'"),
        ({"device": "tpu"}, "no device"),
        ({"device": "meta"}, "no clocks"),
        ({"device": "cuda:77"}, "torch sees no device"),
        ({"kernel": ["magic"]}, "no kernel named 'magic'"),
        ({"dtype": "int8"}, "no dtype"),
        ({"cache_format": "fp16"}, "no cache format"),
        ({"batch": 0}, "--batch is 0"),
        ({"heads": [16, 0]}, "--heads is 0"),
        ({"queries": [3], "lengths": [2]}, "do not fit"),
        ({"qk_rope_head_dim": 0, "rope_scores": True}, "at least 1"),
    ],
)
def test_one_clear_error(options, words) -> None:
    with pytest.raises(UsageError, match=words):
        mlakit.bench(**{"device": "cpu", **options})
