"""Refusals as OpenAI's API has them: a status, and a body that names the field."""

from collections.abc import Mapping
from typing import Any

_KINDS = {
    400: ("invalid_request_error", None),
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", None),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("timeout_error", "timeout"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "queue_full"),
    500: ("server_error", "internal_error"),
    503: ("server_error", "unavailable"),
    504: ("timeout_error", "timeout"),
}


class ApiError(Exception):
    """A request that is not answered.

    Args:
        status: Of HTTP.
        message: What was found against what is expected.
        param: The field, as in `messages[2].content`.
        code: A word for programs; None for the usual one of the status.
        headers: Of the reply.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        kind, usual = _KINDS.get(status, ("invalid_request_error", None))
        self.status, self.headers = status, dict(headers or {})
        self.body: dict[str, Any] = {
            "error": {"message": message, "type": kind, "param": param, "code": code or usual},
        }


def refusal(param: str, message: str, code: str | None = None) -> ApiError:
    """Return the error for a field that is wrong."""
    return ApiError(400, f"{param}: {message}" if param else message, param or None, code)
