"""Chat templates, each rendered in a process of its own with limits of time and memory.

A template is a program from a stranger's directory. jinja2's immutable sandbox keeps it from files and from Python, but
not from loops within loops, nor from doubling a text forty times. Inside one process nothing stops that: much of it
runs in C and holds the interpreter's lock. So this file is also the program that renders. It stays alive from one
conversation to the next, and imports nothing of ours.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import json
import os
import pickle
import resource
import signal
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RENDER_SECONDS = 10
MEMORY_BYTES = 512 * 2**20  # of address space, what Python needs included
MAX_CHARS = 16 * 2**20  # of a rendered conversation
MOST_SHOWN = 300  # characters of a message: a template may repeat in it what it was given
_MEMORY = f"{MEMORY_BYTES >> 20} MiB of memory"
_MOST_IDLE = 4  # processes
_MOST_COMPILED = 8  # templates that a process keeps

_LENGTH = struct.Struct("<Q")


class TemplateError(Exception):
    """A template does not do what it should.

    Attributes:
        fault: "syntax", where it is no template; "refusal", where it does not accept its variables; or "limit", where
            it takes too long, too much memory, or gives too long a text.
    """

    def __init__(self, message: str, fault: str) -> None:
        super().__init__(message)
        self.fault = fault


def compile_template(source: str) -> None:
    """Check that a text is a template; TemplateError where it is not."""
    _ask(source, None)


def render_template(source: str, given: Mapping[str, Any]) -> str:
    """Return what a template makes of its variables; TemplateError where that fails."""
    return _ask(source, dict(given))


def _ask(source: str, given: dict[str, Any] | None) -> str:
    try:
        request = pickle.dumps((source, given))
    except Exception as error:  # whatever an object of the caller's raises
        raise TemplateError(f"what cannot be passed on: {error}", "refusal") from None
    try:
        renderer = _idle.pop()
    except IndexError:
        renderer = _Renderer()
    try:
        answer = renderer.ask(request)
    except BaseException:  # an interrupt too: its answer would be taken for that of the next request
        renderer.end()
        raise
    if len(_idle) < _MOST_IDLE:
        _idle.append(renderer)
    else:
        renderer.end()
    if "fault" in answer:
        raise TemplateError(answer["text"], answer["fault"])
    return answer["text"]


class _Renderer:
    """The process that renders."""

    def __init__(self) -> None:
        import subprocess  # not at the start of a command that renders nothing

        # Python puts the folder of this file before its path, and not the current one, which may be a model's.
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,  # Ctrl-C is not for it
        )
        folders = [str(Path(folder).absolute()) for folder in sys.path if folder]
        self._send(pickle.dumps((folders, RENDER_SECONDS)))

    def ask(self, request: bytes) -> dict[str, str]:
        """Return the answer to a request; TemplateError where the limits have killed the process."""
        assert self._process.stdout is not None
        try:
            self._send(request)
            answer: dict[str, str] = json.loads(self._process.stdout.readline())
        except (OSError, ValueError):
            limit = f"{RENDER_SECONDS} s" if self._process.wait() == -signal.SIGALRM else _MEMORY
            raise TemplateError(f"more than {limit}", "limit") from None
        return answer

    def _send(self, content: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(_LENGTH.pack(len(content)) + content)
        self._process.stdin.flush()

    def end(self) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        self._process.wait()


_idle: list[_Renderer] = []
os.register_at_fork(after_in_child=_idle.clear)


@atexit.register
def _end_all() -> None:
    while _idle:
        _idle.pop().end()


# What follows runs in the other process.


def _serve() -> None:
    requests, answers = sys.stdin.buffer, sys.stdout.buffer

    def receive() -> bytes:
        length = requests.read(_LENGTH.size)
        return requests.read(*_LENGTH.unpack(length)) if length else b""

    sys.path[:], seconds = pickle.loads(receive())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # it ends the process, whatever that is doing
    environment, compiled = _sandbox(), dict[str, Any]()
    while request := receive():
        signal.setitimer(signal.ITIMER_REAL, seconds)
        answer = json.dumps(_answer(environment, compiled, request)).encode()
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(answer + b"\n")
        answers.flush()


def _answer(environment: Any, compiled: dict[str, Any], request: bytes) -> dict[str, str]:
    fault = "syntax"
    try:
        source, given = pickle.loads(request)
        if source not in compiled:
            while len(compiled) >= _MOST_COMPILED:
                compiled.popitem()
            compiled[source] = environment.from_string(source)
        fault = "refusal"
        text = "" if given is None else str(compiled[source].render(given))
    except MemoryError:
        return {"fault": "limit", "text": f"more than {_MEMORY}"}
    except Exception as error:  # the template is a program: a division by zero in it is one too
        return {"fault": fault, "text": (str(error) or type(error).__name__)[:MOST_SHOWN]}
    if len(text) > MAX_CHARS:
        return {"fault": "limit", "text": f"more than {MAX_CHARS >> 20} million characters"}
    return {"text": text}


def _sandbox() -> Any:
    """Return the jinja2 environment of chat templates, with the functions that the field's templates call."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """{% generation %} marks for training what the assistant says; here its body is simply rendered."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


if __name__ == "__main__":
    _serve()
