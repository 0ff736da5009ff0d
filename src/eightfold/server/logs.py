"""The server's log: one line of JSON for everything, on stderr. What users write and get never stands in it."""

from __future__ import annotations

import datetime
import logging
import sys
import traceback
from typing import Any

from eightfold.server.record import Record, log_line

LEVELS = ("debug", "info", "warning", "error")


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
        return log_line(line)


def set_up(level: str) -> None:
    """Send the server's and uvicorn's messages from a level on to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    for name, least in (("eightfold", level), ("uvicorn", "warning" if level in ("debug", "info") else level)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(least.upper())
