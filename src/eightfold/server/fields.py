"""A request's body and its fields, read by their kinds, and the errors of OpenAI's API that say what is wrong with one.

Everything in this package that reads a request raises ApiError for what it cannot use. A body is bounded in size, time
and depth. Fields that would change the answer and are not supported are refused; what nobody reads is ignored.
docs/serving.md has the table.
"""

from __future__ import annotations

import asyncio
import gc
import json
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from eightfold.errors import BusyError, CapacityError, EightfoldError
from eightfold.messages import MessageError
from eightfold.server.field_table import ENDPOINTS, GENERATING, Field, canonical, elsewhere, find, same
from eightfold.values import LIST, WHOLE, Kind, shorten, shown_as_json

if TYPE_CHECKING:
    from starlette.requests import Request

MAX_BODY_BYTES = 4 * 2**20
READ_AWAY_BYTES = 16 * MAX_BODY_BYTES  # of a body that is too large
BODY_SECONDS = 30.0  # a body has to have arrived by then
MOST_CHARS = 500  # of an error's message: libraries may repeat in theirs what they were given
MAX_JSON_DEPTH = 64
MAX_JSON_VALUES = 1_000_000  # more than a body of token ids has
# In texts too: who sends more asks for more tokens than a model reads. Python's parser lets no other thread run, and is
# slow where many lists are made.
MAX_JSON_BRACKETS = 2**18
LARGE_BODY_BYTES = 32 * 2**10  # larger ones are parsed and tokenized where they hold up nobody else

_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """An answer other than 200: a line for a person, a word for a program, and the field that is to blame."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.message = shorten(" ".join(message.split()), MOST_CHARS)
        super().__init__(self.message)
        self.status, self.code, self.param = status, code, param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        kind = _ERROR_TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """Return a 400."""
    return ApiError(400, message, param=param, code=code)


def refused(error: EightfoldError, *, param: str | None = None) -> ApiError:
    """Return the 400 for input that the engine, the tokenizer or the template refuses; 429 if it may do so later."""
    if isinstance(error, BusyError):
        return ApiError(429, str(error), code="too_many_requests", param=param, headers={"Retry-After": "10"})
    code = "context_length_exceeded" if isinstance(error, CapacityError) else None
    if isinstance(error, MessageError) and error.is_media:
        code = "unsupported_content"
    return bad_request(str(error), param=param, code=code)


def wrong(name: str, value: Any, expected: str) -> ApiError:
    """Return the 400 for a field that is not what it should be."""
    return bad_request(f"{name}: got {shown_as_json(value)}, expected {expected}", param=name.partition("[")[0])


def internal() -> ApiError:
    """Return a 500, which tells a stranger nothing."""
    return ApiError(500, "internal error: the server's log has the details", code="internal_error")


def draining() -> ApiError:
    """Return the 503 of a server that is stopping."""
    return ApiError(503, "the server is stopping. Try again later.", code="stopping", headers={"Retry-After": "10"})


class Fields:
    """The fields of a request, or of an object in it; null is the same as not given.

    Args:
        values: names and values.
        path: the endpoint, as the table of fields calls it; empty: none of the table.
        within: what stands before the names in the table and in errors, such as `stream_options.`.
    """

    def __init__(self, values: Mapping[str, Any], path: str = "", *, within: str = "") -> None:
        self._values = {name: value for name, value in values.items() if value is not None}
        self._path, self._within = path, within
        self._read: set[str] = set()
        self._inner: list[Fields] = []
        self._noted: list[str] = []  # names in objects that are not read by name

    def translated(self, path: str, changed: Mapping[str, Any]) -> Fields:
        """Return these fields as those of another endpoint, with others in their places; what is read there is read."""
        fields = Fields({**self._values, **changed}, path)
        fields._read = self._read
        return fields

    def refuse_unsupported(self) -> None:
        """Refuse fields that would change the answer and are not supported, here or at all."""
        for name, value in self._values.items():
            full = self._within + name
            known = find(full, self._path)
            if known is not None and known.is_refused:
                if not known.beside or self._does_something(known.beside):
                    self._read.add(name)
                    self._require_neutral(known, full, value, f"is not supported. {known.help}")
            elif self._path in GENERATING and find(canonical(full), self._path) is None:
                other = elsewhere(full)
                if other is not None:
                    where = " and ".join(ENDPOINTS[path] for path in sorted(other.paths & GENERATING))
                    self._require_neutral(other, full, value, f"is a field of {where}.")

    def _require_neutral(self, known: Field, name: str, value: Any, message: str) -> None:
        if not known.changes_nothing(value):
            raise bad_request(f"{name} {message}", param=name, code="unsupported_parameter")

    def _does_something(self, name: str) -> bool:
        value, known = self.any(name), find(name, self._path)
        return value is not None and known is not None and not known.changes_nothing(value)

    @property
    def ignored(self) -> list[str]:
        """Names of fields that nobody has read, and of those in objects that were."""
        own = [self._within + name for name in self._values.keys() - self._read]
        return sorted([*own, *self._noted, *(name for inner in self._inner for name in inner.ignored)])

    def note_ignored(self, name: str) -> None:
        """Take note of a name in an object, with its dots, that changes nothing."""
        self._noted.append(name)

    def spelled(self, name: str) -> str:
        """Return which of a field's names the request has, with the object that it is in."""
        given = [each for each in self._names(name) if each in self._values]
        return self._within + (given[0] if given else name)

    def _names(self, name: str) -> tuple[str, ...]:
        known = find(self._within + name, self._path)
        return (name,) if known is None else (name, *known.also)

    def any(self, name: str) -> Any:
        """Return a field, by whichever of its names it has."""
        given = [each for each in self._names(name) if each in self._values]
        self._read |= {name, *given}
        for other in given[1:]:
            if not same(self._values[given[0]], self._values[other]):
                both = f"{self._within}{given[0]} and {self._within}{other}"
                raise bad_request(f"{both}: got different values. Give one.", param=self._within + other)
        return self._values[given[0]] if given else None

    def read(self, name: str, kind: Kind | None = None, default: Any = None) -> Any:
        """Return a field that has to be of a kind, or the default where it is not given; both as the table says."""
        value = self.any(name)
        known = None if kind is not None else find(self._within + name, self._path)
        if known is not None:
            kind, default = known.kind, known.default if default is None else default
        return default if value is None or kind is None else demand(self.spelled(name), value, kind)

    def inside(self, name: str) -> Fields | None:
        """Return the fields of an object; None where it is not given."""
        values = self.read(name)
        if values is None:
            return None
        inner = Fields(values, self._path, within=f"{self.spelled(name)}.")
        inner.refuse_unsupported()
        self._inner.append(inner)
        return inner

    def items(self, name: str, most: int) -> list[Any]:
        """Return a list of so many items at most; an empty one where it is not given."""
        value: list[Any] = self.read(name, LIST, [])
        if len(value) > most:
            raise bad_request(f"{name}: got {len(value)} items, expected at most {most}", param=name)
        return value


def demand(name: str, value: Any, kind: Kind) -> Any:
    """Return a value of a request that has to be of a kind."""
    misfit = kind.misfit(value)
    if misfit is not None:
        raise wrong(name, *misfit)
    return value


def between(least: int, most: int) -> Kind:
    """Return the kind of whole numbers in [least, most]."""
    return WHOLE._replace(least=least, most=most, outside=f"{least} to {most}")


async def receive(request: Request, hold: Callable[[int], None]) -> bytes:
    """Return a body that is said to be JSON.

    Args:
        request: the request.
        hold: is told of bytes as they arrive, and may refuse them.

    Raises:
        ApiError: 408, 413 or 415, or what `hold` raises.
        ClientDisconnect: the client left before the body's end.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        # Also what keeps web pages of other origins from sending requests without asking first.
        raise ApiError(415, f"Content-Type: got {kind[:80] or 'none'}, expected application/json")
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


def parse(raw: bytes) -> tuple[dict[str, Any], int]:
    """Return a body's JSON object, and how many values are in it; ApiError 400 where it is none that can be used."""
    if raw.count(b"[") + raw.count(b"{") > MAX_JSON_BRACKETS:
        raise bad_request(f"body: got more than {MAX_JSON_BRACKETS} brackets")
    collects = gc.isenabled()
    gc.disable()  # it would look at every list again and again, and JSON has no cycles
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
    finally:
        if collects:
            gc.enable()
    if not isinstance(value, dict):
        raise bad_request("body: expected a JSON object")
    count = _require_size(value)
    if b"\\ud" in raw or b"\\uD" in raw:  # only so can half a character come in, which nobody could write again
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise bad_request("body: got half a surrogate pair in a text, expected Unicode") from None
    return value, count


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise bad_request("body: got a number too large, expected a finite one")
    return value


def _refuse_constant(name: str) -> None:
    raise bad_request(f"body is not JSON: {name} is no number of JSON")


def _too_deep() -> ApiError:
    return bad_request(f"body: got JSON nested deeper than {MAX_JSON_DEPTH} levels")


def _require_size(value: dict[str, Any]) -> int:
    """Check the depth and return the number of values, a level at a time: recursion would have an end of its own."""
    level: list[Any] = [value]
    seen = 0
    for _ in range(MAX_JSON_DEPTH):
        seen += sum(map(len, level))
        if seen > MAX_JSON_VALUES:
            raise bad_request(f"body: got more than {MAX_JSON_VALUES} values")
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [item for items in inner for item in items if isinstance(item, (dict, list))]
        if not level:
            return seen
    raise _too_deep()
