"""Layers with a state of constant size in the place of attention, trained for a few steps.

Linear attention (arXiv 2006.16236), RWKV-4's time mixing (arXiv 2305.13048) and Mamba's selective
state space (arXiv 2312.00752), each a small reference that reads top to bottom. Everything around
them stays the source's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, silu, softplus
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from mlakit.baselines.method import Bench, Method, Setting, Variant
from mlakit.baselines.training import train
from mlakit.baselines.weights import attentions, copied, decoder_layers
from mlakit.errors import UnsupportedModelError
from mlakit.nn.rotary import rotate
from mlakit.spec import ModelSpec

STATES, KERNEL, EXPAND = 16, 4, 2
"""Mamba's numbers per channel of the inner width, taps of its convolution, and inner width."""


class StateCache(DynamicLayer):
    """One layer's state after the tokens it has seen.

    Attributes:
        state: tensors that start with the batch; none before the first token.
    """

    def __init__(self) -> None:
        super().__init__()
        self.state: tuple[Tensor, ...] = ()
        self.seen = 0

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As if they were all held; nobody uses the mask."""
        return self.seen + query_length, 0


def states(model: PreTrainedModel, batch: int, length: int) -> Cache:
    """Empty states for every layer."""
    layers: list[Any] = [StateCache() for _ in range(model.config.num_hidden_layers)]
    return Cache(layers=layers)


class Recurrent(nn.Module):
    """What stands in the place of attention: takes its arguments, keeps a state.

    Args:
        attention: the source's, whose weights it starts from.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.layer_idx: int = attention.layer_idx

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """``[B, S, D]`` to ``[B, S, D]``; the state moves on in the cache, if there is one."""
        own: Any = StateCache()
        if past_key_values is not None:
            own = past_key_values.layers[self.layer_idx]
        mixed, own.state = self.mix(hidden_states, position_embeddings, own.state)
        own.seen += hidden_states.shape[1]
        return mixed, None

    def mix(
        self, x: Tensor, angles: tuple[Tensor, Tensor], state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Outputs ``[B, S, D]`` and the state after them, float32."""
        raise TypeError("a recurrent layer says how it mixes")


class LinearAttention(Recurrent):
    """``phi(q) . sum phi(k) v / phi(q) . sum phi(k)`` with ``phi = elu + 1``, equation 9.

    The projections start as the source's, and keys still turn with their positions.
    """

    o_proj: nn.Linear

    def __init__(self, attention: Any) -> None:
        super().__init__(attention)
        if hasattr(attention, "q_norm"):
            raise UnsupportedModelError(
                "linear attention here takes no norm of queries and keys",
                remedy="leave this method out",
            )
        self.dim: int = attention.head_dim
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, getattr(attention, name))

    def mix(
        self, x: Tensor, angles: tuple[Tensor, Tensor], state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The state is ``sum phi(k) [v, 1]``, ``[B, G, d, d_v + 1]``."""
        q, k, v = (
            getattr(self, name)(x).unflatten(-1, (-1, self.dim)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = (elu(rotate(part, *angles).float()) + 1 for part in (q, k))
        v = torch.cat([v.float(), torch.ones_like(v[..., :1], dtype=torch.float32)], -1)
        q = q.unflatten(1, (k.shape[1], -1))  # [B, G, H/G, S, d]
        before = state[0] if state else k.new_zeros(*k.shape[:2], self.dim, v.shape[-1])
        near = (q @ k.mT.unsqueeze(2)).tril() @ v.unsqueeze(2)
        total = near + q @ before.unsqueeze(2)
        mixed = (total[..., :-1] / total[..., -1:]).flatten(1, 2).transpose(1, 2).flatten(2)
        return self.o_proj(mixed.to(x.dtype)), (before + k.mT @ v,)


class TimeMixing(Recurrent):
    """RWKV-4's time mixing, equations 11 to 16: a forgetting average of values in each channel.

    Values and output start as the source's, keys and receptance at zero: a plain decaying average.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__(attention)
        output, value = attention.o_proj.weight, attention.v_proj
        hidden, width = output.shape
        repeats = width // value.weight.shape[0]
        heads = value.weight.detach().unflatten(0, (-1, attention.head_dim))
        self.key, self.value, self.receptance = (
            nn.Linear(hidden, width, bias=False).to(output) for _ in range(3)
        )
        self.output = nn.Linear(width, hidden, bias=False).to(output)
        for part in (self.key, self.receptance):
            nn.init.zeros_(part.weight)
        self.value.weight.data = heads.repeat_interleave(repeats, 0).flatten(0, 1)
        self.output.weight.data = 2 * output.detach()  # a receptance of zero lets half through
        even = torch.linspace(0, 1, width, device=output.device)
        self.time_decay = nn.Parameter(8 * even - 7)  # lives of e**7 tokens to 1 / e
        self.time_first = nn.Parameter(torch.zeros_like(even))
        self.time_mix = nn.Parameter(torch.full((3, hidden), 0.5, device=output.device))

    def mix(
        self, x: Tensor, angles: tuple[Tensor, Tensor], state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The state is the last input and numerator, denominator and their common exponent."""
        width = len(self.time_decay)
        last, top, low, high = state or (
            torch.zeros_like(x[:, 0]),
            *x.new_zeros(2, len(x), width, dtype=torch.float32),
            x.new_full((len(x), width), -1e38, dtype=torch.float32),
        )
        earlier = torch.cat([last[:, None], x[:, :-1]], 1)
        k, v, r = (
            part(x * share + earlier * (1 - share))
            for part, share in zip(
                (self.key, self.value, self.receptance), self.time_mix.to(x.dtype), strict=True
            )
        )
        decay, found = -self.time_decay.float().exp(), []
        for key, value in zip(k.float().unbind(1), v.float().unbind(1), strict=True):
            now = key + self.time_first
            most = torch.maximum(high, now)
            old, new = (high - most).exp(), (now - most).exp()
            found.append((old * top + new * value) / (old * low + new))
            most = torch.maximum(high + decay, key)
            old, new = (high + decay - most).exp(), (key - most).exp()
            top, low, high = old * top + new * value, old * low + new, most
        mixed = r.sigmoid() * torch.stack(found, 1).to(x.dtype)
        return self.output(mixed), (x[:, -1].detach().clone(), top, low, high)


class SelectiveStates(Recurrent):
    """Mamba's mixer, algorithm 2: a gated convolution and a state space whose steps x chooses.

    Nothing of the source's attention fits it, so it starts as the authors' does, its output small.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__(attention)
        like = attention.o_proj.weight
        hidden = like.shape[0]
        inner, self.rank = EXPAND * hidden, -(-hidden // 16)
        self.in_proj = nn.Linear(hidden, 2 * inner, bias=False).to(like)
        self.conv = nn.Conv1d(inner, inner, KERNEL, groups=inner).to(like)
        self.x_proj = nn.Linear(inner, self.rank + 2 * STATES, bias=False).to(like)
        self.dt_proj = nn.Linear(self.rank, inner).to(like)
        self.out_proj = nn.Linear(inner, hidden, bias=False).to(like)
        steps = torch.logspace(-3, -1, inner, device=like.device)  # of time, as the authors'
        self.dt_proj.bias.data = (steps + (-(-steps).expm1()).log()).to(like)
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        self.out_proj.weight.data *= 0.1
        rates = torch.arange(1, STATES + 1, device=like.device, dtype=torch.float32)
        self.a_log = nn.Parameter(rates.log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner, device=like.device))

    def mix(
        self, x: Tensor, angles: tuple[Tensor, Tensor], state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The state is the last inputs of the convolution and ``[B, E, N]``."""
        u, gate = self.in_proj(x).mT.chunk(2, dim=1)  # [B, E, S] each
        shape = (len(x), u.shape[1])
        taps, h = state or (
            u.new_zeros(*shape, KERNEL - 1),
            u.new_zeros(*shape, STATES, dtype=torch.float32),
        )
        seen = torch.cat([taps, u], -1)
        u = silu(self.conv(seen)).mT
        dt, b, c = self.x_proj(u).split([self.rank, STATES, STATES], -1)
        dt, u, a = softplus(self.dt_proj(dt)).float(), u.float(), -self.a_log.float().exp()
        fades = (dt[..., None] * a).exp()
        adds = (dt * u)[..., None] * b.float()[:, :, None]
        found = []
        for fade, add, read in zip(
            fades.unbind(1), adds.unbind(1), c.float().unbind(1), strict=True
        ):
            h = fade * h + add
            found.append((h @ read[..., None])[..., 0])
        mixed = (torch.stack(found, 1) + self.skip.float() * u) * silu(gate.mT.float())
        return self.out_proj(mixed.to(x.dtype)), (seen[..., -(KERNEL - 1) :].clone(), h)


def replaced(model: PreTrainedModel, kind: type[Recurrent], seed: int) -> PreTrainedModel:
    """A float32 copy with every layer's attention replaced."""
    student = copied(model).float()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer, attention in zip(decoder_layers(student), attentions(student), strict=True):
            layer.self_attn = kind(attention)
    return student


def _settings(spec: ModelSpec, budgets: Sequence[float]) -> list[Setting]:
    return [Setting("every layer", 1.0)]


def _build(kind: type[Recurrent], bench: Bench, value: float) -> Variant:
    return train(bench, replaced(bench.source.model, kind, bench.seed), states)


REST = (
    "in the place of every layer's attention, trained with all else frozen for the steps asked "
    "for, where the authors train whole models from scratch"
)


def _method(name: str, title: str, source: str, what: str, kind: type[Recurrent]) -> Method:
    return Method(
        name,
        title,
        "states",
        source,
        f"{what} {REST}.",
        _settings,
        partial(_build, kind),
        trained=True,
    )


METHODS = (
    _method(
        "linear-trained",
        "linear attention, trained",
        "arXiv 2006.16236",
        "The layer alone, on the source's projections and rotations,",
        LinearAttention,
    ),
    _method(
        "rwkv",
        "RWKV-4, trained",
        "arXiv 2305.13048",
        "Time mixing alone, without channel mixing,",
        TimeMixing,
    ),
    _method(
        "mamba",
        "Mamba, trained",
        "arXiv 2312.00752",
        "The mixer alone, by a plain loop over tokens,",
        SelectiveStates,
    ),
)
