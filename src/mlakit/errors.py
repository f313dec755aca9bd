"""Errors a user may see: what happened, where, why, and what to try."""

from __future__ import annotations


class MlakitError(Exception):
    """A failure with one clear message.

    Args:
        message: what happened, where and why.
        remedy: what to try; shown on its own line.
    """

    exit_code = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(f"{message}\nTry: {remedy}" if remedy else message)
        self.message = message
        self.remedy = remedy


class UsageError(MlakitError):
    """The request itself is impossible or contradictory."""

    exit_code = 2


class UnsupportedModelError(MlakitError):
    """The checkpoint has a structure that mlakit does not convert; nothing was written."""

    exit_code = 3


class VerificationError(MlakitError):
    """The result was written but falls below the threshold that was asked for."""

    exit_code = 4
