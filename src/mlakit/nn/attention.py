"""Attention as it is taught: multi-head, grouped, multi-query and latent attention, to be read.

Nothing here is tuned. Every line is a formula of the page ``docs/attention.md``, in its order, and
``mlakit trace`` prints the shapes these lines go through. Shape letters: B batch, S query length,
T cached length, H query heads, G key/value heads, D hidden size, d head size, N nope, R rope,
C latent rank, V value size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mlakit.errors import UsageError


class SimpleCache:
    """What one layer remembers of past tokens, grown by concatenation (one cache per layer).

    The attention layer decides what is worth remembering: K and V of every key/value head for
    ordinary attention, the latent and one rotary key for latent attention.
    """

    def __init__(self) -> None:
        self.tensors: tuple[Tensor, ...] = ()

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Add S tokens; the token dimension of every tensor is the last but one.

        Args:
            *new: tensors ``[..., S, width]``, the same kinds in the same order at every call.

        Returns:
            Everything remembered so far, ``[..., T, width]`` each.
        """
        past = self.tensors or tuple(tensor[..., :0, :] for tensor in new)
        self.tensors = tuple(torch.cat(pair, dim=-2) for pair in zip(past, new, strict=True))
        return self.tensors

    @property
    def length(self) -> int:
        """Tokens remembered, T."""
        return self.tensors[0].shape[-2] if self.tensors else 0

    @property
    def nbytes(self) -> int:
        """Bytes held, all sequences of the batch together."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)


class MultiHeadAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, arXiv 1706.03762, section 3.2.2).

    ``num_key_value_heads`` G chooses the kind: G = H is MHA, 1 < G < H is GQA (Ainslie et al.
    2023, arXiv 2305.13245), G = 1 is MQA (Shazeer 2019, arXiv 1911.02150).

    The matrices are whole: for G = H each is D x D whatever H is, and heads exist only in the
    forward pass, so the number of parameters does not depend on H.

    Args:
        hidden_size: D.
        num_attention_heads: H; must divide D.
        num_key_value_heads: G; must divide H. Default H.
        bias: whether the four projections carry a bias.

    Raises:
        UsageError: H does not divide D, or G does not divide H.
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int | None = None,
        *,
        bias: bool = False,
    ) -> None:
        super().__init__()
        kv_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        _check_divides("num_attention_heads", num_attention_heads, "hidden_size", hidden_size)
        _check_divides("num_key_value_heads", kv_heads, "num_attention_heads", num_attention_heads)
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = kv_heads
        self.head_dim = hidden_size // num_attention_heads
        self.softmax_scale = 1 / math.sqrt(self.head_dim)
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.k_proj = nn.Linear(hidden_size, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=bias)

    @property
    def W_Q(self) -> Tensor:
        """``[D, H d]``, so that Q = x W_Q (``q_proj`` stores the transpose)."""
        return self.q_proj.weight.T

    @property
    def W_K(self) -> Tensor:
        """``[D, G d]``, so that K = x W_K."""
        return self.k_proj.weight.T

    @property
    def W_V(self) -> Tensor:
        """``[D, G d]``, so that V = x W_V."""
        return self.v_proj.weight.T

    @property
    def W_0(self) -> Tensor:
        """``[H d, D]``, the linear map that mixes the heads; another name of ``o_proj``."""
        return self.o_proj.weight.T

    def forward(
        self, x: Tensor, *, causal: bool = False, cache: SimpleCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attend, in the six steps of the lesson.

        Args:
            x: token vectors ``[B, S, D]``.
            causal: hide from every token the tokens after it.
            cache: past keys and values; the new ones are appended.

        Returns:
            Output ``[B, S, D]`` and what every head looked at: weights ``[B, H, S, T]``, each row
            sums to 1.
        """
        B, S, _ = x.shape
        H, G, d = self.num_attention_heads, self.num_key_value_heads, self.head_dim

        # (1) project: every new dimension is a mixture of all the old ones
        Q, K, V = self.q_proj(x), self.k_proj(x), self.v_proj(x)

        # (2) split into heads: H parts that do not overlap, D = H d
        Q, K, V = Q.view(B, S, H, d), K.view(B, S, G, d), V.view(B, S, G, d)

        # (3) permute to (B, H, S, d): one matrix per head, laid out for a batched product
        Q, K, V = Q.transpose(1, 2), K.transpose(1, 2), V.transpose(1, 2)
        if cache is not None:
            K, V = cache.append(K, V)
        if G < H:  # GQA, MQA: H/G neighbouring query heads read the same key/value head
            K, V = K.repeat_interleave(H // G, dim=1), V.repeat_interleave(H // G, dim=1)

        # (4) attention in every head at once: softmax(Q Kᵀ / √d) V
        scores = Q @ K.transpose(-1, -2) * self.softmax_scale
        weights = _softmax(scores, causal)
        heads = weights @ V

        # (5) concatenate the heads: H × d back to D
        concat = heads.transpose(1, 2).reshape(B, S, H * d)

        # (6) times W_0: linear, it mixes what the heads found and loses nothing
        return self.o_proj(concat), weights


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    A token is remembered as one latent c_kv of C numbers, from which keys and values of all heads
    are rebuilt, and one key k_rope of R numbers that carries the position for all heads. The two
    ways to use them give the same result: *expanded* rebuilds K and V; *absorbed* moves W_UK to
    the query and W_UV behind the weighted sum, so that only latents are ever read.

    Args:
        hidden_size: D.
        num_attention_heads: H.
        kv_lora_rank: C.
        qk_nope_head_dim: N, the part of a query/key head without position.
        qk_rope_head_dim: R, the part with position; even.
        v_head_dim: V.
        q_lora_rank: rank of the query latent; None projects queries directly.
        num_key_value_heads: G, heads rebuilt from the latent, each shared by H/G query heads.
            Default H, as in DeepSeek; fewer combines latents with grouped queries.
        rope_theta: base of the rotary frequencies.

    Raises:
        UsageError: G does not divide H, or R is odd.
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        q_lora_rank: int | None = None,
        num_key_value_heads: int | None = None,
        rope_theta: float = 10000.0,
    ) -> None:
        super().__init__()
        kv_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        _check_divides("num_key_value_heads", kv_heads, "num_attention_heads", num_attention_heads)
        _check_divides("a rotated pair", 2, "qk_rope_head_dim", qk_rope_head_dim)
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = kv_heads
        self.queries_per_key = num_attention_heads // kv_heads
        self.kv_lora_rank = kv_lora_rank
        self.qk_nope_head_dim = qk_nope_head_dim
        self.qk_rope_head_dim = qk_rope_head_dim
        self.v_head_dim = v_head_dim
        self.q_lora_rank = q_lora_rank
        self.rope_theta = rope_theta
        query_width = num_attention_heads * (qk_nope_head_dim + qk_rope_head_dim)
        self.softmax_scale = 1 / math.sqrt(qk_nope_head_dim + qk_rope_head_dim)
        if q_lora_rank is None:
            self.q_proj = nn.Linear(hidden_size, query_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden_size, q_lora_rank, bias=False)
            self.q_a_layernorm = nn.RMSNorm(q_lora_rank, eps=1e-6)
            self.q_b_proj = nn.Linear(q_lora_rank, query_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(
            hidden_size, kv_lora_rank + qk_rope_head_dim, bias=False
        )
        self.kv_a_layernorm = nn.RMSNorm(kv_lora_rank, eps=1e-6)
        self.kv_b_proj = nn.Linear(
            kv_lora_rank, kv_heads * (qk_nope_head_dim + v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(num_attention_heads * v_head_dim, hidden_size, bias=False)

    @property
    def W_DKV(self) -> Tensor:
        """``[D, C]``, down: c_kv = norm(x W_DKV). The upper part of ``kv_a_proj_with_mqa``."""
        return self.kv_a_proj_with_mqa.weight[: self.kv_lora_rank].T

    @property
    def W_KR(self) -> Tensor:
        """``[D, R]``: k_rope = RoPE(x W_KR). The lower part of ``kv_a_proj_with_mqa``."""
        return self.kv_a_proj_with_mqa.weight[self.kv_lora_rank :].T

    @property
    def W_UK(self) -> Tensor:
        """``[H, N, C]``, up: the key of head h is W_UK[h] c_kv (a part of ``kv_b_proj``)."""
        return self._up_projections()[0]

    @property
    def W_UV(self) -> Tensor:
        """``[H, V, C]``, up: the value of head h is W_UV[h] c_kv (a part of ``kv_b_proj``)."""
        return self._up_projections()[1]

    @property
    def W_0(self) -> Tensor:
        """``[H V, D]``, the linear map that mixes the heads; another name of ``o_proj``."""
        return self.o_proj.weight.T

    def _up_projections(self) -> tuple[Tensor, ...]:
        N, V = self.qk_nope_head_dim, self.v_head_dim
        per_head = self.kv_b_proj.weight.view(-1, N + V, self.kv_lora_rank)
        return per_head.repeat_interleave(self.queries_per_key, dim=0).split([N, V], dim=1)

    def forward(
        self,
        x: Tensor,
        *,
        causal: bool = False,
        cache: SimpleCache | None = None,
        absorbed: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Attend through the latent: the sketch L = f(K), A = g(Q, L), O = A V, in full.

        Args:
            x: token vectors ``[B, S, D]``.
            causal: hide from every token the tokens after it.
            cache: past latents and rotary keys; the new ones are appended.
            absorbed: read latents only, never rebuild K and V. Same result, other order.

        Returns:
            Output ``[B, S, D]`` and what every head looked at: weights ``[B, H, S, T]``, each row
            sums to 1.
        """
        B, S, _ = x.shape
        H, N, R = self.num_attention_heads, self.qk_nope_head_dim, self.qk_rope_head_dim
        past = 0 if cache is None else cache.length
        positions = torch.arange(past, past + S, device=x.device)

        # (1) project: queries, one latent L = c_kv, one rotary key for all heads
        Q = self.q_proj(x) if self.q_lora_rank is None else self._query_through_latent(x)
        c_kv, k_rope = self.kv_a_proj_with_mqa(x).split([self.kv_lora_rank, R], dim=-1)
        c_kv = self.kv_a_layernorm(c_kv)

        # (2) (3) split the queries into heads and permute; rotate the parts that carry position
        q_nope, q_rope = Q.view(B, S, H, N + R).transpose(1, 2).split([N, R], dim=-1)
        q_rope = rotate(q_rope, positions, self.rope_theta)
        k_rope = rotate(k_rope, positions, self.rope_theta)
        if cache is not None:
            c_kv, k_rope = cache.append(c_kv, k_rope)

        # (4) attention: A = softmax(q_nope·k_nope + q_rope·k_rope), O = A V
        step = self._absorbed if absorbed else self._expanded
        heads, weights = step(q_nope, q_rope, c_kv, k_rope, causal)

        # (5) concatenate, (6) times W_0
        concat = heads.transpose(1, 2).reshape(B, S, H * self.v_head_dim)
        return self.o_proj(concat), weights

    def _query_through_latent(self, x: Tensor) -> Tensor:
        c_q = self.q_a_layernorm(self.q_a_proj(x))
        return self.q_b_proj(c_q)

    def _expanded(
        self, q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """Rebuild K ``[B, H, T, N + R]`` and V ``[B, H, T, V]``, then attend as usual."""
        B, T, _ = c_kv.shape
        H, N, V = self.num_attention_heads, self.qk_nope_head_dim, self.v_head_dim
        up = self.kv_b_proj(c_kv).view(B, T, -1, N + V).transpose(1, 2)
        k_nope, values = up.repeat_interleave(self.queries_per_key, dim=1).split([N, V], dim=-1)
        keys = torch.cat([k_nope, k_rope.unsqueeze(1).expand(-1, H, -1, -1)], dim=-1)
        queries = torch.cat([q_nope, q_rope], dim=-1)
        weights = _softmax(queries @ keys.transpose(-1, -2) * self.softmax_scale, causal)
        return weights @ values, weights

    def _absorbed(
        self, q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """q·(W_UK c) = (W_UKᵀ q)·c and Σ a (W_UV c) = W_UV Σ a c: only latents are read."""
        q_absorbed = torch.einsum("bhsn,hnc->bhsc", q_nope, self.W_UK)
        queries = torch.cat([q_absorbed, q_rope], dim=-1)
        keys = torch.cat([c_kv, k_rope], dim=-1)
        scores = torch.einsum("bhsw,btw->bhst", queries, keys) * self.softmax_scale
        weights = _softmax(scores, causal)
        latents = torch.einsum("bhst,btc->bhsc", weights, c_kv)
        return torch.einsum("bhsc,hvc->bhsv", latents, self.W_UV), weights


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half-split pairs.

    Dimensions j and j + R/2 are one complex number, turned by the angle position * theta^(-2j/R).
    Turned so, a query and a key meet with the difference of their positions only.

    Args:
        x: ``[..., S, R]``.
        positions: ``[S]``, integers.
        theta: base of the frequencies.
    """
    R = x.shape[-1]
    exponent = torch.arange(0, R, 2, device=x.device, dtype=torch.float64) / R
    angle = positions[:, None].double() * theta**-exponent  # [S, R/2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    re, im = x.chunk(2, dim=-1)
    return torch.cat([re * cos - im * sin, re * sin + im * cos], dim=-1)


@torch.no_grad()
def merge_key_value_heads(
    attention: MultiHeadAttention, num_key_value_heads: int
) -> MultiHeadAttention:
    """Fewer key/value heads by averaging neighbours: MHA to GQA to MQA.

    The start of GQA uptraining (Ainslie et al. 2023, arXiv 2305.13245, section 2.1). Heads that
    are equal merge without loss; any others lose what set them apart.

    Args:
        attention: the layer to shrink; unchanged.
        num_key_value_heads: G of the result; must divide the layer's own G.

    Raises:
        UsageError: it does not divide.
    """
    G, d = attention.num_key_value_heads, attention.head_dim
    _check_divides("num_key_value_heads", num_key_value_heads, "the layer's key/value heads", G)
    merged = MultiHeadAttention(
        attention.hidden_size,
        attention.num_attention_heads,
        num_key_value_heads,
        bias=attention.q_proj.bias is not None,
    ).to(attention.q_proj.weight)
    state = attention.state_dict()
    for name, tensor in state.items():
        if name.startswith(("k_proj", "v_proj")):
            heads = tensor.reshape(num_key_value_heads, G // num_key_value_heads, d, -1)
            state[name] = heads.mean(dim=1).reshape(num_key_value_heads * d, *tensor.shape[1:])
    merged.load_state_dict(state)
    return merged


def _softmax(scores: Tensor, causal: bool) -> Tensor:
    """Softmax over the keys; ``causal`` hides key j from query i when j > T - S + i."""
    if causal:
        S, T = scores.shape[-2:]
        future = torch.ones(S, T, dtype=torch.bool, device=scores.device).triu(T - S + 1)
        scores = scores.masked_fill(future, -math.inf)
    return scores.softmax(dim=-1)


def _check_divides(part: str, count: int, whole: str, size: int) -> None:
    if count >= 1 and size >= 1 and size % count == 0:
        return
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    nearest = min(divisors, key=lambda n: abs(n - count), default=None)
    raise UsageError(
        f"{whole} {size} is not divisible by {part} {count}",
        remedy=f"use {part} {nearest}, the nearest that divides {size}"
        if nearest
        else f"{whole} must be at least 1",
    )
