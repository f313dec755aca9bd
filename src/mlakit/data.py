"""Texts, calibration windows and recall probes.

Everything here is plain Python: text in, text or lists of token ids out. The probes are the same
lines that the shipped demo model was trained on, so training, evaluation and tests agree on them.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

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


def read_text(source: str | Path) -> str:
    """Reads a text file, all ``*.txt`` files of a folder, or a dataset by its name.

    Args:
        source: A path, or the name of a dataset with a ``text`` column (its ``train`` split is
            read), optionally with a configuration: ``"name:configuration"``.

    Returns:
        The text; files and dataset rows are joined by blank lines and newlines.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise MlakitError(f"the folder {path} holds no *.txt file")
        return "\n\n".join(_read_file(file) for file in files)
    if importlib.util.find_spec("datasets") is None:
        raise MlakitError(
            f"{source} is neither a file nor a folder",
            remedy="check the path, or install the package 'datasets' to read a dataset by name",
        )
    return _read_dataset(str(source))


def _read_file(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MlakitError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}",
            remedy="give a plain text file in UTF-8",
        ) from error
    except OSError as error:
        raise MlakitError(f"cannot read {path}: {error.strerror}") from error
    if "\0" in text:
        raise MlakitError(
            f"{path} is not text: it holds NUL bytes", remedy="give a plain text file in UTF-8"
        )
    return text


def _read_dataset(source: str) -> str:
    import datasets

    name, _, configuration = source.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split="train")
    except Exception as error:  # the library raises many unrelated kinds
        raise MlakitError(
            f"{source} is no file or folder, and no dataset of this name could be loaded: {error}",
            remedy="check the spelling; a dataset needs a network or a filled cache",
        ) from error
    if "text" not in rows.column_names:
        raise MlakitError(
            f"the dataset {source} has no column 'text', only {', '.join(rows.column_names)}",
            remedy="write its texts to a file and give that file",
        )
    return "\n".join(rows["text"])


def token_windows(
    text: str,
    tokenizer: Any,
    length: int,
    count: int | None = None,
    bos_id: int | None = None,
) -> list[list[int]]:
    """Cuts a text into consecutive windows of equal length.

    Args:
        text: The text.
        tokenizer: A Hugging Face tokenizer.
        length: Tokens per window, the leading bos included.
        count: How many windows are wanted; all whole windows of the text if not given.
        bos_id: The token that starts each window; the tokenizer's own bos if not given. A
            tokenizer without one gets windows of text only.

    Returns:
        The windows, each a list of ``length`` token ids; the rest of the text is left out.
    """
    bos = tokenizer.bos_token_id if bos_id is None else bos_id
    head = [] if bos is None else [bos]
    body = length - len(head)
    if body < 1:
        raise MlakitError(f"a window of {length} tokens has no room for text")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    available = len(ids) // body
    wanted = available if count is None else count
    if wanted > available or available == 0:
        raise MlakitError(
            f"the text has {len(ids)} tokens, enough for {available} windows of {length}"
            + (f", not for {count}" if count is not None else ""),
            remedy="give more text, or ask for fewer or shorter windows",
        )
    return [head + ids[index * body : (index + 1) * body] for index in range(wanted)]


def builtin_text(split: Literal["calibration", "evaluation"]) -> str:
    """The text that ships with the package, sampled from its demo model.

    Args:
        split: ``"calibration"`` or ``"evaluation"``; the two share no sampled passage.

    Returns:
        The text.
    """
    if split not in ("calibration", "evaluation"):
        raise MlakitError(
            f"there is no built-in text {split!r}", remedy="use 'calibration' or 'evaluation'"
        )
    file = resources.files("mlakit") / "assets" / "text" / f"{split}.txt"
    return file.read_text(encoding="utf-8")
