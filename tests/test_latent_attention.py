"""Latent attention: expanded, absorbed and step by step, against a float64 reference."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from latent_models import (
    FAMILIES,
    FORMS,
    GROUPS,
    HEADS,
    SIZE,
    in_steps,
    latent_config,
    latent_model,
)
from latent_models import token_ids as tokens
from mlakit.nn import attend
from mlakit.nn.hf import new_cache
from mlakit.nn.latent_attention import (
    EqualCacheAttention,
    LatentNorm,
    MLAttention,
)
from mlakit.nn.rotary import LatentRotaryEmbedding

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
"""float32: logits of size 6 after two layers; sums in another order differ by some 1e-5."""

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def turned(x: Tensor, theta: float, blocks: int) -> Tensor:
    """Rotates ``[S, R]`` in float64: pair (m, m + R/2) by position * theta^(-2j/dim)."""
    half = x.shape[-1] // 2
    per_block = half // blocks
    angles = theta ** (-torch.arange(per_block, dtype=torch.float64) / per_block)
    angle = torch.arange(len(x), dtype=torch.float64)[:, None] * angles.repeat(blocks)
    real, imaginary = x[:, :half], x[:, half:]
    return torch.cat(
        (
            real * angle.cos() - imaginary * angle.sin(),
            real * angle.sin() + imaginary * angle.cos(),
        ),
        dim=-1,
    )


def reference(attention: Any, x: Tensor) -> Tensor:
    """The block's output ``[S, D]`` for inputs ``[S, D]``: formulas, head by head, float64."""
    config = attention.config
    w = {name: p.detach().double() for name, p in attention.named_parameters()}
    heads, rank = config.num_attention_heads, config.kv_lora_rank
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    x = x.double()
    q = (x @ w["q_proj.weight"].T + w.get("q_proj.bias", 0.0)).view(len(x), heads, -1)
    down = x @ w["kv_a_proj_with_mqa.weight"].T + w.get("kv_a_proj_with_mqa.bias", 0.0)
    hidden = torch.ones(len(x), len(x)).triu(1).bool()
    outputs = []
    for h in range(heads):
        if config.mla_form == "article":
            c_v, c_k = down.chunk(2, dim=-1)
            k_b, v_b = (w[f"{n}_b_proj.weight"].view(heads, -1, rank // 2)[h] for n in "kv")
            query, key = turned(q[:, h], 10000.0, 1), turned(c_k @ k_b.T, 10000.0, 1)
            values = c_v @ v_b.T
        else:
            latent, k_rope = down[:, :rank], down[:, rank:]
            up = w["kv_b_proj.weight"].view(heads, nope + value, rank)[h]
            q_rope = q[:, h, nope:]
            if config.mla_form == "equal-cache":
                q_rope = q[:, h] @ w["q_up_proj.weight"][h].T
            blocks = config.rope_blocks
            query = torch.cat((q[:, h, :nope], turned(q_rope, 10000.0, blocks)), dim=-1)
            key = torch.cat((latent @ up[:nope].T, turned(k_rope, 10000.0, blocks)), dim=-1)
            values = latent @ up[nope:].T
        assert query.shape == key.shape == (len(x), nope + rope)
        scores = (query @ key.T * config.softmax_scale).masked_fill(hidden, -torch.inf)
        outputs.append(scores.softmax(dim=-1) @ values)
    output = torch.cat(outputs, dim=-1) @ w["o_proj.weight"].T
    return output + w.get("o_proj.bias", 0.0)


BIASES: dict[str, bool] = {"q_bias": True, "kv_a_bias": True, "o_bias": True}
ODD: list[dict[str, Any]] = [
    {"kv_lora_rank": 1, "qk_rope_head_dim": 2, "num_attention_heads": 3},
    {"kv_lora_rank": 5, "qk_rope_head_dim": 6, "num_attention_heads": 5, "v_head_dim": 3},
    {"kv_lora_rank": 24, "qk_nope_head_dim": 5, "v_head_dim": 17, **BIASES},
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("changes", [{}, BIASES], ids=["plain", "biases"])
def test_block_equals_its_formula(form: str, changes: dict[str, Any]) -> None:
    check_block(latent_model(form=form, **changes))


@pytest.mark.parametrize("changes", ODD, ids=["rank1", "rank5", "rank24"])
def test_odd_sizes_equal_the_formula(changes: dict[str, Any]) -> None:
    model = latent_model(**changes)
    check_block(model)
    ids = tokens(2, 9)
    steps = in_steps(model, ids, new_cache(model, 2, 9), (4, 3, 1, 1))
    torch.testing.assert_close(steps, model(ids).logits, **CLOSE)


@torch.no_grad()
def check_block(model: Any) -> None:
    attention, x = model.model.layers[1].self_attn, torch.randn(11, 32)
    positions = torch.arange(11).unsqueeze(0)
    embeddings = model.model.rotary_emb(x, positions)
    output, _ = attention(x.unsqueeze(0), embeddings)
    expected = reference(attention, x)
    # float32 against float64: 1e-6 of the largest entry, which is about 10.
    torch.testing.assert_close(output[0].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("changes", [{}, {**BIASES, "tie_word_embeddings": True}], ids=["", "bt"])
def test_steps_equal_one_pass_with_every_cache(
    family: str, form: str, changes: dict[str, Any]
) -> None:
    model, ids = latent_model(family, form, **changes), tokens(2, 20)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    for cache in (new_cache(model, 2, 20), DynamicCache(config=model.config), DynamicCache()):
        steps = in_steps(model, ids, cache, (7, 5, *[1] * 8))
        torch.testing.assert_close(steps, whole, **CLOSE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family,window", [("mistral", 5), ("qwen2", 5)])
def test_sliding_window_beyond_the_window(family: str, window: int, form: str) -> None:
    changes = {"sliding_window": window}
    if family == "qwen2":
        changes |= {"use_sliding_window": True, "max_window_layers": 1}
    model, ids = latent_model(family, form, **changes), tokens(2, 20)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        unlimited = latent_model(family, form, sliding_window=None)(ids).logits
    torch.testing.assert_close(whole[:, :window], unlimited[:, :window], **CLOSE)
    assert (whole - unlimited).abs().max() > 0.1
    for chunks in ((3, 9, *[1] * 8), (12, 8), (1,) * 20):
        for cache in (new_cache(model, 2, 20), DynamicCache(config=model.config)):
            torch.testing.assert_close(in_steps(model, ids, cache, chunks), whole, **CLOSE)


@pytest.mark.parametrize("form", FORMS)
def test_eager_equals_sdpa_and_gives_weights(form: str) -> None:
    model, ids = latent_model(form=form), tokens(2, 8)
    with torch.no_grad():
        sdpa = model(ids).logits
        model.set_attn_implementation("eager")
        whole = model(ids, output_attentions=True, output_hidden_states=True)
        torch.testing.assert_close(whole.logits, sdpa, **CLOSE)
        assert [w.shape for w in whole.attentions] == [(2, HEADS, 8, 8)] * 2
        assert len(whole.hidden_states) == 3
        for cache in (DynamicCache(), new_cache(model, 2, 8)):
            model(ids[:, :5], past_key_values=cache)
            rest = model(ids[:, 5:], past_key_values=cache, output_attentions=True)
            for step, full in zip(rest.attentions, whole.attentions, strict=True):
                # float32 weights of at most 1; expanded and absorbed sum in another order
                torch.testing.assert_close(step, full[:, :, 5:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("blocks", [1, 3])
def test_rotary_embedding_is_the_familys_own(rope: str, blocks: int) -> None:
    config = latent_config(
        form="compress",
        qk_rope_head_dim=8 * blocks,
        rope_blocks=blocks,
        rope_parameters=dict(ROPES[rope]),
    )
    family = LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        max_position_embeddings=256,
        rope_parameters=dict(ROPES[rope]),
    )
    x, positions = torch.zeros(1), torch.arange(200).view(2, 100)
    ours = LatentRotaryEmbedding(config)(x, positions)
    theirs = LlamaRotaryEmbedding(family)(x, positions)
    for own, other in zip(ours, theirs):
        expected = other[..., :4].repeat(1, 1, 2 * blocks)
        assert torch.equal(own, expected)


def test_latent_norm_is_an_identity_and_a_true_rms_norm() -> None:
    z = torch.randn(1000, 24)
    norm = LatentNorm(24, eps=4.0**12)
    assert norm.weight[0] == 2.0**12
    # eps = 4^12 is 2^24 times mean(z^2) = 1: half a unit in the last place of float32.
    torch.testing.assert_close(norm(z), z, rtol=2e-7, atol=0.0)
    for dtype, unit in ((torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)):
        small = (z / 64).to(dtype)
        torch.testing.assert_close(norm(small), small, rtol=unit, atol=0.0)
    live = LatentNorm(24, eps=1e-6)
    nn.init.normal_(live.weight)
    expected = nn.functional.rms_norm(z, (24,), live.weight, 1e-6)
    torch.testing.assert_close(live(z), expected)


SOURCES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}


def source_model(family: str, **changes: Any) -> Any:
    """A random grouped-query model of a family."""
    torch.manual_seed(3)
    fields = {
        "vocab_size": 50,
        "hidden_size": HEADS * SIZE,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "eos_token_id": None,
        **changes,
    }
    model = SOURCES[family][1](SOURCES[family][0](**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.5)
    return model.eval()


def by_hand(source: Any, family: str, **changes: Any) -> Any:
    """The equal-cache form of a grouped-query model, filled with selectors."""
    attention = source.model.layers[0].self_attn
    model = latent_model(
        family,
        "equal-cache",
        q_bias=attention.q_proj.bias is not None,
        kv_a_bias=attention.k_proj.bias is not None,
        o_bias=attention.o_proj.bias is not None,
        **changes,
    )
    kept = {k: v for k, v in source.state_dict().items() if ".self_attn." not in k}
    model.load_state_dict(kept, strict=False)
    half, width = SIZE // 2, GROUPS * SIZE
    # Entry m of the first half is frequency m mod half of block m // half; its partner follows.
    block, frequency = torch.arange(width // 2) // half, torch.arange(width // 2) % half
    rows = torch.cat((block * SIZE + frequency, block * SIZE + half + frequency))
    for ours, theirs in zip(model.model.layers, source.model.layers):
        new, old = ours.self_attn, theirs.self_attn
        with torch.no_grad():
            new.q_proj.load_state_dict(old.q_proj.state_dict())
            new.o_proj.load_state_dict(old.o_proj.state_dict())
            for name, parameter in new.kv_a_proj_with_mqa.named_parameters():
                value, key = (getattr(p, name) for p in (old.v_proj, old.k_proj))
                parameter.copy_(torch.cat((value, key[rows])))
            identity = torch.eye(width).view(GROUPS, SIZE, width)
            group = torch.arange(HEADS) // (HEADS // GROUPS)
            new.kv_b_proj.weight.copy_(identity[group].flatten(0, 1))
            new.q_up_proj.weight.copy_(identity[group][:, :, rows].transpose(1, 2))
    return model


@pytest.mark.parametrize("rope", ["default", "llama3"])
@pytest.mark.parametrize("family", SOURCES)
def test_equal_cache_by_hand_equals_its_source(family: str, rope: str) -> None:
    changes: dict[str, Any] = {"rope_parameters": dict(ROPES[rope])}
    if family == "mistral":
        changes["sliding_window"] = 6
    source = source_model(
        family, **changes, **({"attention_bias": True} if family == "llama" else {})
    )
    model, ids = by_hand(source, family, **changes), tokens(2, 24)
    with torch.no_grad():
        expected = source(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
    steps = in_steps(model, ids, new_cache(model, 2, 24), (10, *[1] * 14))
    torch.testing.assert_close(steps, expected, **CLOSE)


@pytest.mark.parametrize("form", FORMS)
def test_training_reaches_every_parameter(form: str) -> None:
    model, ids = latent_model(form=form, **BIASES).train(), tokens(2, 12)
    loss = model(ids, labels=ids).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(torch.isfinite(g).all() for g in gradients.values())
    assert all(g.abs().max() > 0 for name, g in gradients.items() if "self_attn" in name)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        # the same float32 operations run again; only sums may take another order
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_close_to_float32(form: str, dtype: torch.dtype) -> None:
    model, ids = latent_model(form=form, initializer_range=0.1), tokens(2, 10)
    with torch.no_grad():
        exact = model(ids).logits
    model.to(dtype)
    steps = in_steps(model, ids, new_cache(model, 2, 10), (6, 1, 1, 1, 1))
    assert steps.dtype == dtype
    # Some 30 roundings of 2^-9 (bfloat16) each on the way, relative to the largest logit.
    error = (steps.float() - exact).abs().max() / exact.abs().max()
    assert error < 30 * 2.0**-9


class LeafTracer(fx.Tracer):
    """Traces a module's own forward: every child is one node and keyword arguments are empty."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def iter(self, obj: fx.Proxy) -> Any:
        if "kwargs" in str(obj.node) or obj.node.target == "keys":
            return iter(())
        return super().iter(obj)


@pytest.mark.parametrize("changes", [{}, BIASES])
def test_vllm_can_follow_the_forward(changes: dict[str, Any], monkeypatch: Any) -> None:
    """vLLM's modelling backend fuses MLA by this graph: norm(linear(x)) once, kv_b after it."""
    module = latent_model(attn_implementation="eager", **changes).model.layers[0].self_attn

    def leaf(attention: Any, query: fx.Proxy, *others: Any, **options: Any) -> Any:
        return query.tracer.create_proxy("call_function", leaf, (query, *others[:2]), {})

    monkeypatch.setattr(attend.ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *arguments: leaf)
    graph = LeafTracer().trace(module, concrete_args={"past_key_values": None})
    calls = {str(node.target): node for node in graph.nodes if node.op == "call_module"}
    assert list(calls) == ["q_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"]
    assert [calls[name].args[0].op for name in list(calls)[:2]] == ["placeholder"] * 2
    assert feeds(calls["kv_a_proj_with_mqa"], calls["kv_a_layernorm"])
    assert feeds(calls["kv_a_layernorm"], calls["kv_b_proj"])
    assert next(node for node in graph.nodes if node.op == "output").args[0][0] is calls["o_proj"]
    check_expansion()


def feeds(source: fx.Node, target: fx.Node) -> bool:
    """Whether one linear reaches the other through shape operations alone."""
    reached = list(source.users)
    while reached:
        node = reached.pop()
        if node is target:
            return True
        if node.op in ("call_function", "call_method"):
            reached += node.users
    return False


def check_expansion() -> None:
    """One call with two arguments of a method that mentions kv_b_proj and returns pairs."""
    forward = ast.parse(textwrap.dedent(inspect.getsource(MLAttention.forward)))
    names = [
        node.func.attr
        for node in ast.walk(forward)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "self"
        and len(node.args) == 2
        and not node.keywords
        and "kv_b_proj" in getattr(MLAttention, node.func.attr).__code__.co_names
    ]
    assert names == ["expand_kv"]
    assert not MLAttention.forward.__code__.co_freevars
    expansion = ast.parse(textwrap.dedent(inspect.getsource(MLAttention.expand_kv)))
    returns = [node for node in ast.walk(expansion) if isinstance(node, ast.Return)]
    assert all(isinstance(node.value, ast.Tuple) for node in returns)


def test_shared_keys_are_not_copied() -> None:
    attention = latent_model(form="equal-cache").model.layers[0].self_attn
    assert isinstance(attention, EqualCacheAttention)
    key, _ = attention.expand_kv(torch.zeros(1, 1, 5, 16), torch.zeros(1, 1, 5, 16))
    assert key.shape[1] == HEADS and key.stride(1) == 0


@pytest.mark.parametrize(
    "form,changes,word",
    [
        ("compress", {"qk_rope_head_dim": 7}, "qk_rope_head_dim"),
        ("compress", {"q_lora_rank": 8}, "q_lora_rank"),
        ("equal-cache", {"qk_nope_head_dim": 8}, "qk_nope_head_dim"),
        ("article", {"kv_lora_rank": 9}, "kv_lora_rank"),
        ("compress", {"mla_form": "absorbed"}, "mla_form"),
    ],
)
def test_impossible_configs_are_refused(form: str, changes: dict[str, Any], word: str) -> None:
    config = latent_config(form=form).to_dict() | changes
    with pytest.raises(Exception, match=word):
        FAMILIES["llama"][0](**config)
