"""What goes wrong with a request, in the JSON shape of OpenAI's API."""

from __future__ import annotations

from typing import Any

from eightfold.errors import CapacityError, EightfoldError

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """An answer other than 200.

    Attributes:
        status: of HTTP.
        message: one line for a person.
        code: one word for a program, or None.
        param: the field of the request that is to blame, or None.
        headers: that go with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, " ".join(message.split()), code, param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """Return what is sent as JSON."""
        kind = _KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """Return a 400."""
    return ApiError(400, message, param=param, code=code)


def refused(error: EightfoldError, *, param: str | None = None) -> ApiError:
    """Return a 400 for input that the engine, the tokenizer or the chat template refuses."""
    code = "context_length_exceeded" if isinstance(error, CapacityError) else None
    return bad_request(str(error), param=param, code=code)


def internal() -> ApiError:
    """Return a 500, which tells a stranger nothing."""
    return ApiError(500, "internal error: the server's log has the details", code="internal_error")


def draining() -> ApiError:
    """Return the 503 of a server that is stopping."""
    return ApiError(503, "the server is stopping. Try again later.", code="stopping", headers={"Retry-After": "10"})


def engine_stopped() -> ApiError:
    """Return the 503 of a server whose engine crashed."""
    return ApiError(503, "the engine has stopped: the server's log has the details", code="engine_stopped")
