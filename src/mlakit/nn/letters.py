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
    "Z": "what a source that was latent already cached: its C + R",
    "P": "tokens per cache page",
}


def reshaped(
    letters: Letters, old: Sequence[int], new: Sequence[int], sizes: Mapping[str, int]
) -> Letters | None:
    """Letters after ``view``/``reshape`` from ``old`` to ``new``; None if they do not line up.

    Args:
        letters: before.
        old: shape before.
        new: shape after.
        sizes: what the letters inside ``H·d`` stand for.
    """
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
        # dimensions of size 1 that only one side has belong to what came before them
        while i < len(old) and old[i] == 1 and (j == len(new) or new[j] != 1):
            i += 1
        while j < len(new) and new[j] == 1 and (i == len(old) or _stays_whole(letters[i], old[i])):
            j += 1
        result += _regrouped(letters[first_i:i], old[first_i:i], new[first_j:j], sizes)
    return tuple(result)


def _stays_whole(letter: str, size: int) -> bool:
    return size != 1 and "·" not in letter


def _inserted_ones(letters: Letters, old: Sequence[int], new: Sequence[int]) -> int:
    """New dimensions of size 1 go before the last old one of a run: B S C -> B 1 S C, S = 1."""
    ones = [next((k for k, n in enumerate(sizes) if n != 1), len(sizes)) for sizes in (old, new)]
    left = letters[len(letters) - len(old) :]
    after = left[1] if len(left) > 1 else ""
    lone = ones[0] == 1 and left[0] != "B" and "·" not in left[0] + after
    return max(ones[1] - 1, 0) if lone else 0


def _regrouped(
    letters: Sequence[str], old: Sequence[int], new: Sequence[int], sizes: Mapping[str, int]
) -> list[str]:
    """One block of dimensions of equal product: letters and sizes before, sizes after."""
    if len(letters) == len(new) == 1:
        return [letters[0]]
    factors: list[tuple[str, int]] = []
    for letter, size in zip(letters, old, strict=True):
        parts = _factors(letter)
        if len(parts) > 1:
            factors += [
                (part, sum(sizes.get(term, 0) for term in part.split("+"))) for part in parts
            ]
        elif letter != "1":
            factors.append((letter, size))
    finer = (
        [
            part
            for letter, size in factors
            for part in (
                [("G", sizes["G"]), ("n", sizes["n"])] if letter == "H" else [(letter, size)]
            )
        ]
        if {"G", "n"} <= set(sizes)
        else []
    )
    for attempt in (factors, finer):
        if attempt and (placed := _placed(attempt, new)):
            return placed
    whole = joined([letter for letter, _ in factors] or ["1"])
    wide = [index for index, size in enumerate(new) if size != 1] or [0]
    parts = [whole] if len(wide) == 1 else [f"{whole}:{k}" for k in range(len(wide))]
    return [dict(zip(wide, parts, strict=True)).get(index, "1") for index in range(len(new))]


def _placed(factors: Sequence[tuple[str, int]], new: Sequence[int]) -> list[str] | None:
    """Factors, in order, laid into dimensions of these sizes; None if they do not fit."""
    if [size for _, size in factors] == list(new):
        return [letter for letter, _ in factors]
    rest, groups = list(factors), []
    for size in new:
        taken: list[str] = []
        product = 1
        while rest and (product < size or (size == 1 and not taken and rest[0][1] == 1)):
            letter, factor = rest.pop(0)
            taken.append(letter)
            product *= factor
        if product != size:
            return None
        groups.append(taken)
    if any(size != 1 for _, size in rest):
        return None
    groups[-1] += [letter for letter, _ in rest]
    return [joined(taken) if taken else "1" for taken in groups]


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
