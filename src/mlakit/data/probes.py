"""Recall probes: a long text, a question about one line of it and the right answer.

The lines are those that the shipped demo model was trained on, so training, evaluation and tests
agree on them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from mlakit.errors import MlakitError

NEUTRAL_LINES = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is bright and warm.",
    "Here we go.",
    "There and back again.",
    "The river runs down to the sea.",
    "The wind is soft today.",
    "A bird sits in the old tree.",
)

# fmt: off
NAMES = (
    "Anna", "Ben", "Carl", "Diana", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack", "Kate",
    "Leo", "Mary", "Nora", "Oscar", "Paul", "Rosa", "Sam", "Tina", "Victor", "Wendy", "Adam",
    "Bella", "Clara", "David", "Eva", "Felix", "George", "Hannah", "Ivan", "Julia", "Karl",
    "Lily", "Max", "Nina", "Oliver", "Peter", "Ruth", "Simon", "Tom", "Alice", "Bruno", "Daisy",
    "Edward", "Fiona", "Hugo", "Iris", "James", "Laura", "Martin", "Olga", "Robert", "Sara",
    "Thomas", "Vera", "Walter", "Arthur", "Betty", "Colin", "Dora", "Ernest", "Flora", "Gordon",
    "Helen",
)
# fmt: on

PASSKEY_DIGITS = 5
CODE_DIGITS = 4


@dataclass(frozen=True)
class Probe:
    """A long text, a question about one line of it and the right answer.

    Attributes:
        text: The text that holds the answer.
        question: The question, up to where the answer has to follow.
        answer: The digits that a model with perfect recall writes next (after a space).
        kind: ``"passkey"`` or ``"key_value"``.
        depth: Where the answer's line stands in the text: 0 at its start, 1 at its end.
    """

    text: str
    question: str
    answer: str
    kind: Literal["passkey", "key_value"]
    depth: float

    @property
    def prompt(self) -> str:
        """The text followed by the question: what the model reads."""
        return self.text + self.question


def passkey_line(key: str) -> str:
    """The line that hides a pass key."""
    return f"The pass key is {key}. Remember it."


def passkey_question() -> str:
    """The question for the pass key, up to its answer."""
    return "What is the pass key? The pass key is"


def code_line(name: str, code: str) -> str:
    """The line that gives a name its code."""
    return f"The code of {name} is {code}."


def code_question(name: str) -> str:
    """The question for the code of a name, up to its answer."""
    return f"What is the code of {name}? The code of {name} is"


def random_digits(rng: random.Random, count: int) -> str:
    """A number of ``count`` digits, leading zeros allowed."""
    return "".join(rng.choices("0123456789", k=count))


def passkey_prompt(
    length: int,
    depth: float,
    *,
    count_tokens: Callable[[str], int],
    seed: int = 0,
    lines: Sequence[str] = NEUTRAL_LINES,
) -> Probe:
    """Hides one pass key in a long text.

    Args:
        length: How many tokens the prompt and its answer may take together.
        depth: Where the pass key stands: 0 at the start of the text, 1 at its end.
        count_tokens: Counts the tokens of a text.
        seed: Chooses the key and where in ``lines`` the filler begins.
        lines: The filler text, line by line.

    Returns:
        The probe, as long as ``length`` allows.
    """
    rng = random.Random(f"passkey {seed}")
    key = random_digits(rng, PASSKEY_DIGITS)
    question = passkey_question()
    facts = [passkey_line(key)]
    text = _spread(facts, 0, depth, length, f"{question} {key}", count_tokens, rng, lines)
    return Probe(text, question, key, "passkey", depth)


def key_value_prompt(
    length: int,
    depth: float,
    *,
    count_tokens: Callable[[str], int],
    pairs: int = 16,
    seed: int = 0,
    lines: Sequence[str] = NEUTRAL_LINES,
) -> Probe:
    """Spreads many names and their codes over a long text and asks for one of them.

    Args:
        length: How many tokens the prompt and its answer may take together.
        depth: Where the wanted line stands: 0 at the start of the text, 1 at its end.
        count_tokens: Counts the tokens of a text.
        pairs: How many names have a code, at most ``len(NAMES)``.
        seed: Chooses the names, the codes and where in ``lines`` the filler begins.
        lines: The filler text, line by line.

    Returns:
        The probe, as long as ``length`` allows.
    """
    if not 1 <= pairs <= len(NAMES):
        raise MlakitError(f"a key-value probe has 1 to {len(NAMES)} pairs, not {pairs}")
    rng = random.Random(f"key_value {seed}")
    names = rng.sample(NAMES, pairs)
    numbers = rng.sample(range(10**CODE_DIGITS), pairs)
    codes = [f"{number:0{CODE_DIGITS}d}" for number in numbers]
    wanted = min(pairs - 1, int(depth * pairs))
    facts = [code_line(name, code) for name, code in zip(names, codes, strict=True)]
    question = code_question(names[wanted])
    end = f"{question} {codes[wanted]}"
    text = _spread(facts, wanted, depth, length, end, count_tokens, rng, lines)
    return Probe(text, question, codes[wanted], "key_value", depth)


def other_question(probe: Probe) -> Probe:
    """A second question about the same text: another name's code, half of the pairs away.

    Raises:
        MlakitError: the text holds one code or none.
    """
    pairs = re.findall(code_line(r"(\w+)", r"(\d+)"), probe.text)
    if len(pairs) < 2:
        raise MlakitError("a second question needs a text with two codes")
    asked = [code for _, code in pairs].index(probe.answer)
    other = (asked + len(pairs) // 2) % len(pairs)
    name, code = pairs[other]
    return Probe(
        probe.text, code_question(name), code, "key_value", round(other / (len(pairs) - 1), 2)
    )


def _spread(
    facts: list[str],
    wanted: int,
    depth: float,
    length: int,
    end: str,
    count_tokens: Callable[[str], int],
    rng: random.Random,
    lines: Sequence[str],
) -> str:
    """Lays the facts out between filler lines, the wanted one at ``depth``, within ``length``."""
    if not 0 <= depth <= 1:
        raise MlakitError(f"the depth of a probe lies between 0 and 1, not {depth}")
    if not lines:
        raise MlakitError("a probe needs filler lines", remedy="pass lines=NEUTRAL_LINES")
    room = length - count_tokens("\n".join([*facts, end])) - len(facts)
    if room < 0:
        raise MlakitError(
            f"{len(facts)} facts and a question do not fit in {length} tokens",
            remedy="ask for a longer probe or fewer pairs",
        )
    filler: list[str] = []
    start = rng.randrange(len(lines))
    while True:
        line = lines[(start + len(filler)) % len(lines)]
        room -= count_tokens(line + "\n")
        if room < 0:
            break
        filler.append(line)
    before, after = facts[:wanted], facts[wanted + 1 :]
    split = round(depth * len(filler))
    return "".join(
        line + "\n"
        for line in (
            *_interleave(before, filler[:split]),
            facts[wanted],
            *_interleave(after, filler[split:]),
        )
    )


def _interleave(facts: list[str], filler: list[str]) -> list[str]:
    """Puts the facts at even distances among the filler lines, keeping both orders."""
    placed = [((index + 0.5) / len(facts), fact) for index, fact in enumerate(facts)]
    placed += [((index + 0.5) / len(filler), line) for index, line in enumerate(filler)]
    return [line for _, line in sorted(placed, key=lambda item: item[0])]
