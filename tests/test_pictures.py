"""Pictures of what is cached, of what heads look at, and of where a decode step stands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

import mlakit
from mlakit import account
from mlakit.benching.published import H100
from mlakit.benching.roofline import attention_roofline
from mlakit.cli.inspect import inspect as inspect_verb
from mlakit.cli.trace import trace as trace_verb
from mlakit.nn.attention import LatentAttention
from mlakit.nn.trace import track_shapes
from mlakit.reporting.cached import blocks_of, draw_cached
from mlakit.reporting.heads import draw_heads, favourite
from mlakit.reporting.style import as_png
from mlakit.spec import AttentionSpec

DEMO = Path(mlakit.__file__).parent / "assets" / "demo_model"
LLAMA_3_8B = AttentionSpec(4096, 32, 8, 128, softmax_scale=128**-0.5)


def kinds(layer: AttentionSpec) -> dict[str, AttentionSpec]:
    return {
        "MHA": account.as_mha(layer),
        "GQA": layer,
        "MQA": account.as_mqa(layer),
        "MLA": account.as_mla(layer, 512, 64),
        "equal-cache": account.as_equal_cache(layer),
    }


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_blocks_are_what_is_cached() -> None:
    for name, spec in kinds(LLAMA_3_8B).items():
        blocks = blocks_of(spec)
        assert sum(block.numbers for block in blocks) == spec.cache_width
        # every query head reads one key and one value, or the latent and the rotary key
        assert sum(block.readers for block in blocks) == 2 * 32
        assert len(blocks) == {"MHA": 64, "GQA": 16}.get(name, 2)


def test_cached_is_drawn_to_scale_with_its_bytes() -> None:
    figure = draw_cached(kinds(LLAMA_3_8B), 2)
    assert "2,048 numbers, 4,096 bytes, 25 %" in texts(figure)
    assert "576 numbers, 1,152 bytes, 7 %" in texts(figure)
    assert as_png(figure).startswith(b"\x89PNG")


def test_roofline_is_the_accounts() -> None:
    figure = attention_roofline(kinds(LLAMA_3_8B), H100, context=8192, itemsize=2)
    cost = account.attention_cost(LLAMA_3_8B, 8192, 2)
    assert cost.bound(989e12, 3350e9) == "memory"
    # 8 heads' keys and values of 8,192 tokens and the new one at 3,350 GB/s
    assert f"{8193 * 4096 / 3350e9 * 1e6:.1f} µs" == "10.0 µs" and "10.0 µs" in texts(figure)
    assert "GQA, 1.4 % of its arithmetic" in texts(figure)  # 4 of the ridge's 295 FLOP per byte
    assert "matmul 989 TFLOPS (bfloat16, stated)" in texts(figure)


def test_favourite_of_a_head() -> None:
    eye = torch.eye(6)
    assert favourite(eye) == "itself 100 %"
    before = torch.cat([eye[:1], eye[:-1]])
    assert favourite(before) == "the one before 100 %"
    assert favourite(eye[:1].expand(6, 6)) == "the first 100 %"
    assert favourite(eye[:2]) == "" and favourite(torch.eye(2)) == ""


def test_heads_of_one_layer_carry_the_tokens() -> None:
    layer = LatentAttention(32, 6, 12, 4, 4, 4)
    with track_shapes(layer, keep_weights=True) as shapes:
        layer(torch.randn(1, 5, 32), causal=True)
    figure = draw_heads(shapes.journeys, ["a", " b", "\n", "d", "e"])
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == 6 and len(figure.axes) == 8  # two places of the second line stay empty
    assert [label.get_text() for label in shown[0].get_yticklabels()] == ["a", "b", "\\n", "d", "e"]
    assert not shown[1].get_yticklabels() and shown[2].get_xticklabels()
    assert shapes.journeys[0].weights is not None
    drawn = torch.tensor(shown[3].images[0].get_array())
    torch.testing.assert_close(drawn, shapes.journeys[0].weights[0, 3].detach(), rtol=0, atol=0)


def test_verbs_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {"context": None, "batch": 1, "memory": "24GiB", "as_json": True}
    sizes = {"kv_lora_rank": None, "qk_rope_head_dim": None}
    inspect_verb(str(DEMO), **arguments, **sizes, picture=tmp_path / "cached.png")
    trace_verb(
        str(DEMO), text="One two three four", layer=2, heads=False, picture=tmp_path / "heads.png",
        device="cpu", dtype=None, as_json=False,
    )  # fmt: skip
    assert "█" not in capsys.readouterr().out  # drawn, not printed
    for name in ("cached.png", "heads.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
