"""What surrounds every request: its id, the key, errors as JSON, its line in the log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eightfold.server.problems import ApiError, internal
from eightfold.server.record import GONE, Record, request_id
from eightfold.server.respond import send_problem
from eightfold.server.service import Service

log = logging.getLogger("eightfold.server")

_OPEN = frozenset({"/", "/health"})  # what needs no key: the page asks for it


class Gateway:
    """Lets requests through to the application and takes note of them."""

    def __init__(self, app: ASGIApp, service: Service, paths: Iterable[str]) -> None:
        self._app, self._service, self._paths = app, service, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request through."""
        if scope["type"] != "http":
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        record = Record(request_id(headers.get(b"x-request-id")), scope["method"], scope["path"])
        scope.setdefault("state", {})["record"] = record
        scope["app"] = self._app  # with it the routes raise what they would else answer in plain text
        id_header = (b"x-request-id", record.id.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", ()), id_header]
            await send(message)

        try:
            await self._answer(scope, receive, send_with_id, headers.get(b"authorization", ""))
        finally:
            self._note(record)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, authorization: str) -> None:
        record: Record = scope["state"]["record"]
        try:
            if scope["path"] not in _OPEN and not self._service.settings.accepts_key(authorization):
                raise _unauthorized(bool(authorization))
            await self._app(scope, receive, send)
        except ClientDisconnect:
            record.status = GONE
        except HTTPException as problem:
            await self._send_problem(record, send, _routing_problem(problem, scope))
        except ApiError as problem:
            await self._send_problem(record, send, problem)
        except asyncio.CancelledError:  # the server has to end
            record.error = "cancelled"
            raise
        except Exception:
            log.exception("a request failed", extra={"request_id": record.id})
            await self._send_problem(record, send, internal())

    async def _send_problem(self, record: Record, send: Send, problem: ApiError) -> None:
        record.error = problem.code
        if record.status == 0:
            await send_problem(send, problem)

    def _note(self, record: Record) -> None:
        self._service.let_go(record)
        path = record.path if record.path in self._paths else "other"
        self._service.metrics.answered(path, record.status)
        quiet = path in ("/health", "/metrics") and record.status == 200
        log.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"record": record})


def _unauthorized(is_given: bool) -> ApiError:
    message = "the API key is wrong" if is_given else "an API key is needed. Send it as Authorization: Bearer KEY."
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _routing_problem(error: HTTPException, scope: Scope) -> ApiError:
    """Return the 404 or 405 of a path or method that is not served."""
    where = f"{scope['method']} {scope['path'][:80]!r}"
    if error.status_code == 405:
        return ApiError(405, f"{where} is not allowed", code="method_not_allowed", headers=dict(error.headers or {}))
    return ApiError(error.status_code, f"{where} is not served here", code="not_found")
