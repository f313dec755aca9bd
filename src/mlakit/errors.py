"""The errors that mlakit raises on purpose, each with the exit code the command line returns."""


class MlakitError(Exception):
    """A failure the user can act on.

    Args:
        message: What failed, where and why.
        remedy: What to do about it; printed on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\nRemedy: {self.remedy}" if self.remedy else self.message


class UsageError(MlakitError):
    """The options or arguments given make no sense together."""

    exit_code = 2


class UnsupportedModelError(MlakitError):
    """The checkpoint is of a kind that mlakit cannot convert."""

    exit_code = 3


class VerificationError(MlakitError):
    """The converted model does not do what it was promised to do."""

    exit_code = 4
