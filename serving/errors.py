"""Errors as OpenAI's API answers them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
from collections.abc import Mapping

from starlette.responses import Response

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is answered with an error: its status, and the message for the client."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        return TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> bytes:
        """The answer's body in JSON."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}, ensure_ascii=False).encode("utf-8", "replace")

    def response(self) -> Response:
        return Response(self.body(), self.status, headers=self.headers, media_type="application/json")


def failure() -> ApiError:
    """The error for a request that hit a bug; the details go only to the log."""
    return ApiError(500, "the server failed; its log says why")


def too_busy(retry_after_s: float) -> ApiError:
    """The error for a request when too many others are waiting."""
    return ApiError(
        429,
        "too many requests are waiting; try again later",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(max(1, round(retry_after_s)))},
    )
