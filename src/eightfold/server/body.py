"""A request's body as JSON: bounded in size, time and depth, and of nothing that JSON does not know."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from typing import Any

from starlette.requests import Request

from eightfold.server.problems import ApiError, bad_request
from eightfold.server.settings import (
    BODY_SECONDS,
    LARGE_BODY_BYTES,
    MAX_BODY_BYTES,
    MAX_JSON_DEPTH,
    MAX_JSON_VALUES,
    READ_AWAY_BYTES,
)


async def read_json(request: Request, hold: Callable[[int], None]) -> dict[str, Any]:
    """Return a body's JSON object.

    Args:
        request: whose body it is.
        hold: is told of bytes as they arrive, and may refuse them.

    Raises:
        ApiError: 400, 408, 413 or 415, or what `hold` raises.
        ClientDisconnect: before its end.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        # Also what keeps web pages of other origins from sending requests without asking first.
        raise ApiError(415, f"Content-Type: got {kind[:80] or 'none'}, expected application/json")
    raw = await _read(request, hold)
    return await asyncio.to_thread(parse_object, raw) if len(raw) > LARGE_BODY_BYTES else parse_object(raw)


async def _read(request: Request, hold: Callable[[int], None]) -> bytes:
    try:
        return await asyncio.wait_for(_collect(request, hold), BODY_SECONDS)
    except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
        raise ApiError(408, f"body: not there after {BODY_SECONDS:.0f} s", headers={"Connection": "close"}) from None


async def _collect(request: Request, hold: Callable[[int], None]) -> bytes:
    """Return the body. One that is too large is read to some length, so that its sender comes to read the answer."""
    declared = request.headers.get("content-length", "0")
    too_large = declared.isdecimal() and (len(declared) > 18 or int(declared) > MAX_BODY_BYTES)
    if too_large and "expect" in request.headers:
        raise _too_large()
    parts, size = list[bytes](), 0
    async for part in request.stream():
        size += len(part)
        too_large = too_large or size > MAX_BODY_BYTES
        if size > READ_AWAY_BYTES:
            break
        if not too_large:
            hold(len(part))
            parts.append(part)
    if too_large:
        raise _too_large()
    return b"".join(parts)


def _too_large() -> ApiError:
    message = f"body: got more than {MAX_BODY_BYTES} bytes. Send less text."
    return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})


def parse_object(raw: bytes) -> dict[str, Any]:
    """Return the JSON object that bytes hold.

    Raises:
        ApiError: 400: no UTF-8, no JSON, no object, NaN, half a surrogate pair, too deep or too many values.
    """
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise bad_request(f"body: got byte {error.start} that is not UTF-8, expected JSON in UTF-8") from None
    except json.JSONDecodeError as error:
        raise bad_request(f"body is not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:  # an integer of thousands of digits
        raise bad_request(f"body is not JSON that can be used: {error}") from None
    if not isinstance(value, dict):
        raise bad_request("body: expected a JSON object")
    _inspect(value)
    return value


def _refuse_constant(name: str) -> None:
    raise bad_request(f"body is not JSON: {name} is no number of JSON")


def _too_deep() -> ApiError:
    return bad_request(f"body: got JSON nested deeper than {MAX_JSON_DEPTH} levels")


def _inspect(value: dict[str, Any]) -> None:
    """Check the depth, the number of values, numbers and texts, without recursion."""
    level: list[Any] = [value]
    seen = 0
    for _ in range(MAX_JSON_DEPTH):
        below = list[Any]()
        for container in level:
            if isinstance(container, dict):
                _check_texts(container)
                items: Any = container.values()
            else:
                items = container
            seen += len(container)
            below += [item for item in items if _holds_more(item)]
        if seen > MAX_JSON_VALUES:
            raise bad_request(f"body: got more than {MAX_JSON_VALUES} values")
        if not below:
            return
        level = below
    raise _too_deep()


def _check_texts(keys: Any) -> None:
    for key in keys:
        _check_text(key)


def _holds_more(item: Any) -> bool:
    check = _CHECKS.get(type(item))
    if check is None:
        return isinstance(item, (dict, list))
    check(item)
    return False


def _check_text(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise bad_request("body: got half a surrogate pair in a text, expected Unicode") from None


def _check_number(number: float) -> None:
    if not math.isfinite(number):
        raise bad_request("body: got a number too large, expected a finite one")


_CHECKS: dict[type, Callable[[Any], None]] = {str: _check_text, float: _check_number}
