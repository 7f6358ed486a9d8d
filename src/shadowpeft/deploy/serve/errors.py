"""Errors that a client sees, in the shape of OpenAI's API."""

from typing import Any

from shadowpeft.errors import ShadowPeftError


class ApiError(ShadowPeftError):
    """A refused or failed request.

    Attributes:
        status: HTTP status.
        code: a word for programs, such as ``model_not_found``.
        param: the field of the request that is wrong, if one is.
        retry_after: seconds after which a client may try again, if that makes sense.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after

    def body(self) -> dict[str, Any]:
        """The JSON that is sent: ``{"error": {"message", "type", "param", "code"}}``."""
        error = {"message": str(self), "type": _type_of(self.status), "param": self.param, "code": self.code}
        return {"error": error}


def _type_of(status: int) -> str:
    names = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    return names.get(status, "invalid_request_error" if status < 500 else "server_error")
