"""What is known about one HTTP request: for its line in the log and for its answer's headers. Never what it says."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
GONE = 499  # what a request is logged with whose client left before its answer was complete


@dataclass(slots=True)
class Record:
    """One HTTP request.

    Attributes:
        id: the client's, or our own.
        method: of HTTP.
        path: without what follows a question mark.
        started: seconds of time.monotonic.
        status: of the answer; 0 until it begins.
        held_bytes: of its body, as admission counts them.
        prompt_tokens: of all prompts.
        cached_tokens: of them found in the cache.
        generated_tokens: of all answers.
        first_token: seconds of time.monotonic.
        finish_reasons: of its answers.
        ignored: names of fields that were.
        error: one word of what went wrong.
    """

    id: str
    method: str
    path: str
    started: float = field(default_factory=time.monotonic)
    status: int = 0
    held_bytes: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    first_token: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    ignored: Sequence[str] = ()
    error: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return what the log shows."""
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


def log_line(content: dict[str, Any]) -> str:
    """Return one line of JSON in ASCII."""
    return json.dumps(content, separators=(",", ":"), default=str)
