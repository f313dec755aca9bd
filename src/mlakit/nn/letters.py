"""What becomes of shape letters when a tensor is viewed, cut, joined or multiplied.

A shape is told in letters, one per dimension: ``("B", "S", "H·d")``. A dimension that holds several
is their product (``H·d``: head by head) or their sum (``C+R``: side by side). A part of a dimension
that has no letter of its own is written ``d:0``, and turns back into ``d`` when rejoined.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Letters = tuple[str, ...]

GLOSSARY = {
    "B": "batch: sequences computed together",
    "S": "query length: tokens that ask now",
    "T": "cached length: tokens that can be seen, the new ones included",
    "D": "hidden size: width of a token vector",
    "H": "query heads",
    "G": "key/value heads; each serves n = H/G query heads",
    "d": "head size",
    "N": "part of a query/key head without position (nope)",
    "R": "part that carries the position (rope)",
    "C": "rank of the latent that keys and values are rebuilt from",
    "Q": "rank of the query latent",
    "V": "size of a value head",
    "P": "tokens per cache page",
}


def reshaped(letters: Letters, old: Sequence[int], new: Sequence[int]) -> Letters | None:
    """Letters after ``view``/``reshape`` from ``old`` to ``new``; None if they do not line up."""
    if math.prod(old) != math.prod(new):
        return None
    result: list[str] = []
    i = j = 0
    while i < len(old) and j < len(new):
        for _ in range(_inserted_ones(letters, old[i:], new[j:])):
            result.append("1")
            j += 1
        first_i, first_j, have, want = i, j, old[i], new[j]
        i, j = i + 1, j + 1
        while have != want:
            if have < want and i < len(old):
                have, i = have * old[i], i + 1
            elif want < have and j < len(new):
                want, j = want * new[j], j + 1
            else:
                return None
        while i < len(old) and old[i] == 1 and (j == len(new) or new[j] != 1):
            i += 1  # a dimension of size 1 joins what came before it
        while i == len(old) and j < len(new):
            j += 1  # all that is left is of size 1
        result += _regrouped(letters[first_i:i], new[first_j:j])
    return tuple(result)


def _inserted_ones(letters: Letters, old: Sequence[int], new: Sequence[int]) -> int:
    """New dimensions of size 1 go before the last old one of a run: B S C -> B 1 S C, S = 1."""
    ones = [next((k for k, n in enumerate(sizes) if n != 1), len(sizes)) for sizes in (old, new)]
    left = letters[len(letters) - len(old) :]
    after = left[1] if len(left) > 1 else ""
    lone = ones[0] == 1 and left[0] != "B" and "·" not in left[0] + after
    return max(ones[1] - 1, 0) if lone else 0


def _regrouped(letters: Sequence[str], sizes: Sequence[int]) -> list[str]:
    """One block of dimensions of equal product: letters before, sizes after."""
    if len(letters) == len(sizes) == 1:
        return [letters[0]]
    real = [letter for letter in letters if letter != "1"] or ["1"]
    wide = [index for index, size in enumerate(sizes) if size != 1] or [0]
    whole = joined(real)
    factors = _factors(whole)
    if len(factors) == len(sizes):  # also where one of them is 1, as G in multi-query attention
        return factors
    parts = [whole] if len(wide) == 1 else factors
    if len(parts) != len(wide):
        parts = [f"{whole}:{k}" for k in range(len(wide))]
    placed = dict(zip(wide, parts, strict=True))
    return [placed.get(index, "1") for index in range(len(sizes))]


def _factors(letter: str) -> list[str]:
    return [factor.strip("()") for factor in letter.split("·")]


def joined(parts: Sequence[str]) -> str:
    """Dimensions merged into one, the first outermost: H, d -> ``H·d``; G, n -> H."""
    base = parts[0].partition(":")[0]
    if len(parts) > 1 and all(part.startswith(f"{base}:") for part in parts):
        return base
    text = "·".join(f"({part})" if "+" in part and len(parts) > 1 else part for part in parts)
    return text.replace("G·n", "H")


def axes_after(axes: Sequence[int | Sequence[int]], ndim: int) -> list[int]:
    """Order of the old axes after ``transpose`` (two axes) or ``permute`` (all of them)."""
    named = [axis % ndim for item in axes for axis in ([item] if isinstance(item, int) else item)]
    if len(named) == ndim > 2:
        return named
    order = list(range(ndim))
    i, j = named or (ndim - 2, ndim - 1)
    order[i], order[j] = order[j], order[i]
    return order


def cut(letter: str, start: int, width: int, sizes: Mapping[str, int]) -> str:
    """Letter of ``width`` entries from ``start`` of a dimension: C of ``C+R``, else ``d:0``."""
    offset = 0
    for term in letter.split("+"):
        size = sizes.get(term, 0)
        if (start, width) == (offset, size):
            return term
        offset += size
    return f"{letter}:{start // max(width, 1)}"


def concatenated(parts: Sequence[str]) -> str:
    """Letter of parts laid side by side: C, R -> ``C+R``; the halves of d -> d."""
    base = parts[0].partition(":")[0]
    if all(part.startswith(f"{base}:") for part in parts):
        return base
    return "+".join(parts)


def is_whole(letters: Letters) -> bool:
    """Whether no dimension is only a part of what a letter stands for."""
    return not any(":" in letter for letter in letters)
