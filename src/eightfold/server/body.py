"""A request's body as JSON: bounded in size, time and depth, and of nothing that JSON does not know."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from typing import Any

from starlette.requests import Request

from eightfold.server.fields import ApiError, bad_request

MAX_BODY_BYTES = 4 * 2**20
READ_AWAY_BYTES = 16 * MAX_BODY_BYTES  # of a body that is too large
BODY_SECONDS = 30.0  # a body has to have arrived by then
MAX_JSON_DEPTH = 64
MAX_JSON_VALUES = 1_000_000  # more than a body of token ids has
LARGE_BODY_BYTES = 32 * 2**10  # larger ones are parsed and tokenized where they hold up nobody else


async def read_json(request: Request, hold: Callable[[int], None]) -> dict[str, Any]:
    """Return a body's JSON object.

    Args:
        request: the request.
        hold: is told of bytes as they arrive, and may refuse them.

    Raises:
        ApiError: 400, 408, 413 or 415, or what `hold` raises.
        ClientDisconnect: the client left before the body's end.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        # Also what keeps web pages of other origins from sending requests without asking first.
        raise ApiError(415, f"Content-Type: got {kind[:80] or 'none'}, expected application/json")
    try:
        raw = await asyncio.wait_for(_collect(request, hold), BODY_SECONDS)
    except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
        raise ApiError(408, f"body: not there after {BODY_SECONDS:.0f} s", headers={"Connection": "close"}) from None
    return await asyncio.to_thread(_parse, raw) if len(raw) > LARGE_BODY_BYTES else _parse(raw)


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


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
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
    _require_size(value)
    if b"\\ud" in raw or b"\\uD" in raw:  # only so can half a character come in, which nobody could write again
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise bad_request("body: got half a surrogate pair in a text, expected Unicode") from None
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise bad_request("body: got a number too large, expected a finite one")
    return value


def _refuse_constant(name: str) -> None:
    raise bad_request(f"body is not JSON: {name} is no number of JSON")


def _too_deep() -> ApiError:
    return bad_request(f"body: got JSON nested deeper than {MAX_JSON_DEPTH} levels")


def _require_size(value: dict[str, Any]) -> None:
    """Check the depth and the number of values, a level at a time: recursion would have an end of its own."""
    level: list[Any] = [value]
    seen = 0
    for _ in range(MAX_JSON_DEPTH):
        seen += sum(map(len, level))
        if seen > MAX_JSON_VALUES:
            raise bad_request(f"body: got more than {MAX_JSON_VALUES} values")
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [item for items in inner for item in items if isinstance(item, (dict, list))]
        if not level:
            return
    raise _too_deep()
