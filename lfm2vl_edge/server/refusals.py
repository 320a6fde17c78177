"""Errors as OpenAI's clients expect them: an HTTP status, and an object with message, type, param and code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from lfm2vl_edge.errors import (
    AnswerError,
    AnswerTruncated,
    ConfigError,
    ContextFull,
    EdgeError,
    EngineError,
    ImageError,
    PromptError,
    QueueFull,
    ToolError,
    printable,
)

RETRY_SECONDS: Final = 5
"""Value of Retry-After: an answer of a small model takes about this long, seconds."""
_TYPES: Final[Mapping[int, str]] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
"""OpenAI's names of some statuses; other ones below 500 are `invalid_request_error`, others `server_error`."""
_STATUSES: Final[tuple[tuple[type[EdgeError], int, str], ...]] = (
    (QueueFull, 429, "queue_full"),
    (ContextFull, 400, "context_length_exceeded"),
    (ImageError, 400, "invalid_image"),
    (PromptError, 400, "invalid_messages"),
    (ConfigError, 400, "invalid_value"),
    (AnswerTruncated, 422, "answer_truncated"),
    (AnswerError, 422, "answer_invalid"),
    (ToolError, 422, "tool_call_invalid"),
    (EngineError, 503, "engine_error"),
)
"""Error of the library -> status and code; the first that matches."""


class Refusal(EdgeError):
    """A request that is refused.

    Args:
        status: of HTTP.
        message: one line that names the value and the remedy.
        code: a name for programs.
        param: the field of the request.

    Attributes:
        status: of HTTP.
        code: a name for programs.
        param: the field of the request, if it is one.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    @property
    def body(self) -> dict[str, Any]:
        """The error object of OpenAI."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = printable(" ".join(str(self).split()))
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        if self.status in (408, 413):
            return {"Connection": "close"}  # the rest of the body is not read
        if self.status in (429, 503):
            return {"Retry-After": str(RETRY_SECONDS)}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}


def refusal_of(error: EdgeError) -> Refusal:
    """Return an error of the library as that of a request."""
    if isinstance(error, Refusal):
        return error
    for kind, status, code in _STATUSES:
        if isinstance(error, kind):
            return Refusal(status, str(error), code)
    return Refusal(500, str(error), "internal_error")
