"""Watching one attention layer compute: which operation made which tensor out of which.

A tensor gets its name where a projection makes it; every operation after that passes names and
shape letters on, or, for a product, makes a new name of two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mlakit.nn.journey import Cached, LayerJourney, Step
from mlakit.nn.letters import Letters, axes_after, concatenated, cut, is_whole, reshaped
from mlakit.nn.roles import (
    ALIASES,
    JOINS,
    KEYS,
    NOTES,
    PARTS,
    QUERIES,
    kind_of,
    length_of,
    pages_of,
    projection_of,
    scale_note,
    sizes_of,
    tensors_of,
    weights_of,
)


@dataclass(frozen=True)
class Value:
    """What is known of a tensor: name, letters, and how far a rotation of it has got (0, 1, 2)."""

    name: str
    letters: Letters
    turned: int = 0


class Watch:
    """One forward pass of one attention layer, from its input to its journey."""

    def __init__(
        self, name: str, module: nn.Module, hidden: Tensor, cache: Any, keep_weights: bool
    ) -> None:
        self.name, self.module, self.cache = name, module, cache
        self.keep_weights = keep_weights
        self.weights: Tensor | None = None
        self.sizes = sizes_of(module, hidden)
        self.past = length_of(cache, module)
        self.steps: list[Step] = []
        self._known: dict[int, tuple[Tensor, Value]] = {}  # holds tensors, so ids stay unique
        self._memory: set[int] = set()
        for weight, matrix, letters in weights_of(module, self.sizes):
            self._put(weight, Value(matrix, letters))
        for tensor in pages_of(cache, module):
            self._put(tensor, Value("pages", ("pages", "P", "1", self._row()[1])))
        self._put(hidden, Value("x", ("B", "S", "D")), None, "x")

    def journey(self) -> LayerJourney:
        """What was seen."""
        kept = list(self._kept())
        order = ("B", "S", "T", "D", "H", "G", "d", "N", "R", "C", "Q", "V")
        shown = set(self.sizes)
        if "C" in shown and self.sizes["G"] == self.sizes["H"]:
            shown -= {"G"}  # a latent serves all heads
        return LayerJourney(
            layer=self.name or type(self.module).__name__,
            kind=kind_of(self.sizes),
            past=self.past,
            sizes={letter: self.sizes[letter] for letter in order if letter in shown},
            steps=tuple(self.steps),
            cache=tuple(kept),
            weights=self.weights,
        )

    def projected(self, child: str, result: Tensor) -> None:
        """A projection named in ``PROJECTIONS`` returned."""
        number, row, name, letter = projection_of(child, self.module, self.sizes)
        one = ("1",) if result.ndim == 4 else ()  # a latent may come as [B, T, C] or [B, 1, T, C]
        tokens = "T" if "_b_proj" in child and child != "q_b_proj" else "S"
        self._put(result, Value(name, ("B", *one, tokens, letter)), number, row)

    def saw(self, operation: str, args: Sequence[Any], kwargs: Any, result: Any) -> None:
        """torch computed ``result = operation(*args, **kwargs)``."""
        if operation == "setitem":
            result = args[0]
        tensors = [t for arg in args for t in (arg if isinstance(arg, (list, tuple)) else [arg])]
        tensors = [t for t in tensors if isinstance(t, Tensor)]
        values = [self._value(tensor) for tensor in tensors]
        first = next((value for value in values if value), None)
        if first is None:
            return
        handler = getattr(self, f"_saw_{ALIASES.get(operation, operation)}", self._saw_other)
        for output in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(output, Tensor) and operation != "linear":
                handler(args, kwargs, list(zip(tensors, values, strict=True)), output)

    # -- what the operations mean; ``inputs`` are the tensors with what is known of them ----------

    def _saw_other(self, args: Any, kwargs: Any, inputs: Any, out: Tensor) -> None:
        """Elementwise, or a copy: the name stays when the shape does."""
        for tensor, value in inputs:
            if value and tensor.shape == out.shape:
                return self._put(out, value)

    def _saw_transpose(self, args: Any, kwargs: Any, inputs: Any, out: Tensor) -> None:
        tensor, value = inputs[0]
        if value is None:
            return
        order = axes_after(args[1:] or tuple(kwargs.values()), tensor.ndim)
        letters = tuple(value.letters[k] for k in order)
        if order[-1] != tensor.ndim - 1:  # inside a product, Q Kᵀ: not a step of its own
            return self._put(out, replace(value, letters=letters))
        if value.name == "heads":
            self._put(out, replace(value, letters=letters), 5, "heads back to token order")
        else:
            number = 3 if value.name in ("Q", "K", "V") and letters[2] == "S" else None
            row = "" if value.name.startswith("W_") else f"permute {value.name}"
            self._put(out, replace(value, letters=letters), number, row)

    def _saw_view(self, args: Any, kwargs: Any, inputs: Any, out: Tensor) -> None:
        tensor, value = inputs[0]
        if value is None:
            return
        if out.ndim == tensor.ndim and out.numel() < tensor.numel():
            return self._saw_cut(args, kwargs, inputs, out)
        if value.name == "pages" and out.ndim == 3:
            name, letter = self._row()
            self.sizes["T"] = out.shape[1]
            return self._put(out, Value(name, ("B", "T", letter)), None, f"read {name}")
        letters = reshaped(value.letters, tensor.shape, out.shape, self.sizes)
        if letters is None:
            return
        new = replace(value, letters=letters)
        if value.name.startswith("W_"):
            self._put(out, new)
        elif "·" in value.letters[-1] and "·" not in letters[-1]:
            note = f"{tensor.shape[-1]} → {out.shape[-2]} × {out.shape[-1]}"
            number = 2 if "S" in letters else None
            self._put(out, new, number, f"split {value.name} into heads", note)
        elif value.name == "heads" and len(letters) == 3:
            note = f"{tensor.shape[-2]} × {tensor.shape[-1]} → {out.shape[-1]}"
            self._put(out, replace(new, name="concat"), 5, "concat", note)
        elif "n" in value.letters and "n" not in letters:
            self._put(out, new, None, f"repeat {value.name} in its group", self._repeat_note())
        else:
            self._put(out, new)

    def _saw_cut(self, args: Any, kwargs: Any, inputs: Any, out: Tensor) -> None:
        tensor, value = inputs[0]
        if value is None or out.ndim != tensor.ndim:
            return
        changed = [k for k in range(out.ndim) if out.shape[k] != tensor.shape[k]]
        if len(changed) != 1:
            return self._saw_other(args, kwargs, inputs, out)
        k = changed[0]
        start = (out.storage_offset() - tensor.storage_offset()) // max(tensor.stride(k), 1)
        letter = cut(value.letters[k], start, out.shape[k], self.sizes)
        name, letter = PARTS.get((value.name, letter), (value.name, letter))
        letters = (*value.letters[:k], letter, *value.letters[k + 1 :])
        told = name != value.name and not name.startswith("W_")
        new = replace(value, name=name, letters=letters)
        self._put(out, new, None, name if told else "", NOTES.get(name, ""))

    def _saw_expand(self, args: Any, kwargs: Any, inputs: Any, out: Tensor) -> None:
        tensor, value = inputs[0]
        if value is None or out.ndim != tensor.ndim:
            return
        fill = "n" if out.ndim == 5 else "H"
        pairs = zip(value.letters, tensor.shape, out.shape, strict=True)
        letters = tuple(fill if (old, new) != (new, old) else name for name, old, new in pairs)
        self._put(out, replace(value, letters=letters))

    def _saw_repeat_interleave(self, args: Any, kwargs: Any, inputs: Any, out: Tensor) -> None:
        tensor, value = inputs[0]
        if value is None or out.shape == tensor.shape:
            return self._saw_other(args, kwargs, inputs, out)
        letters = tuple("H" if letter == "G" else letter for letter in value.letters)
        row = "" if value.name.startswith("W_") else f"repeat {value.name} in its group"
        self._put(out, replace(value, letters=letters), None, row, self._repeat_note())

    def _saw_cat(self, args: Any, kwargs: Any, inputs: Any, out: Tensor) -> None:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % out.ndim
        inputs = [(t, v) for t, v in inputs if t.ndim == out.ndim and t.shape[dim] > 0]
        value = next((value for _, value in inputs if value), None)
        if value is None:
            return
        letters = list(value.letters)
        if value.name == "scores" and dim == out.ndim - 1:  # an attention sink: a key of no token
            letters[dim] = "T+1"
            return self._put(out, replace(value, letters=tuple(letters)), 4, "scores ‖ sink")
        if letters[dim][0] in "ST":  # tokens after tokens: a cache grows
            letters[dim] = "T"
            self.sizes["T"] = out.shape[dim]
            row = f"append {value.name} to the cache"
            return self._put(out, replace(value, letters=tuple(letters)), None, row)
        if any(v is None for _, v in inputs):
            return
        letters[dim] = concatenated([v.letters[dim] for _, v in inputs])
        joined = JOINS.get(tuple(v.name for _, v in inputs))
        turned = max(v.turned for _, v in inputs)
        new = Value(joined or value.name, tuple(letters), 0 if joined else turned)
        self._put(out, new, None, joined or "")

    def _saw_mul(self, args: Any, kwargs: Any, inputs: Any, out: Tensor) -> None:
        named = [value for _, value in inputs if value]
        if named[0].name == "scores" and len(inputs) == 1 and not self.steps[-1].note:
            factor = next((float(arg) for arg in args if isinstance(arg, (int, float))), 1.0)
            self.steps[-1] = replace(self.steps[-1], note=scale_note(factor))
        cosine = len(inputs) == 2 and len(named) == 1 and out.shape[-1] > 1
        turned = (2 if out.is_complex() else 1) if cosine else named[0].turned
        if out.ndim == len(named[0].letters):
            self._put(out, replace(named[0], turned=turned))

    def _saw_add(self, args: Any, kwargs: Any, inputs: Any, out: Tensor) -> None:
        named = [value for _, value in inputs if value]
        rotated = len(named) == 2 and all(value.turned for value in named)
        if out.ndim == len(named[0].letters):
            self._put(out, replace(named[0], turned=2 if rotated else named[0].turned))

    def _saw_view_as_complex(self, args: Any, kwargs: Any, inputs: Any, out: Tensor) -> None:
        if inputs[0][1]:
            self._put(out, replace(inputs[0][1], letters=inputs[0][1].letters[:-1]))

    def _saw_view_as_real(self, args: Any, kwargs: Any, inputs: Any, out: Tensor) -> None:
        if inputs[0][1]:
            base = inputs[0][1].letters[-1].partition(":")[0]
            self._put(out, replace(inputs[0][1], letters=(*inputs[0][1].letters, f"{base}:1")))

    def _saw_index_copy(self, args: Any, kwargs: Any, inputs: Any, out: Tensor) -> None:
        """A cache of fixed size takes the new tokens in."""
        (target, held), (_, source) = inputs[0], inputs[-1]
        if source and held and held.name == "pages":
            self._put(target, held, None, f"write {source.name} into the pages")
        elif self.cache is not None and source and not held and target.ndim == len(source.letters):
            letters = tuple("T" if letter == "S" else letter for letter in source.letters)
            self.sizes["T"] = target.shape[-2]
            row = f"write {source.name} into the cache"
            self._put(target, replace(source, letters=letters), None, row)

    def _saw_new_empty(self, args: Any, kwargs: Any, inputs: Any, out: Tensor) -> None:
        """transformers' DeepSeek layers fill the keys in place: nope part, then rope part."""
        value = inputs[0][1]
        if value and value.name == "k_nope ‖ V" and out.ndim == 4:
            self._put(out, Value("K", (*value.letters[:-1], "N+R")), None, "K")

    def _saw_pad(self, args: Any, kwargs: Any, inputs: Any, out: Tensor) -> None:
        tensor, value = inputs[0]
        if value and out.shape[:-1] == tensor.shape[:-1]:
            letters = (*value.letters[:-1], f"{value.letters[-1]}+0")
            note = f"zeros, {tensor.shape[-1]} → {out.shape[-1]}"
            self._put(out, replace(value, letters=letters), None, f"pad {value.name}", note)

    def _saw_tanh(self, args: Any, kwargs: Any, inputs: Any, out: Tensor) -> None:
        if inputs[0][1] and inputs[0][1].name == "scores":
            self.steps[-1] = replace(self.steps[-1], note=f"{self.steps[-1].note}, soft-capped")
            self._put(out, inputs[0][1])

    def _saw_softmax(self, args: Any, kwargs: Any, inputs: Any, out: Tensor) -> None:
        self._put(
            out,
            Value("weights", inputs[0][1].letters),
            4,
            "weights = softmax(scores)",
            "each row sums to 1",
        )
        if self.keep_weights:
            self._keep(out)

    def _saw_matmul(self, args: Any, kwargs: Any, inputs: Any, out: Tensor) -> None:
        if len(inputs) == 2 and inputs[0][1] and inputs[1][1]:
            a, b = inputs[0][1], inputs[1][1]
            self._product(a, b, (*a.letters[:-1], b.letters[-1]), out)

    def _saw_einsum(self, args: Any, kwargs: Any, inputs: Any, out: Tensor) -> None:
        if len(inputs) != 2 or not isinstance(args[0], str) or None in (v for _, v in inputs):
            return
        left, _, right = args[0].replace(" ", "").partition("->")
        meaning: dict[str, str] = {}
        for index, (_, value) in zip(left.split(","), inputs, strict=True):
            meaning.update(zip(index, value.letters))
        self._product(inputs[0][1], inputs[1][1], tuple(meaning[i] for i in right), out)

    def _product(self, a: Value, b: Value, letters: Letters, out: Tensor) -> None:
        if a.name in QUERIES and b.name in KEYS:
            row = f"scores = {_bracketed(a.name)} {_bracketed(b.name)}ᵀ"
            self._put(out, Value("scores", letters), 4, row)
        elif a.name == "weights":
            name = "latents" if b.name.startswith("c_kv") else "heads"
            self._put(out, Value(name, letters), 4, f"{name} = weights {_bracketed(b.name)}")
        elif b.name == "W_UK":
            self._put(out, Value("q_absorbed", letters), 4, f"q_absorbed = {a.name} W_UK")
        elif b.name == "W_UQ":
            name = "q_rope" if letters[-1] == "R" else "Q"
            self._put(out, Value(name, letters), None, f"{name} = {a.name} W_UQ")
        elif b.name == "W_UV":
            self._put(out, Value("heads", letters), 4, "heads = latents W_UV")

    def _saw_scaled_dot_product_attention(
        self, args: Any, kwargs: Any, inputs: Any, out: Tensor
    ) -> None:
        (query, q), (key, k), (_, v) = inputs[:3]
        if q is None or k is None or v is None:
            return
        scale = kwargs.get("scale") or query.shape[-1] ** -0.5
        shape = (*query.shape[:3], key.shape[2])
        self._fused(q, _bracketed(k.name), q.letters[:3], shape, scale)
        name = "latents" if v.name.startswith("c_kv") else "heads"
        letters = (*q.letters[:3], v.letters[-1])
        self._put(out, Value(name, letters), 4, f"{name} = softmax(scores) {v.name}")
        if self.keep_weights:  # the same attention over an identity gives the weights themselves
            T = key.shape[2]
            identity = torch.eye(T, dtype=key.dtype, device=key.device)
            value = identity.expand(*key.shape[:2], T, T)
            attend = torch.nn.functional.scaled_dot_product_attention
            self._keep(attend(query, key, value, *args[3:], **kwargs))

    def _saw_mla_decode(self, args: Any, kwargs: Any, inputs: Any, out: Tensor) -> None:
        """Our own operator: packed queries against the pages, in one kernel."""
        (query, q), lengths = inputs[0], inputs[3][0]
        if q is None or out.ndim != 3:  # its second result is the logarithm of the sums
            return
        self.sizes["T"] = int(lengths.max())
        B, T = len(lengths), self.sizes["T"]
        shape = (B, query.shape[1], query.shape[0] // B, T)
        self._fused(q, "pages", ("B", "H", "S"), shape, float(args[7]))
        letters = (*q.letters[:2], "C")
        self._put(out, Value("latents", letters), 4, "latents = softmax(scores) c_kv")

    def _fused(
        self, query: Value, keys: str, letters: Letters, shape: tuple[int, ...], scale: float
    ) -> None:
        """Scores that exist only inside a kernel."""
        note = f"{scale_note(scale)}, inside one kernel, never stored"
        row, dtype = f"scores = {_bracketed(query.name)} {keys}ᵀ", self.steps[-1].dtype
        letters = (*letters, "T")
        self.steps.append(Step(4, row, tuple(shape), letters, dtype, 0, note))

    # -- book-keeping -----------------------------------------------------------------------------

    def _value(self, tensor: Tensor) -> Value | None:
        known = self._known.get(id(tensor))
        return known[1] if known else None

    def _keep(self, weights: Tensor) -> None:
        """Weights as [B, H, S, T]; a kernel may have had heads folded into tokens."""
        B, S, H = self.sizes["B"], self.sizes["S"], self.sizes["H"]
        self.weights = weights.detach().reshape(B, H, S, -1)

    def _row(self) -> tuple[str, str]:
        """Name and letter of what one token leaves in a latent cache."""
        return projection_of("kv_a_proj_with_mqa", self.module, self.sizes)[2:]

    def _kept(self) -> Iterator[Cached]:
        """What the cache holds of this layer."""
        pages = pages_of(self.cache, self.module)
        for tensor in pages or tensors_of(self.cache, self.module):
            value = self._value(tensor)
            name = value.name if value else "cache"
            numbers = math.prod(tensor.shape[2:])
            if not pages:
                numbers = tensor.numel() // max(tensor.shape[0] * tensor.shape[-2], 1)
            size = tensor.element_size()
            yield Cached(name, tuple(tensor.shape), numbers, numbers * size, tensor.numel() * size)

    def _repeat_note(self) -> str:
        return f"each of {self.sizes['G']} serves {self.sizes['H'] // self.sizes['G']} query heads"

    def _put(
        self, tensor: Tensor, value: Value, number: int | None = None, row: str = "", note: str = ""
    ) -> None:
        """Remember what a tensor is; with ``row``, tell it."""
        if value.turned == 2 and is_whole(value.letters):
            value, row = replace(value, turned=0), f"rotate {value.name} to its position"
        self._known[id(tensor)] = (tensor, value)
        memory = tensor.untyped_storage().data_ptr()
        new = memory not in self._memory
        self._memory.add(memory)
        if row:
            nbytes = tensor.numel() * tensor.element_size() if new else 0
            dtype = str(tensor.dtype).removeprefix("torch.")
            shape = tuple(tensor.shape)
            self.steps.append(Step(number, row, shape, value.letters, dtype, nbytes, note))


def _bracketed(name: str) -> str:
    return f"[{name}]" if "‖" in name else name
