"""What the server says when it does not do what was asked, in OpenAI's shape."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse

from mlakit.errors import MlakitError

KINDS = {
    400: "invalid_request_error",
    401: "invalid_request_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
"""OpenAI's word for each status that the server answers with."""

RETRY_SECONDS = "1"
"""What a client that met a full queue, or a server that drains, should wait."""


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


class Refusal(Exception):
    """A request that ends with an error.

    Args:
        status: HTTP status, one of ``KINDS``.
        message: what was wrong with it, and what to do.
        param: the field at fault.
        code: OpenAI's code, e.g. ``model_not_found``.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    @classmethod
    def of(cls, status: int, error: MlakitError, **details: str) -> Refusal:
        """An error of the rooms below, on one line."""
        remedy = f"; {error.remedy}" if error.remedy else ""
        return cls(status, error.message + remedy, **details)

    def body(self) -> dict[str, Any]:
        """The error as JSON takes it."""
        detail = ErrorDetail(
            message=self.message, type=KINDS[self.status], param=self.param, code=self.code
        )
        return ErrorBody(error=detail).model_dump()

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {}
        if self.status in (429, 503):
            headers["Retry-After"] = RETRY_SECONDS
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)
