"""What the parts of an attention layer are called, and how large they are."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from mlakit.nn.attention import SimpleCache

PROJECTIONS: dict[str, tuple[int | None, str, str, str]] = {
    # child module: (step of the lesson, what it computes, name of the result, its last letter)
    "q_proj": (1, "Q = x W_Q", "Q", "H·d"),
    "k_proj": (1, "K = x W_K", "K", "G·d"),
    "v_proj": (1, "V = x W_V", "V", "G·d"),
    "q_a_proj": (1, "c_q = x W_DQ", "c_q", "Q"),
    "q_b_proj": (1, "Q = c_q W_UQ", "Q", "H·d"),
    "kv_proj": (1, "z = x W_Z, what the source cached", "z", "Z"),
    "kv_a_proj_with_mqa": (1, "c_kv ‖ k_rope = x [W_DKV W_KR]", "c_kv ‖ k_rope", "C+R"),
    "kv_b_proj": (None, "k_nope ‖ V = c_kv [W_UK W_UV]", "k_nope ‖ V", "G·(N+V)"),
    "k_b_proj": (None, "K = c_k W_UK", "K", "G·R"),
    "v_b_proj": (None, "V = c_v W_UV", "V", "G·V"),
    "o_proj": (6, "concat W_0", "output", "D"),
}
WITHOUT_NOPE = (None, "V = c_kv W_UV", "V", "G·V")
"""``kv_b_proj`` where keys are not rebuilt from the latent (equal-cache)."""
WITHOUT_ROPE = (1, "c_v ‖ c_k = x [W_DV W_DK]", "c_v ‖ c_k", "C")
"""``kv_a_proj_with_mqa`` where keys are rotated after they are rebuilt (article)."""

PARTS = {
    # (name of the whole, letter of the part) -> (name, letter)
    ("c_kv ‖ k_rope", "C"): ("c_kv", "C"),
    ("c_kv ‖ k_rope", "R"): ("k_rope", "R"),
    ("c_v ‖ c_k", "C:0"): ("c_v", "C/2"),
    ("c_v ‖ c_k", "C:1"): ("c_k", "C/2"),
    ("Q", "N"): ("q_nope", "N"),
    ("Q", "R"): ("q_rope", "R"),
    ("k_nope ‖ V", "N"): ("k_nope", "N"),
    ("k_nope ‖ V", "V"): ("V", "V"),
    ("W_UK ‖ W_UV", "N"): ("W_UK", "N"),
    ("W_UK ‖ W_UV", "V"): ("W_UV", "V"),
}
JOINS = {
    # names side by side -> name of the whole
    ("q_nope", "q_rope"): "Q",
    ("k_nope", "k_rope"): "K",
    ("q_absorbed", "q_rope"): "q_absorbed ‖ q_rope",
    ("c_kv", "k_rope"): "c_kv ‖ k_rope",
}
NOTES = {
    "c_kv": "the latent, L = f(K)",
    "c_v": "latent of the values",
    "c_k": "latent of the keys",
    "k_rope": "one key for all heads",
}
QUERIES = {"Q", "q_nope", "q_rope", "q_absorbed", "q_absorbed ‖ q_rope"}
KEYS = {"K", "k_nope", "k_rope", "c_kv", "c_kv ‖ k_rope"}


ALIASES = {
    # torch's operation -> the one that means the same to shapes
    "reshape": "view",
    "flatten": "view",
    "unflatten": "view",
    "unsqueeze": "view",
    "squeeze": "view",
    "getitem": "view",
    "split": "cut",
    "chunk": "cut",
    "narrow": "cut",
    "swapaxes": "transpose",
    "permute": "transpose",
    "concat": "cat",
    "div": "mul",
    "truediv": "mul",
    "sub": "add",
    "bmm": "matmul",
    "copy": "index_copy",
    "setitem": "index_copy",
}


def kind_of(sizes: dict[str, int]) -> str:
    """mha, gqa, mqa or mla."""
    if "C" in sizes:
        return "mla"
    if sizes["G"] == sizes["H"]:
        return "mha"
    return "mqa" if sizes["G"] == 1 else "gqa"


def sizes_of(layer: nn.Module, hidden: Tensor) -> dict[str, int]:
    """Letters and sizes of a layer that starts on ``hidden`` ``[B, S, D]``.

    They are read from the layer, or else from its config; the head size is what the query
    projection really makes.
    """

    def find(*names: str) -> int | None:
        for owner in (layer, getattr(layer, "config", None)):
            for name in names:
                if isinstance(number := getattr(owner, name, None), int):
                    return number
        return None

    B, S, D = hidden.shape
    H = find("num_attention_heads", "num_heads") or 1
    G = find("num_key_value_heads") or H
    sizes = {"B": B, "S": S, "T": S, "D": D, "H": H, "G": G, "n": H // G}
    latent = {
        "C": find("kv_lora_rank"),
        "N": find("qk_nope_head_dim"),
        "R": find("qk_rope_head_dim"),
        "V": find("v_head_dim"),
        "Q": find("q_lora_rank"),
    }
    if latent["C"]:
        sizes |= {letter: size for letter, size in latent.items() if size is not None}
    row: Any = layer._modules.get("kv_proj")
    if row is not None:
        sizes["Z"] = row.out_features
    projection: Any = layer._modules.get("q_proj") or layer._modules.get("q_b_proj")
    head = projection.out_features // H
    if head != sizes.get("N", 0) + sizes.get("R", 0):
        sizes["d"] = head
    return sizes


def projection_of(
    child: str, layer: nn.Module, sizes: dict[str, int]
) -> tuple[int | None, str, str, str]:
    """The row of ``PROJECTIONS`` as it is for this layer."""
    number, row, name, letter = PROJECTIONS[child]
    if child == "kv_b_proj" and sizes.get("N") == 0:
        number, row, name, letter = WITHOUT_NOPE
    if child == "kv_a_proj_with_mqa" and "k_b_proj" in layer._modules:
        number, row, name, letter = WITHOUT_ROPE
    if child == "kv_a_proj_with_mqa" and "k_norm" in layer._modules:
        row = row.replace("= x", "= [K ‖ V]")
    if child == "kv_a_proj_with_mqa" and "kv_proj" in layer._modules:
        row = row.replace("= x", "= z")
    if child in ("k_proj", "v_proj") and "C" in sizes:
        return number, row, name, letter  # G of the source: the latent serves all heads
    if "d" not in sizes:
        letter = letter.replace("H·d", "H·(N+R)" if sizes["N"] else "H·R")
    if sizes["G"] == sizes["H"]:
        letter = letter.replace("G", "H")
    return number, row, name, letter


def weights_of(
    layer: nn.Module, sizes: dict[str, int]
) -> list[tuple[Tensor, str, tuple[str, ...]]]:
    """Matrices that latent attention multiplies with on its own: tensor, name, letters."""
    found: list[tuple[Tensor, str, tuple[str, ...]]] = []
    for child, module in layer.named_children():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and child == "kv_b_proj":
            _, _, name, letter = projection_of(child, layer, sizes)
            found.append((weight, "W_UV" if name == "V" else "W_UK ‖ W_UV", (letter, "C")))
        if isinstance(weight, Tensor) and child == "q_up_proj":
            found.append((weight, "W_UQ", ("H", "N+R" if sizes.get("N") else "R", "d")))
    return found


def length_of(cache: Any, layer: Any) -> int:
    """Tokens that a layer has seen before."""
    if cache is None:
        return 0
    if isinstance(cache, SimpleCache):
        return cache.length
    return int(cache.get_seq_length(layer.layer_idx))


def pages_of(cache: Any, layer: nn.Module) -> list[Tensor]:
    """The pages that a LatentCache keeps for a layer; none for other caches."""
    return [cache.pages[layer.layer_idx]] if hasattr(cache, "pages") else []


def tensors_of(cache: Any, layer: Any) -> list[Tensor]:
    """What a SimpleCache or a cache of transformers keeps for a layer."""
    if cache is None:
        return []
    if isinstance(cache, SimpleCache):
        return list(cache.tensors)
    return [cache.layers[layer.layer_idx].keys, cache.layers[layer.layer_idx].values]


def scale_note(factor: float) -> str:
    """A factor on the scores as it is taught, 1/√32 as ``/ √32``, if it is one."""
    under = 1 / factor**2 if factor else 0.0
    if 1 <= under < 1e6 and math.isclose(under, round(under), rel_tol=1e-5):
        return f"/ √{round(under)}"
    return f"× {factor:.4g}"
