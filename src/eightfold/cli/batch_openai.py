"""OpenAI's batch file: requests to the server's endpoints, a line each, read and answered as the server does.

Source: OpenAI's guide to its Batch API. What makes a line no request at all ends the run before it begins, as OpenAI
refuses such a file; a request that the server would refuse is answered by the server's error.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from eightfold.cli.batch import LineError, Started
from eightfold.cli.batch_output import Head, LineForm
from eightfold.errors import EightfoldError, one_of
from eightfold.server.field_table import CHAT, COMPLETIONS, ENDPOINTS, RESPONSES
from eightfold.server.fields import ApiError, Fields, bad_request, refused
from eightfold.server.logs import Record
from eightfold.server.requests import read_chat, read_completion
from eightfold.server.response_items import read_items
from eightfold.server.response_requests import read_response
from eightfold.server.served import Served
from eightfold.values import shorten

if TYPE_CHECKING:
    from eightfold.engine.engine import Engine
    from eightfold.engine.outputs import RequestOutput
    from eightfold.server.generation import Asked

_KEYS = ("custom_id", "method", "url", "body")
_ID = "batch_req_"  # then both halves of the fingerprint


def _read_response(fields: Fields, served: Served) -> Asked:
    if fields.read("previous_response_id") is not None:
        message = "previous_response_id: a batch keeps no responses. Send the whole input."
        raise bad_request(message, param="previous_response_id")
    return read_response(fields, served, read_items(fields.any("input"), lambda name: None), None)


_READERS: dict[str, Callable[[Fields, Served], Asked]] = {
    CHAT: read_chat,
    COMPLETIONS: read_completion,
    RESPONSES: _read_response,
}
_PATHS = {ENDPOINTS[path]: path for path in _READERS}


class OpenAiBatch:
    """The requests of a file in OpenAI's form.

    Args:
        names: of the model.
    """

    refusals: tuple[type[Exception], ...] = (EightfoldError, ApiError)

    def __init__(self, names: Sequence[str]) -> None:
        self.form = LineForm(f'{{"id": "{_ID}'.encode(), self._head)
        self._names, self._setup = names, ""
        self._requests: list[tuple[str, str, dict[str, Any]]] = []  # custom_id, path, body
        self._lines = dict[str, int]()  # of the input, by custom_id
        self._indices = dict[str, int]()

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def needs_template(self) -> bool:
        return any(path != COMPLETIONS for _, path, _ in self._requests)

    def add(self, fields: dict[str, Any], number: int) -> None:
        """Add the request of a line; LineError where it is none."""
        for name in fields:
            if name not in _KEYS:
                raise LineError(f"the field {shorten(name)}", f"only {', '.join(_KEYS)}")
        custom_id, method, url, body = (fields.get(name) for name in _KEYS)
        if not isinstance(custom_id, str) or not custom_id:
            raise LineError(f"custom_id {_json(custom_id)}", "a text that is not empty")
        if custom_id in self._lines:
            raise LineError(f"custom_id {_json(custom_id)}, as in line {self._lines[custom_id]}", "one of its own")
        if method != "POST":
            raise LineError(f"method {_json(method)}", "POST")
        if not isinstance(url, str) or url not in _PATHS:
            raise LineError(f"url {_json(url)}", one_of(_PATHS))
        if not isinstance(body, dict):
            raise LineError(f"body {_json(body)}", "an object")
        self._lines[custom_id] = number
        self._indices[custom_id] = len(self._requests)
        self._requests.append((custom_id, _PATHS[url], body))

    def fingerprint(self, index: int) -> str:
        content = json.dumps(self._requests[index], sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()

    def open(self, engine: Engine, setup: str) -> None:
        self._served, self._setup = Served(engine.tokenizer, engine.max_model_len, self._names), setup
        self._served.arithmetic = (engine.config.attention_mode, engine.config.dynamic)

    def start(self, index: int) -> Started:
        _, path, body = self._requests[index]
        served = self._served
        fields = served.fields(body, path)
        asked = _READERS[path](fields, served)
        if asked.streams:
            raise bad_request("stream: got true, expected false: a batch has whole answers", param="stream")
        encoded = asked.encode(served.tokenizer)
        served.require_fit(encoded.prompts)

        def write(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
            record = Record(f"req_{uuid.uuid4().hex}", "POST", ENDPOINTS[path], tells_cached=bool(asked.cache_salt))
            for output in outputs:
                record.count(output)
            return self._line(index, 200, encoded.answer.whole(outputs, record), record.id)

        return Started(encoded.prompts, encoded.params or asked.params, write, asked.cache_salt)

    def refused(self, index: int, error: Exception) -> dict[str, Any]:
        problem = error if isinstance(error, ApiError) else refused(error)  # type: ignore[arg-type]
        return self._line(index, problem.status, problem.body(), f"req_{uuid.uuid4().hex}")

    def _line(self, index: int, status: int, body: dict[str, Any], request_id: str) -> dict[str, Any]:
        return {
            "id": f"{_ID}{self._setup}{self.fingerprint(index)}",
            "custom_id": self._requests[index][0],
            "response": {"status_code": status, "request_id": request_id, "body": body},
            "error": None,
        }

    def _head(self, line: dict[str, Any]) -> Head | None:
        name, custom_id, response = line.get("id"), line.get("custom_id"), line.get("response")
        if not isinstance(name, str) or not isinstance(custom_id, str) or not isinstance(response, dict):
            return None
        digits = name.removeprefix(_ID)
        if len(digits) != 32 or len(digits) == len(name):
            return None
        failed = response.get("status_code") != 200
        shown = f"custom_id {_json(custom_id)}"
        return Head(self._indices.get(custom_id), shown, f"{digits[:16]}.{digits[16:]}", failed)


def _json(value: Any) -> str:
    return shorten(json.dumps(value))
