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

from eightfold.errors import CapacityError, EightfoldError
from eightfold.messages import MessageError
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

_USE_TOOLS = "Use tools and tool_choice."
_NO_BEAMS = "There is no beam search."

# Field -> values that change nothing, and what to do instead. Anything else is a 400.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "allowed_token_ids": (([],), "Use logit_bias or a grammar."),
    "audio": ((), "Only text is generated."),
    "bad_words": (([],), "Use logit_bias."),
    "chat_template": ((), "The template is chosen when the server starts: --chat-template."),
    "documents": (([],), "Put them into a message."),
    "early_stopping": ((False,), _NO_BEAMS),
    "function_call": (("none",), _USE_TOOLS),
    "functions": (([],), _USE_TOOLS),
    "guided_whitespace_pattern": ((), "Put white space into the grammar."),
    "length_penalty": ((0, 1), _NO_BEAMS),
    "logits_processors": (([],), ""),
    "mm_processor_kwargs": (({},), "Only text is read."),
    "priority": ((0,), "Requests are served in the order in which they come."),
    "return_tokens_as_token_ids": ((False,), ""),
    "suffix": (("",), "Put what comes after into the prompt."),
    "truncate_prompt_tokens": ((), "Send a prompt that fits."),
    "typical_p": ((1,), ""),
    "use_beam_search": ((False,), _NO_BEAMS),
    "web_search_options": ((), "There is no web search."),
}

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
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.message = shorten(" ".join(message.split()), MOST_CHARS)
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        kind = _ERROR_TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """Return a 400."""
    return ApiError(400, message, param=param, code=code)


def refused(error: EightfoldError, *, param: str | None = None) -> ApiError:
    """Return the 400 for input that the engine, the tokenizer or the chat template refuses."""
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
    """The fields of a request; null is the same as not given."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = {name: value for name, value in values.items() if value is not None}
        self._read: set[str] = set()

    def refuse_unsupported(self) -> None:
        """Refuse fields that would change the answer and are not supported."""
        for name in self._values.keys() & REFUSED.keys():
            neutral, advice = REFUSED[name]
            value = self.any(name)
            if not any(value == same and isinstance(value, bool) == isinstance(same, bool) for same in neutral):
                raise bad_request(f"{name} is not supported. {advice}", param=name, code="unsupported_parameter")

    @property
    def ignored(self) -> list[str]:
        """Names of fields that nobody has read."""
        return sorted(self._values.keys() - self._read)

    def any(self, name: str) -> Any:
        self._read.add(name)
        return self._values.get(name)

    def read(self, name: str, kind: Kind, default: Any = None) -> Any:
        """Return a field that has to be of a kind, or the default where it is not given."""
        value = self.any(name)
        return default if value is None else demand(name, value, kind)

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
