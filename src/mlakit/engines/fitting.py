"""A converted layer at other sizes, in mlakit's own layout: the same function, plus zeros.

What an engine's kernel has no room for in its shapes is filled up: latent rows of zeros, rotary
pairs that are zero and do not turn, nope and value rows of zeros. Queries that a matrix per head
makes of the source's own become one projection where no norm stands between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlakit.engines.shapes import Shape, padded
from mlakit.spec import AttentionSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Fitting:
    """The maths of one layer.

    Args:
        layer: its sizes as stored.
        shape: its sizes as run.
    """

    layer: AttentionSpec
    shape: Shape

    def attention(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A layer's attention at the new sizes.

        Args:
            tensors: the layer's own, named below ``self_attn.``.

        Returns:
            The same names, but for ``q_up_proj`` where it went into ``q_proj``; what changed is
            float64.
        """
        found = dict(tensors)
        if "q_up_proj.weight" in found:
            self._queries_from_matrices(found)
        else:
            for name in ("q_proj.weight", "q_proj.bias"):
                if name in found:
                    found[name] = self._query_rows(self._heads(found[name])).flatten(0, 1)
        for name in ("kv_a_proj_with_mqa.weight", "kv_a_proj_with_mqa.bias"):
            if name in found:
                found[name] = self._row(found[name].double())
        norm = found["kv_a_layernorm.weight"]
        found["kv_a_layernorm.weight"] = norm[:1].expand(self.shape.rank)  # 2^k, all the same
        found["kv_b_proj.weight"] = self._ups(found["kv_b_proj.weight"])
        output = self._heads(found["o_proj.weight"].mT)
        found["o_proj.weight"] = padded(output, self.shape.value).flatten(0, 1).mT
        return found

    def _heads(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.double().unflatten(0, (self.layer.num_attention_heads, -1))

    def _queries_from_matrices(self, found: dict[str, torch.Tensor]) -> None:
        up = self._query_rows(found.pop("q_up_proj.weight").double())
        if self.layer.qk_norm:
            found["q_up_proj.weight"] = up
            return
        found["q_proj.weight"] = (up @ self._heads(found["q_proj.weight"])).flatten(0, 1)
        if "q_proj.bias" in found:
            bias = self._heads(found["q_proj.bias"])[..., None]
            found["q_proj.bias"] = (up @ bias).flatten()

    def _query_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """``[H, N + R, ...]`` at the new N and R."""
        nope = self.layer.qk_nope_head_dim or 0
        return _cat(padded(rows[:, :nope], self.shape.nope), self._turned(rows[:, nope:], 1), 1)

    def _row(self, rows: torch.Tensor) -> torch.Tensor:
        """``[C + R, ...]`` at the new C and R."""
        rank = self.layer.kv_lora_rank or 0
        return _cat(padded(rows[:rank], self.shape.rank, 0), self._turned(rows[rank:], 0), 0)

    def _turned(self, rows: torch.Tensor, dim: int) -> torch.Tensor:
        """Real parts, then imaginary ones, each with zeros for what does not turn."""
        real, imaginary = (padded(part, self.shape.rope // 2, dim) for part in rows.chunk(2, dim))
        return _cat(real, imaginary, dim)

    def _ups(self, up: torch.Tensor) -> torch.Tensor:
        nope, heads = self.layer.qk_nope_head_dim or 0, self._heads(up)
        keys = padded(heads[:, :nope], self.shape.nope)
        values = padded(heads[:, nope:], self.shape.value)
        return padded(_cat(keys, values, 1).flatten(0, 1), self.shape.rank)


def _cat(first: torch.Tensor, second: torch.Tensor, dim: int) -> torch.Tensor:
    import torch

    return torch.cat((first, second), dim)


def layer_frequencies(config: dict[str, Any], rope: int) -> tuple[list[list[float]], float]:
    """The rotary frequencies of every layer, with zeros up to R / 2, and a factor on cos and sin.

    Args:
        config: ``config.json`` of a converted model.
        rope: R as run.
    """
    from mlakit.nn.configs import CONFIGS
    from mlakit.nn.rotary import inverse_frequencies, layer_schedules

    kind: Any = CONFIGS[str(config["model_type"]).removeprefix("mla_")]
    own = kind.from_dict(config)
    table, factor = inverse_frequencies(own)
    schedules = layer_schedules(own) or [0] * own.num_hidden_layers
    rows = padded(table.reshape(-1, table.shape[-1]), rope // 2).tolist()
    return [rows[schedule] for schedule in schedules], factor
