"""What every script shares: where the server is, what is asked, and one line of JSON for each thing that was tried.

The scripts run in environments that have the clients and not eightfold.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

URL = os.environ["EIGHTFOLD_URL"]  # ends in /v1
THINKING_URL = os.environ["EIGHTFOLD_THINKING_URL"]  # the same model with a template that opens <think>
KEY = os.environ["EIGHTFOLD_API_KEY"]
MODEL = os.environ["EIGHTFOLD_MODEL"]

HELLO = "Say hello."
SUM = "What is 2 + 3?"
# A model as small as this one calls again and again without being told not to.
SYSTEM = (
    "You are a helpful assistant. If you see a tool response, do not call the function again: "
    "answer the question with a sentence."
)
SYSTEM_IN_JSON = SYSTEM.replace("with a sentence", 'in JSON, such as {"answer": "It is sunny."}')
WEATHER = "What is the weather in Paris?"
RAIN = '{"weather": "rain", "degrees": 12}'
FAMILY = (
    "Ada is 36. She lives in the city of London, postcode N1. Her child Byron is 7 and lives in Paris, postcode 75."
)
TOO_LONG = "one two three four " * 4000  # 16,000 tokens


class Report:
    """Runs what is registered with it at once, and prints what came of it.

    Args:
        client: the row of the table.
        package: whose version it shows.
    """

    def __init__(self, client: str, package: str) -> None:
        self._about = {"client": client, "package": package, "version": version(package)}

    def capability(self, name: str) -> Callable[[Callable[[], Any]], None]:
        """Try a function, which may be a coroutine's; what it returns is the detail, what it raises the failure."""

        def attempt(check: Callable[[], Any]) -> None:
            try:
                found = check()
                detail, ok = asyncio.run(found) if inspect.iscoroutine(found) else found, True
            except BaseException as error:
                traceback.print_exc()
                detail, ok = f"{type(error).__name__}: {error}", False
            line = {**self._about, "capability": name, "ok": ok, "detail": str(detail)[:300]}
            print(json.dumps(line), file=sys.__stdout__, flush=True)

        return attempt


def refused(call: Callable[[], Any], kind: type[Exception], words: str = "", code: str | None = None) -> str:
    """Require that a call fails with this exception, these words and this code of OpenAI's; return what it says."""
    try:
        found = call()
    except kind as error:
        assert words in str(error) and code in (None, getattr(error, "code", None)), error
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"not refused, but {found!r:.200}")
