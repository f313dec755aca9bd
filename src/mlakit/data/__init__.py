"""Texts to calibrate, train and measure with, and recall probes: plain Python, text in, ids out."""

from mlakit.data.lessons import Lessons, read_lessons
from mlakit.data.probes import (
    CODE_DIGITS,
    NAMES,
    NEUTRAL_LINES,
    PASSKEY_DIGITS,
    Probe,
    code_line,
    code_question,
    key_value_prompt,
    other_question,
    passkey_line,
    passkey_prompt,
    passkey_question,
    random_digits,
)
from mlakit.data.texts import (
    BUILTIN,
    EVALUATION,
    Source,
    SourceLike,
    builtin_text,
    named_sources,
)
from mlakit.data.windows import source_windows, token_windows

__all__ = [
    "BUILTIN",
    "CODE_DIGITS",
    "EVALUATION",
    "NAMES",
    "NEUTRAL_LINES",
    "PASSKEY_DIGITS",
    "Lessons",
    "Probe",
    "Source",
    "SourceLike",
    "builtin_text",
    "code_line",
    "code_question",
    "key_value_prompt",
    "named_sources",
    "other_question",
    "passkey_line",
    "passkey_prompt",
    "passkey_question",
    "random_digits",
    "read_lessons",
    "source_windows",
    "token_windows",
]
