"""The forms of answers, compiled by llguidance inside limits, and a process that tries them first.

A text of a hundred bytes can make llguidance compute for minutes, take gigabytes or overflow the stack, which would end
the process. Limits of the library catch what grows while tokens are chosen, but not all that happens while a form is
compiled. So a helper process, which has the tokenizer ready, forks for each new form. The child has limits for time,
memory and stack, and tells what the form took; if it dies, the form is refused, and nobody else has noticed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from eightfold.engine.form_tokens import Vocabulary
from eightfold.engine.schema_ends import has_end
from eightfold.errors import InputError, UnsupportedError
from eightfold.machine import anonymous_bytes
from eightfold.values import shorten

if TYPE_CHECKING:
    import socket  # only forms need it, and a command should start soon
    import subprocess

MAX_REASON = 300  # characters of llguidance's message

# What compiling a form and its first mask may take.
CPU_SECONDS, WALL_SECONDS, FORM_BYTES = 2.0, 20.0, 32 * 2**20
_SPACE = 128 * 2**20  # of addresses: what is freed again counts too
_STACK = 3 * 2**19  # less than any thread of the server has
_NICE = 5  # answers go before forms
_AT_A_TIME = 3
_IDLE_SECONDS = 300.0  # then the helper ends
_START_SECONDS = 60.0

_NOTHING = "a form in which no token can come next"

_STATES = 50_000  # of a lexer, while tokens are chosen: about 200 bytes each

_VALUES = ("const", "enum", "default", "example", "examples")  # keys of a schema that hold no schemas

_OF_SWITCHES = {"true": "{}", "false": '{"allOf": [false]}'}  # schemas that are no objects: anything, nothing

# JSON has at most so much space between two symbols, or a small model may go on with spaces for ever.
# Where llguidance cannot tell that only one schema of a `oneOf` applies, any of them may.
_JSON_OPTIONS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,40}", "coerce_one_of": True}


class Built(NamedTuple):
    """A compiled form.

    Attributes:
        matcher: llguidance's, at the beginning of an answer.
        size: bytes by which it has made the process larger.
    """

    matcher: Any
    size: int


def build(library: Any, tokenizer: Any, name: str, value: Any) -> Built:
    """Compile a form and compute its first mask, which is the slow one.

    Args:
        library: llguidance.
        tokenizer: llguidance's.
        name: the field of StructuredOutput that is given.
        value: its value.

    Raises:
        ValueError: llguidance does not take it; its words say why.
    """
    before = anonymous_bytes() or 0
    if name == "json_schema" and not has_end(json.loads(value)):
        raise ValueError("Unsatisfiable schema: what it requires has no end")
    limits = library.LLParserLimits(max_lexer_states=_STATES, verbose_errors=False)
    while True:
        text = _source(library.LLMatcher, name, value)
        matcher = library.LLMatcher(tokenizer, text, log_level=0, limits=limits)
        if not matcher.is_error():
            break
        looser = _without_format(value, why(matcher)) if name == "json_schema" else value
        if looser == value:
            raise ValueError(why(matcher))
        value = looser
    first = matcher.deep_copy()  # copies share what they find
    mask = int.from_bytes(first.compute_bitmask(), "little")
    if first.is_error():
        raise ValueError(why(first))
    _require_a_way(matcher, mask)
    return Built(matcher, max((anonymous_bytes() or 0) - before, len(text)))


def _require_a_way(matcher: Any, mask: int) -> None:
    """Refuse a form that becomes too complex with its first token: two of those that its mask allows are tried."""
    problem = ""
    for token in {(mask & -mask).bit_length() - 1, mask.bit_length() - 1} - {-1}:
        answer = matcher.deep_copy()
        if answer.consume_token(token) or not answer.is_error():
            return
        problem = why(answer)
    if problem:
        raise ValueError(problem)


def _source(make: Any, name: str, value: Any) -> str:
    """Return llguidance's grammar of a form."""
    if name == "regex":
        return str(make.grammar_from_regex(value))
    if name == "grammar":
        return str(make.grammar_from_lark(value))
    if name == "choices":
        return str(make.grammar_from_lark("start: " + " | ".join(map(json.dumps, value))))
    schema = _OF_SWITCHES.get(value, value) if name == "json_schema" else '{"type": "object"}'
    return str(make.grammar_from_json_schema(schema, defaults=_JSON_OPTIONS))


def _without_format(schema: str, reason: str) -> str:
    """Return a schema without the format that llguidance does not know: to JSON Schema that is a remark."""
    unknown = reason.removeprefix("Unknown format: ")
    return schema if unknown == reason else json.dumps(_loosened(json.loads(schema), unknown))


def _loosened(schema: Any, unknown: str) -> Any:
    if isinstance(schema, list):
        return [_loosened(each, unknown) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: value if key in _VALUES else _loosened(value, unknown)
        for key, value in schema.items()
        if (key, value) != ("format", unknown)
    }


def _reason(text: str) -> str:
    """Return on one line what is wrong, without the state that llguidance appends."""
    return shorten(" ".join(re.split("<state>|<non-verbose/>", text)[0].split()), MAX_REASON)


def why(matcher: Any) -> str:
    """Return what went wrong in a matcher, in llguidance's words but for one of its codes."""
    reason = _reason(matcher.get_error())
    return _NOTHING if reason == "NoExtensionBias" else reason


def refusal(name: str, got: object, expected: str = "") -> InputError:
    """Return the error of a form that cannot be used."""
    impossible = str(got).startswith((_NOTHING, "Unsatisfiable"))
    usual = "a form that some text has" if impossible else "one that llguidance understands"
    return InputError(f"structured {name}", got=got, expected=expected or usual)


class Trial:
    """The helper process. Threads may share it, and it ends with this object."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._process: subprocess.Popen[bytes] | None = None
        self._helper: socket.socket | None = None
        self._ending: weakref.finalize[..., Trial] | None = None
        self._lock, self._turns = threading.Lock(), threading.Semaphore(_AT_A_TIME)

    def start(self) -> None:
        """Start the helper, which makes itself ready while the caller goes on."""
        with self._lock, contextlib.suppress(OSError):  # `require` tries it again
            self._started()

    def require(self, name: str, value: Any) -> int:
        """Compile a form in a process of its own; return the bytes that it takes.

        Raises:
            InputError: llguidance refuses it, or it takes too much time or memory.
            UnsupportedError: there is no helper process.
        """
        with self._turns:
            said = self._ask(json.dumps([name, value]).encode())
        if "refused" in said:
            raise refusal(name, said["refused"])
        if said.get("size", FORM_BYTES + 1) > FORM_BYTES:
            limits = f"{CPU_SECONDS:g} s or {FORM_BYTES >> 20} MiB"
            raise refusal(name, f"one that takes more than {limits} to compile", "a simpler one")
        return int(said["size"])

    def _ask(self, order: bytes) -> dict[str, Any]:
        """Return what the child says; nothing if it died."""
        import socket

        for _ in range(2):  # an idle helper may have ended just now
            ours, theirs = socket.socketpair()
            with ours, theirs:
                try:
                    with self._lock:
                        socket.send_fds(self._started(), [b"f"], [theirs.fileno()])
                    theirs.close()
                    ours.settimeout(WALL_SECONDS + 5)
                    ours.sendall(order)
                    ours.shutdown(socket.SHUT_WR)
                    answer = _read(ours)
                except OSError:  # it has ended, or none can be started
                    answer = b""
            if answer[:1] == b"+":  # a child has taken it
                return dict(json.loads(answer[1:] or b"{}"))
            with self._lock:
                self.end()
        raise UnsupportedError(
            "structured output",
            got="a helper process that ended",
            action="Look at the limits for processes and memory.",
        )

    def _started(self) -> socket.socket:
        """Return the way to the helper, which loads the tokenizer while orders wait."""
        import socket
        import subprocess

        if self._helper is None:
            helper, theirs = socket.socketpair()
            with theirs, os.fdopen(os.memfd_create("vocabulary"), "wb") as vocabulary:
                text, *rest = self._vocabulary
                vocabulary.write(json.dumps(rest).encode() + b"\n" + text.encode())
                vocabulary.flush()
                files = (theirs.fileno(), vocabulary.fileno())
                code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve{files}"
                process = subprocess.Popen(
                    [sys.executable, "-c", code],
                    pass_fds=files,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env={**os.environ, "MALLOC_ARENA_MAX": "1"},
                )
            helper.settimeout(_START_SECONDS)
            self._helper, self._process = helper, process
            self._ending = weakref.finalize(self, _end, helper, process)
        return self._helper

    def end(self) -> None:
        """End the helper, if there is one."""
        if self._ending is not None:
            self._ending()
        self._helper = self._process = self._ending = None


def _end(helper: socket.socket, process: subprocess.Popen[bytes]) -> None:
    helper.close()
    process.kill()
    process.wait()


def _read(sock: socket.socket) -> bytes:
    """Read until the other side has no more to say."""
    pieces = []
    while piece := sock.recv(65536):
        pieces.append(piece)
    return b"".join(pieces)


# --- the helper


def serve(number: int, vocabulary: int) -> None:
    """Be the helper: fork for every socket that comes in through socket `number`, until nothing comes any more.

    Args:
        number: of the socket.
        vocabulary: number of the file that has it.
    """
    import signal
    import socket

    import llguidance

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent decides when to end
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children leave nothing behind
    orders = socket.socket(fileno=number)
    with os.fdopen(vocabulary, "rb") as file:
        file.seek(0)
        size, stop_ids = json.loads(file.readline())
        tokenizer, _ = Vocabulary(file.read().decode(), size, stop_ids).load(llguidance)
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    orders.settimeout(_IDLE_SECONDS)
    while True:
        try:
            _, files, _, _ = socket.recv_fds(orders, 1, 1)
        except TimeoutError:
            return
        if not files:
            return
        with socket.socket(fileno=files[0]) as ours:
            if os.fork() == 0:
                orders.close()
                try:
                    _limit_this_process()
                    threading.stack_size(_STACK)
                    thread = threading.Thread(target=_try, args=(ours, llguidance, tokenizer))
                    thread.start()
                    thread.join()
                finally:
                    os._exit(0)


def _limit_this_process() -> None:
    """Let the system end this process when it takes too much."""
    import resource
    import signal

    for timer, seconds in ((signal.ITIMER_PROF, CPU_SECONDS), (signal.ITIMER_REAL, WALL_SECONDS)):
        signal.setitimer(timer, seconds)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # where there is no /proc, memory is not limited
        pages = int(Path("/proc/self/statm").read_bytes().split()[0])
        space = pages * resource.getpagesize() + _SPACE
        resource.setrlimit(resource.RLIMIT_AS, (space, space))


def _try(sock: socket.socket, library: Any, tokenizer: Any) -> None:
    sock.sendall(b"+")
    name, value = json.loads(_read(sock))
    try:
        said: dict[str, Any] = {"size": build(library, tokenizer, name, value).size}
    except ValueError as error:
        said = {"refused": str(error)}
    except BaseException as error:  # what Rust panics with is no Exception
        said = {"refused": _reason(f"{type(error).__name__}: {error}")}
    sock.sendall(json.dumps(said).encode())
