"""What exists only trained: each layer against a formula of its own, and that training learns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MambaConfig, RwkvConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention

from mlakit.baselines import METHODS, Bench, Variant, read_prefix
from mlakit.baselines.layers import average_shared, following
from mlakit.baselines.recurrent import (
    LinearAttention,
    Recurrent,
    SelectiveStates,
    TimeMixing,
    replaced,
    states,
)
from mlakit.baselines.sharing import DecoderDecoder, decoder_decoder
from mlakit.baselines.training import divergence, training_windows
from mlakit.baselines.weights import attentions, copied, decoder_layers
from mlakit.checkpoint import open_checkpoint
from mlakit.data import Source
from mlakit.evaluation import open_subject
from mlakit.evaluation.quality import feed
from mlakit.families import read_model
from mlakit.nn.hf import cache_nbytes
from mlakit.nn.rotary import rotate
from tiny_models import TEXT, save_tiny

PREFIX, LENGTH, WINDOW, STEPS = 40, 60, 8, 10
BY_NAME = {method.name: method for method in METHODS}
DOSES = {"mlkv-trained": 2, "yoco": WINDOW, "linear-trained": 1, "rwkv": 1, "mamba": 1}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    path = save_tiny(folder / "model", num_hidden_layers=4)
    (folder / "text.txt").write_text(TEXT)
    spec = read_model(open_checkpoint(path).config)
    text = Source("text", str(folder / "text.txt"))
    return Bench(open_subject(str(path)), spec, path, folder / "models", (text,), 0, STEPS)


@pytest.fixture(scope="module")
def trained(bench: Bench) -> dict[str, Variant]:
    return {name: BY_NAME[name].build(bench, dose) for name, dose in DOSES.items()}


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(2, 50, (LENGTH,), generator=torch.Generator().manual_seed(1))


def logits(variant: Variant, ids: Tensor, chunk: int = LENGTH) -> Tensor:
    prefix = read_prefix(
        variant.model, ids[:PREFIX], max_length=LENGTH, new_cache=variant.new_cache
    )
    cache = prefix.copy()
    with torch.no_grad():
        starts = range(PREFIX, LENGTH, chunk)
        return torch.cat([feed(variant.model, ids[i : i + chunk], cache, seen=i) for i in starts])


def untrained(name: str, bench: Bench) -> Any:
    """What training starts from."""
    source = bench.source.model
    if name == "yoco":
        return decoder_decoder(source, WINDOW)
    if name == "mlkv-trained":
        student = copied(source)
        average_shared(attentions(student)[:2])
        average_shared(attentions(student)[2:])
        return student
    kinds: dict[str, type[Recurrent]] = {
        "linear-trained": LinearAttention, "rwkv": TimeMixing, "mamba": SelectiveStates,
    }  # fmt: skip
    return replaced(source, kinds[name], 0)


@pytest.mark.parametrize("name", DOSES)
def test_training_learns_and_leaves_the_source_alone(
    name: str, bench: Bench, trained: dict[str, Variant]
) -> None:
    source, windows = bench.source.model, training_windows(bench)[:4]
    found = trained[name]
    with torch.no_grad():
        before = divergence(source, untrained(name, bench), windows, found.new_cache)
        after = divergence(source, found.model, windows, found.new_cache)
    assert after < before
    assert found.trained_tokens == STEPS * 4 * 64
    assert not any(p.requires_grad for p in found.model.parameters())
    same = zip(source.model.layers, found.model.model.layers, strict=True)
    assert all(torch.equal(a.mlp.up_proj.weight, b.mlp.up_proj.weight) for a, b in same)


@pytest.mark.parametrize("name", DOSES)
def test_steps_equal_one_shot(name: str, trained: dict[str, Variant], ids: Tensor) -> None:
    steps, once = (logits(trained[name], ids, chunk) for chunk in (1, LENGTH))
    # The same sums in another order: float32, logits below 10; measured 1.5e-5.
    torch.testing.assert_close(steps, once, atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    "name,nbytes",
    {
        # two caches of 40 tokens, 2 heads of 8, keys and values, float32
        "mlkv-trained": lambda count: 2 * count * 128,
        # two windows' 7 tokens and one cache of all
        "yoco": lambda count: (2 * (WINDOW - 1) + count) * 128,
        "linear-trained": lambda count: 4 * 2 * 8 * 9 * 4,
        "rwkv": lambda count: 4 * 4 * 32 * 4,  # one input, numerator, denominator, exponent
        "mamba": lambda count: 4 * 64 * (3 + 16) * 4,
    }.items(),
)
def test_bytes_of_what_is_held(
    name: str, nbytes: Callable[[int], int], trained: dict[str, Variant], ids: Tensor
) -> None:
    for count in (20, PREFIX):
        variant = trained[name]
        prefix = read_prefix(
            variant.model, ids[:count], max_length=LENGTH, new_cache=variant.new_cache
        )
        assert cache_nbytes(prefix.copy()) == nbytes(count)


def layer_of(kind: type[Recurrent], bench: Bench) -> tuple[Any, Tensor]:
    """A replaced attention with weights of some size, and inputs ``[2, 17, 32]``."""
    layer: Any = copy.deepcopy(decoder_layers(replaced(bench.source.model, kind, 0))[0].self_attn)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return layer.double(), torch.randn(2, 17, 32, generator=generator).double()


def run(layer: Any, x: Tensor, angles: Any, cut: int) -> Tensor:
    """Outputs of both parts of a sequence, the second on the state of the first."""
    cache: Any = states(LayerCount(), 2, 17)
    with torch.no_grad():
        parts = [
            layer(part, tuple(a[:, rows] for a in angles), past_key_values=cache)[0]
            for part, rows in ((x[:, :cut], slice(cut)), (x[:, cut:], slice(cut, None)))
        ]
    return torch.cat(parts, 1)


class LayerCount:
    """A model of one layer, as far as its cache goes."""

    class config:  # as transformers names it
        num_hidden_layers = 1


def turns(bench: Bench) -> tuple[Tensor, Tensor]:
    rotary: Any = bench.source.model.get_decoder().rotary_emb
    cos, sin = rotary(torch.zeros(1, dtype=torch.float64), torch.arange(17)[None])
    return cos, sin


# The layers hold their state in float32, so float64 formulas are met to its rounding: measured
# 1e-6 at most, and 2.2e-5 where outputs are larger (Mamba's).
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def test_linear_attention_is_the_formula(bench: Bench) -> None:
    layer, x = layer_of(LinearAttention, bench)
    cos, sin = turns(bench)
    q, k, v = (getattr(layer, f"{n}_proj")(x).unflatten(-1, (-1, 8)) for n in "qkv")
    phi = [
        torch.where(y > 0, y + 1, y.exp())
        for y in (rotate(part.transpose(1, 2), cos, sin) for part in (q, k))
    ]
    wanted = torch.zeros(2, 17, 4, 8, dtype=torch.float64)
    for t in range(17):
        for head in range(4):
            weights = (phi[0][:, head, t, None] * phi[1][:, head // 2, : t + 1]).sum(-1)
            weights = weights / weights.sum(-1, keepdim=True)
            wanted[:, t, head] = (weights[..., None] * v[:, : t + 1, head // 2]).sum(1)
    wanted = layer.o_proj(wanted.flatten(2))
    for cut in (9, 16):
        torch.testing.assert_close(run(layer, x, (cos, sin), cut), wanted, **CLOSE)


def test_time_mixing_is_that_of_transformers(bench: Bench) -> None:
    layer, x = layer_of(TimeMixing, bench)
    theirs: Any = RwkvSelfAttention(RwkvConfig(hidden_size=32, attention_hidden_size=32)).double()
    with torch.no_grad():
        for name in ("key", "value", "receptance", "output"):
            getattr(theirs, name).weight.copy_(getattr(layer, name).weight)
        for name in ("time_decay", "time_first"):
            getattr(theirs, name).copy_(getattr(layer, name))
        for row, name in enumerate(("key", "value", "receptance")):
            getattr(theirs, f"time_mix_{name}").copy_(layer.time_mix[row])
        wanted = theirs(x)[0]
    torch.testing.assert_close(run(layer, x, turns(bench), 9), wanted, **CLOSE)


def test_time_mixing_is_a_decaying_average(bench: Bench) -> None:
    """Equation 16 as a sum over all earlier tokens, without a state."""
    layer, x = layer_of(TimeMixing, bench)
    earlier = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
    k, v, r = (
        part(x * share + earlier * (1 - share))
        for part, share in zip(
            (layer.key, layer.value, layer.receptance), layer.time_mix, strict=True
        )
    )
    age = torch.arange(17)[:, None] - torch.arange(17) - 1
    log = k[:, None] - age[..., None] * layer.time_decay.exp()
    log = torch.where((age == -1)[..., None], k[:, None] + layer.time_first, log)
    weights = log.masked_fill((age < -1)[..., None], -torch.inf).softmax(2)
    wanted = layer.output(r.sigmoid() * (weights * v[:, None]).sum(2))
    torch.testing.assert_close(run(layer, x, turns(bench), 16), wanted, **CLOSE)


def test_selective_states_are_those_of_transformers(bench: Bench) -> None:
    layer, x = layer_of(SelectiveStates, bench)
    config = MambaConfig(
        hidden_size=32, state_size=16, conv_kernel=4, expand=2, time_step_rank=2,
        use_bias=False, use_conv_bias=True, num_hidden_layers=1,
    )  # fmt: skip
    theirs: Any = MambaMixer(config, 0).double()
    names = {"in_proj.weight": "in_proj.weight", "conv1d.weight": "conv.weight",
             "conv1d.bias": "conv.bias", "x_proj.weight": "x_proj.weight",
             "dt_proj.weight": "dt_proj.weight", "dt_proj.bias": "dt_proj.bias",
             "out_proj.weight": "out_proj.weight", "A_log": "a_log", "D": "skip"}  # fmt: skip
    ours = dict(layer.named_parameters())
    theirs.load_state_dict({name: ours[own].detach() for name, own in names.items()})
    with torch.no_grad():
        wanted = theirs(x)
    torch.testing.assert_close(run(layer, x, turns(bench), 9), wanted, **CLOSE)


def test_a_decoder_of_decoders_is_attention_over_shared_keys(bench: Bench, ids: Tensor) -> None:
    """The plain model under masks, its upper layers fed the first of them's keys and values."""
    student = decoder_decoder(bench.source.model, WINDOW)
    plain = copied(bench.source.model)
    average_shared(attentions(plain)[2:])
    key = torch.arange(LENGTH)
    near = (key <= key[:, None]) & (key > key[:, None] - WINDOW)
    mask = torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~near, -torch.inf)
    for layer in decoder_layers(plain)[:2]:
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"attention_mask": mask}), with_kwargs=True
        )
    made: dict[str, Tensor] = {}
    for name in ("k_proj", "v_proj"):
        first, second = (getattr(attention, name) for attention in attentions(plain)[2:])
        first.register_forward_hook(lambda _, args, out, name=name: made.update({name: out}))
        second.register_forward_hook(lambda _, args, out, name=name: made[name])
    with torch.no_grad():
        wanted = plain(input_ids=ids[None], use_cache=False).logits[0, PREFIX:]
    got = logits(Variant(student, new_cache=DecoderDecoder(WINDOW)), ids)
    # float32 sums in another order, logits below 10; measured 3.8e-6.
    torch.testing.assert_close(got, wanted, atol=5e-5, rtol=0)


def test_layers_that_share_pass_their_gradients_on(bench: Bench) -> None:
    student = copied(bench.source.model).requires_grad_(True)
    divergence(bench.source.model, student, training_windows(bench)[:1], following(2)).backward()
    leader, follower = attentions(student)[:2]
    assert leader.k_proj.weight.grad.abs().max() > 0 and follower.k_proj.weight.grad is None


def test_no_layer_mixes_by_itself(bench: Bench) -> None:
    with pytest.raises(TypeError, match="how it mixes"):
        Recurrent(attentions(bench.source.model)[0])(torch.zeros(1, 1, 32), (torch.zeros(1),) * 2)
