"""Shape tracing tells what was computed; the numbers name requirements (docs/requirements.md)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

from mlakit.cli.trace import trace
from mlakit.errors import MlakitError, UnsupportedModelError, UsageError
from mlakit.nn.attention import LatentAttention, MultiHeadAttention, SimpleCache
from mlakit.nn.journey import LayerJourney, Step, heat_map, tell
from mlakit.nn.letters import GLOSSARY, axes_after, concatenated, cut, joined, reshaped
from mlakit.nn.trace import trace_example, trace_model, track_shapes

LESSON = """\
MultiHeadAttention: 6 tokens
MHA: 128 → 4 × 32 → 128; B 1, S 6, T 6, D 128, H 4, G 4, d 32; float32
     step                       shape          letters  bytes
     x                          (1, 6, 128)    B S D    3,072
(1)  Q = x W_Q                  (1, 6, 128)    B S H·d  3,072
     K = x W_K                  (1, 6, 128)    B S H·d  3,072
     V = x W_V                  (1, 6, 128)    B S H·d  3,072
(2)  split Q into heads         (1, 6, 4, 32)  B S H d      -  128 → 4 × 32
     split K into heads         (1, 6, 4, 32)  B S H d      -  128 → 4 × 32
     split V into heads         (1, 6, 4, 32)  B S H d      -  128 → 4 × 32
(3)  permute Q                  (1, 4, 6, 32)  B H S d      -
     permute K                  (1, 4, 6, 32)  B H S d      -
     permute V                  (1, 4, 6, 32)  B H S d      -
     append K to the cache      (1, 4, 6, 32)  B H T d  3,072
     append V to the cache      (1, 4, 6, 32)  B H T d  3,072
(4)  scores = Q Kᵀ              (1, 4, 6, 6)   B H S T    576  / √32
     weights = softmax(scores)  (1, 4, 6, 6)   B H S T    576  each row sums to 1
     heads = weights V          (1, 4, 6, 32)  B H S d  3,072
(5)  heads back to token order  (1, 6, 4, 32)  B S H d      -
     concat                     (1, 6, 128)    B S H·d  3,072  4 × 32 → 128
(6)  concat W_0                 (1, 6, 128)    B S D    3,072
cached: K (1, 4, 6, 32) + V (1, 4, 6, 32)
        256 numbers = 1,024 bytes per token in each layer
"""

TINY = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
}
LATENT = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 5,
}


def app() -> typer.Typer:
    verbs = typer.Typer()
    verbs.command()(trace)
    return verbs


def ordinary(family: str, **changes: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{family}Config")(**TINY | changes)
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def converted(**changes: Any) -> nn.Module:
    from mlakit.nn.configs import MLALlamaConfig
    from mlakit.nn.models import MLALlamaForCausalLM

    torch.manual_seed(0)
    return MLALlamaForCausalLM(MLALlamaConfig(**LATENT | changes)).eval()


def named(journey: LayerJourney) -> dict[str, Step]:
    return {step.name: step for step in journey.steps}


def by_letter(step: Step) -> dict[str, int]:
    """Sizes in any order of dimensions: which one is fastest is not ours to say."""
    return dict(zip(step.letters, step.shape, strict=True))


def told(steps: list[str], journey: LayerJourney) -> None:
    """These steps were told, in this order."""
    names = [step.name for step in journey.steps]
    positions = [names.index(name) for name in steps]
    assert positions == sorted(positions), names


# B16, B18, B19: the lesson's journey, to the letter.
def test_lesson_is_this_trace() -> None:
    assert trace_example().text() + "\n" == LESSON


def test_command_without_model_prints_the_lesson() -> None:  # B19
    result = CliRunner().invoke(app(), [])
    assert result.exit_code == 0 and result.stdout == LESSON


def test_six_steps_come_in_order() -> None:  # B16
    steps = trace_example().journeys[0].steps
    numbers = [step.number for step in steps if step.number]
    assert numbers == sorted(numbers) and set(numbers) == {1, 2, 3, 4, 5, 6}


@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 6).flatmap(
        lambda H: st.tuples(st.just(H), st.sampled_from([g for g in range(1, H + 1) if H % g == 0]))
    ),
    st.integers(1, 5),
)
@settings(max_examples=40, deadline=None)
def test_letters_are_the_shapes(B: int, S: int, heads: tuple[int, int], d: int) -> None:  # B07
    H, G = heads
    layer = MultiHeadAttention(H * d, H, G)
    with torch.no_grad(), track_shapes(layer) as tracker:
        layer(torch.randn(B, S, H * d), cache=SimpleCache())
    (journey,) = tracker.journeys
    sizes = journey.sizes
    assert (sizes["H"], sizes["G"], sizes["d"]) == (H, G, d)
    for step in journey.steps:
        expected = tuple(math.prod(sizes[x] for x in each.split("·")) for each in step.letters)
        assert step.shape == expected, step
    assert journey.steps[-1].name == "concat W_0"
    assert sum(kept.numbers_per_token for kept in journey.cache) == 2 * G * d  # A05


@pytest.mark.parametrize("absorbed", [False, True])
def test_latent_attention_names_what_it_caches(absorbed: bool) -> None:  # A11, C04
    sizes = {"kv_lora_rank": 6, "qk_nope_head_dim": 5, "qk_rope_head_dim": 4, "v_head_dim": 3}
    layer, cache = LatentAttention(16, 2, q_lora_rank=7, **sizes), SimpleCache()
    with torch.no_grad(), track_shapes(layer) as tracker:
        layer(torch.randn(1, 4, 16), causal=True, cache=cache)
        layer(torch.randn(1, 1, 16), causal=True, cache=cache, absorbed=absorbed)
    journey = tracker.journeys[1]
    steps = named(journey)
    assert steps["append c_kv to the cache"].shape == (1, 5, 6)
    assert steps["append k_rope to the cache"].shape == (1, 5, 4)
    assert [kept.numbers_per_token for kept in journey.cache] == [6, 4]
    assert steps["c_kv"].note == "the latent, L = f(K)"
    told(["c_q = x W_DQ", "Q = c_q W_UQ", "c_kv", "k_rope", "split Q into heads"], journey)
    if absorbed:
        told(
            ["q_absorbed = q_nope W_UK", "latents = weights c_kv", "heads = latents W_UV"], journey
        )
        assert steps["latents = weights c_kv"].letters == ("B", "H", "S", "C")
        assert "k_nope" not in steps  # never rebuilt
    else:
        told(["k_nope ‖ V = c_kv [W_UK W_UV]", "k_nope", "K", "scores = Q Kᵀ"], journey)
        assert steps["K"].shape == (1, 2, 5, 9)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_any_model_of_transformers(family: str, implementation: str) -> None:  # B18
    changes = {"head_dim": 8} if family == "Qwen2" else {}  # Qwen2's head size is D / H
    model = ordinary(family, attn_implementation=implementation, **changes)
    tracker = trace_model(model, [1, 2, 3, 4, 5])
    assert [journey.layer for journey in tracker.journeys] == [
        f"model.layers.{k}.self_attn" for k in (0, 1, 0, 1)
    ]
    prefill, decode = tracker.journeys[0], tracker.journeys[2]
    d = prefill.sizes["d"]
    assert prefill.kind == "gqa" and (decode.sizes["S"], decode.sizes["T"]) == (1, 6)
    order = ["x", "Q = x W_Q", "split Q into heads", "permute Q", "rotate Q to its position"]
    told([*order, "append K to the cache", "scores = Q Kᵀ", "concat", "concat W_0"], decode)
    steps = named(decode)
    assert steps["rotate Q to its position"].letters == ("B", "H", "S", "d")
    assert steps["append K to the cache"].shape == (1, 2, 6, d)
    assert steps["scores = Q Kᵀ"].shape == (1, 4, 1, 6)
    assert steps["scores = Q Kᵀ"].note.startswith(f"/ √{d}")
    if implementation == "eager":  # D16: GQA repeats K to match the query heads
        assert steps["repeat K in its group"].shape == (1, 4, 6, d)
        assert steps["repeat K in its group"].letters == ("B", "H", "T", "d")
    else:
        assert steps["scores = Q Kᵀ"].nbytes == 0  # a fused kernel never stores them
    assert sum(kept.bytes_per_token for kept in decode.cache) == 2 * 2 * d * 4


def test_multi_query_and_soft_cap() -> None:
    model = ordinary("Gemma2", num_key_value_heads=1, attn_implementation="eager")
    journey = trace_model(model, [1, 2, 3]).journeys[0]
    steps = named(journey)
    assert journey.kind == "mqa"
    assert steps["split K into heads"].letters == ("B", "S", "G", "d")
    assert steps["scores = Q Kᵀ"].note == "/ √256, soft-capped"


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_caches_of_fixed_size_and_windows(family: str) -> None:
    from transformers import StaticCache

    model = ordinary(family, **({"sliding_window": 4} if family == "Mistral" else {}))
    cache = StaticCache(config=model.config, max_cache_len=9)
    with torch.no_grad(), track_shapes(model, keep_weights=True) as tracker:
        model(torch.arange(6)[None], past_key_values=cache, use_cache=True)
        model(torch.arange(1)[None], past_key_values=cache, use_cache=True)
    decode = tracker.journeys[2]
    assert decode.past == 6 and decode.weights is not None and decode.weights.shape[:3] == (1, 4, 1)
    torch.testing.assert_close(decode.weights.sum(-1), torch.ones(1, 4, 1))
    for step in decode.steps:  # transformers may fold query heads into tokens: told as such
        sizes = decode.sizes | {"n": 2, "1": 1}
        expected = [math.prod(sizes[x] for x in each.split("·")) for each in step.letters]
        assert list(step.shape) == expected, step


def test_attention_sinks() -> None:
    model = ordinary("GptOss", attn_implementation="eager", head_dim=8, num_local_experts=4)
    journey = trace_model(model, [1, 2, 3]).journeys[0]
    assert named(journey)["scores ‖ sink"].shape == (1, 4, 3, 4)
    assert journey.sizes["T"] == 3 and named(journey)["heads = weights V"].shape == (1, 4, 3, 8)


@pytest.mark.parametrize("version", ["V2", "V3"])
def test_deepseek_of_transformers(version: str) -> None:  # A11
    changes = {"q_lora_rank": None, "first_k_dense_replace": 2, "head_dim": 8}
    model = ordinary(f"Deepseek{version}", **LATENT | changes)
    for journey in trace_model(model, [1, 2, 3]).journeys[::2]:
        T = journey.sizes["T"]
        steps = named(journey)
        assert steps["append c_kv to the cache"].shape == (1, 1, T, 10)
        assert steps["append k_rope to the cache"].shape == (1, 1, T, 8)
        assert steps["rotate k_rope to its position"].letters == ("B", "1", "S", "R")
        assert steps["k_nope"].letters == ("B", "H", "T", "N")
        assert steps["K"].shape == (1, 4, T, 14)
        told(["c_kv", "k_nope ‖ V = c_kv [W_UK W_UV]", "scores = Q Kᵀ", "concat"], journey)
        assert sum(kept.numbers_per_token for kept in journey.cache) == 18


def test_converted_model_reads_pages() -> None:
    prefill, _, decode, _ = trace_model(converted(), [1, 2, 3, 4, 5]).journeys
    told(["c_kv ‖ k_rope", "write c_kv ‖ k_rope into the pages", "K", "scores = Q Kᵀ"], prefill)
    steps = named(decode)
    scores = steps["scores = [q_absorbed ‖ q_rope] pagesᵀ"]
    assert (scores.shape, scores.nbytes) == ((1, 4, 1, 6), 0)
    assert by_letter(steps["q_absorbed = q_nope W_UK"]) == {"B": 1, "H": 4, "S": 1, "C": 10}
    assert by_letter(steps["heads = latents W_UV"]) == {"B": 1, "H": 4, "S": 1, "V": 5}
    (pages,) = decode.cache
    assert (pages.numbers_per_token, pages.bytes_per_token) == (18, 72)
    assert pages.shape[1:] == (64, 1, 18) and pages.nbytes == math.prod(pages.shape) * 4


def test_equal_cache_form() -> None:
    sizes = {"kv_lora_rank": 16, "qk_nope_head_dim": 0, "qk_rope_head_dim": 16, "v_head_dim": 8}
    model = converted(mla_form="equal-cache", rope_blocks=2, **sizes)
    prefill, _, decode, _ = trace_model(model, [1, 2, 3]).journeys
    assert (prefill.sizes["d"], prefill.sizes["R"]) == (8, 16)
    told(["Q = x W_Q", "q_rope = Q W_UQ", "V = c_kv W_UV", "scores = q_rope k_ropeᵀ"], prefill)
    told(["q_rope = Q W_UQ", "scores = q_rope pagesᵀ", "heads = latents W_UV"], decode)
    assert named(decode)["concat"].shape == (1, 1, 32)


def test_article_form() -> None:
    sizes = {"kv_lora_rank": 32, "qk_nope_head_dim": 0, "qk_rope_head_dim": 8, "v_head_dim": 8}
    prefill, _, decode, _ = trace_model(converted(mla_form="article", **sizes), [1, 2]).journeys
    told(["c_v ‖ c_k = x [W_DV W_DK]", "K = c_k W_UK", "rotate K to its position"], prefill)
    told(["read c_v ‖ c_k", "K = c_k W_UK", "scores = Q Kᵀ"], decode)
    assert named(decode)["c_v"].letters[-1] == "C/2" and decode.sizes["T"] == 3


def test_alike_layers_are_told_once() -> None:
    text = trace_model(ordinary("Llama"), [1, 2, 3]).text()
    assert "model.layers.0.self_attn … model.layers.1.self_attn: 3 tokens; 2 layers" in text
    assert "model.layers.0.self_attn … model.layers.1.self_attn: 1 token after 3; 2" in text
    assert text.count("Q = x W_Q") == 2


def test_other_numbers_say_their_dtype() -> None:
    journeys = trace_model(ordinary("Llama", attn_implementation="eager").bfloat16(), [1, 2])
    weights = named(journeys.journeys[0])["weights = softmax(scores)"]
    assert weights.dtype == "float32" and weights.nbytes == 4 * 2 * 2 * 4
    assert "each row sums to 1, float32" in journeys.text()


def test_nothing_stays_behind_and_nothing_changes() -> None:
    model, ids = ordinary("Llama"), torch.arange(4)[None]
    with torch.no_grad():
        before = model(ids).logits
        with track_shapes(model) as tracker:
            watched = model(ids).logits
        after = model(ids).logits
    assert torch.equal(before, watched) and torch.equal(before, after)
    assert len(tracker.journeys) == 2  # the last call was not watched
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_a_failing_layer_leaves_nothing_behind() -> None:
    layer = MultiHeadAttention(8, 2)
    with pytest.raises(RuntimeError), track_shapes(layer):
        layer(torch.zeros(1, 2, 7))
    assert not layer._forward_hooks and not layer._forward_pre_hooks
    layer(torch.zeros(1, 2, 8))


def test_training_can_be_watched() -> None:
    layer = MultiHeadAttention(8, 2)
    with track_shapes(layer):
        layer(torch.randn(1, 3, 8, requires_grad=True))[0].sum().backward()
    assert layer.W_0.shape == (8, 8) and layer.o_proj.weight.grad is not None


def test_model_without_attention_is_refused() -> None:
    with (
        pytest.raises(UnsupportedModelError, match="no attention layer recognised in Linear"),
        track_shapes(nn.Linear(2, 2)),
    ):
        pass


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_weights_of_every_head(implementation: str) -> None:  # A04
    model = ordinary("Llama", attn_implementation=implementation)
    journeys = trace_model(model, [1, 2, 3, 4], keep_weights=True).journeys
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(torch.tensor([[1, 2, 3, 4]]), output_attentions=True).attentions
    for journey, weights in zip(journeys[:2], expected, strict=True):
        assert journey.weights is not None and journey.weights.shape == (1, 4, 4, 4)
        # the same float32 softmax, by another kernel
        torch.testing.assert_close(journey.weights, weights, rtol=1e-5, atol=1e-6)


def test_heat_map_is_darker_for_more() -> None:  # A04
    weights = torch.tensor([[[[1.0, 0.0], [0.3, 0.7]]]])
    journey = LayerJourney("layer", "mha", 0, {}, (), weights=weights)
    lines = heat_map(journey, ["a", "b\n"]).splitlines()
    assert lines[1] == "head 0"
    assert lines[-2:] == ["  a   0 ██ ··", "b\\n   1 ░░ ▓▓"]


def test_json_holds_the_same(shared: Path) -> None:
    model = str(shared / "models" / "stories260k")
    result = CliRunner().invoke(app(), [model, "--json", "--layer", "3", "--heads"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert len(found["journeys"]) == 2 and found["tokens"]
    journey = found["journeys"][0]
    assert journey["layer"] == "model.layers.3.self_attn" and journey["sizes"]["G"] == 4
    assert journey["steps"][1]["name"] == "Q = x W_Q"
    assert len(journey["weights"][0]) == 8


def test_command_shows_heads_of_a_real_model(shared: Path) -> None:  # A04
    model = str(shared / "models" / "stories260k")
    result = CliRunner().invoke(app(), [model, "--text", "Once upon", "--heads"])
    assert result.exit_code == 0, result.output
    assert "5 layers, the same in each" in result.stdout
    assert result.stdout.count("head 7") == 5 and "upon" in result.stdout


def test_layer_that_is_not_there() -> None:
    result = CliRunner().invoke(app(), ["--layer", "4"])
    assert isinstance(result.exception, UsageError) and "no layer 4" in result.exception.message


def test_model_that_is_not_there(tmp_path: Path) -> None:
    result = CliRunner().invoke(app(), [str(tmp_path)])
    assert isinstance(result.exception, MlakitError)


@pytest.mark.parametrize(
    "letters,old,new,expected",
    [
        ("B S H·d", (2, 6, 8), (2, 6, 4, 2), "B S H d"),
        ("B S C", (1, 6, 8), (1, 1, 6, 8), "B 1 S C"),
        ("B S C", (1, 1, 8), (1, 1, 1, 8), "B 1 S C"),
        ("B S H d", (1, 1, 4, 2), (1, 1, 8), "B S H·d"),
        ("B G n T d", (1, 2, 2, 3, 5), (1, 4, 3, 5), "B H T d"),
        ("B H S d", (1, 4, 1, 5), (1, 2, 2, 5), "B G n·S d"),
        ("B G n·S d", (1, 2, 2, 5), (1, 4, 1, 5), "B H S d"),
        ("B H S C+R", (1, 4, 1, 5), (1, 1, 4, 5), "B 1 H·S C+R"),
        ("B S H·(N+R)", (1, 3, 20), (1, 3, 4, 5), "B S H N+R"),
        ("B S R", (1, 3, 6), (1, 3, 3, 2), "B S R:0 R:1"),
        ("B S R:0 R:1", (1, 3, 2, 3), (1, 3, 6), "B S R"),
        ("B S", (2, 3), (5,), None),
    ],
)
def test_letters_of_views(letters: str, old: Any, new: Any, expected: str | None) -> None:
    sizes = {"H": 4, "G": 2, "n": 2, "d": 2, "N": 3, "R": 2, "S": old[1] if len(old) == 3 else 1}
    found = reshaped(tuple(letters.split()), old, new, sizes)
    assert found == (None if expected is None else tuple(expected.split()))


def test_letters_of_one_key_head() -> None:
    sizes = {"H": 4, "G": 1, "n": 4, "d": 8}
    assert reshaped(("B", "S", "G·d"), (1, 1, 8), (1, 1, 1, 8), sizes) == ("B", "S", "G", "d")
    assert reshaped(("B", "S", "G·d"), (1, 6, 8), (1, 6, 1, 8), sizes) == ("B", "S", "G", "d")


def test_letters_of_permutations() -> None:
    assert axes_after((1, 2), 4) == axes_after((-3, -2), 4) == axes_after((0, 2, 1, 3), 4)
    assert axes_after(((0, 2, 1, 3),), 4) == [0, 2, 1, 3] and axes_after((), 3) == [0, 2, 1]


def test_letters_of_parts() -> None:
    sizes = {"C": 5, "R": 3}
    assert [cut("C+R", 0, 5, sizes), cut("C+R", 5, 3, sizes)] == ["C", "R"]
    assert [cut("R", 0, 4, sizes), cut("R", 4, 4, sizes)] == ["R:0", "R:1"]
    assert concatenated(["R:1", "R:0"]) == "R" and concatenated(["C", "R"]) == "C+R"
    assert joined(["H", "N+R"]) == "H·(N+R)" and joined(["G", "n"]) == "H"
    assert {"B", "S", "T", "H", "G", "D", "N", "R", "C", "V", "P"} <= set(GLOSSARY)


def test_nothing_watched_tells_nothing() -> None:
    assert tell([]) == ""
