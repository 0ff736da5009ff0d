"""The server's log: one line of JSON for everything, on stderr. What users write and get never stands in it."""

from __future__ import annotations

import datetime
import json
import logging
import re
import sys
import time
import traceback
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eightfold.progress import printable

if TYPE_CHECKING:
    from eightfold.engine.outputs import RequestOutput

GONE = 499  # what a request is logged with whose client left before its answer was complete

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(slots=True)
class Record:
    """What is known about one HTTP request, for the log and for its answer's headers; never what it says.

    Times are seconds of time.monotonic; tokens are those of all finished prompts and their answers.
    """

    id: str  # the client's, or our own
    method: str
    path: str  # without the query
    started: float = field(default_factory=time.monotonic)
    status: int = 0  # until the answer begins
    held_bytes: int = 0  # of its body, in memory
    held_entries: int = 0  # log-probabilities that its answers may have
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompts, found in the prefix cache
    tells_cached: bool = False  # to the client
    cache_salt: str = ""  # of the client, see ServerSettings
    client: str = ""  # what tells its client from those with other keys
    generated_tokens: int = 0
    first_token: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    ignored: Sequence[str] = ()  # names of fields that nobody has read
    error: str | None = None  # one word of what went wrong

    def count(self, output: RequestOutput) -> None:
        """Count the tokens of a finished prompt and its answers."""
        self.prompt_tokens += len(output.prompt_ids)
        self.cached_tokens += output.cached_tokens
        self.generated_tokens += sum(len(answer.token_ids) for answer in output.outputs)
        self.finish_reasons += [answer.finish_reason or "abort" for answer in output.outputs]

    def as_json(self) -> dict[str, Any]:
        line: dict[str, Any] = {"id": self.id, "method": self.method, "path": self.path[:200], "status": self.status}
        if self.prompt_tokens:
            line["prompt_tokens"] = self.prompt_tokens
            line["cached_tokens"] = self.cached_tokens
            line["generated_tokens"] = self.generated_tokens
        if self.first_token is not None:
            line["ttft"] = round(self.first_token - self.started, 4)
        line["seconds"] = round(time.monotonic() - self.started, 4)
        if self.finish_reasons:
            line["finish"] = ",".join(self.finish_reasons[:8])
        if self.ignored:
            line["ignored"] = ",".join(name[:40] for name in self.ignored[:16])
        if self.error:
            line["error"] = self.error
        return line


def request_id(given: str | None) -> str:
    """Return the id that a client gave its request, if it is a sane one, or a new one."""
    return given if given is not None and _SANE_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        line: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        request = getattr(record, "record", None)
        if isinstance(request, Record):
            line.update(request.as_json())
        if hasattr(record, "request_id"):
            line["id"] = record.request_id
        if record.exc_info and record.exc_info[0] is not None:
            # Where it happened and not what was said: a message may hold some of a prompt.
            line["exception"] = record.exc_info[0].__name__
            line["traceback"] = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(record.exc_info[2])]
            if record.levelno >= logging.ERROR and logging.getLogger("eightfold").isEnabledFor(logging.DEBUG):
                line["exception_message"] = str(record.exc_info[1])
        return printable(json.dumps(line, separators=(",", ":"), default=str))


def set_up(level: str) -> None:
    """Send the server's and uvicorn's messages from a level on to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    others = "warning" if level in ("debug", "info") else level
    for name, least in (("eightfold", level), ("uvicorn", others), ("asyncio", others)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(least.upper())
