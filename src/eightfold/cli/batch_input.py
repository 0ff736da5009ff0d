"""The prompts of `run --input-file`: lines of JSON, or one text a line."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from eightfold.cli import console
from eightfold.cli.generating import sampling_params
from eightfold.engine.sampling_params import FORMS, SamplingParams, StructuredOutput, biases_by_id, schema_text
from eightfold.errors import EightfoldError, InputError, one_of
from eightfold.files import open_given, parse_value
from eightfold.messages import Message, read_messages
from eightfold.tokenizer import Tokenizer
from eightfold.values import WHOLE, is_token_ids, shorten

# A text, a chat, or token ids.
Prompt = str | list[Message] | list[int]

MAX_PROMPTS = 1_000_000  # in a file

PROMPTS = ("prompt", "messages", "prompt_token_ids")
_PARAMS = tuple(field.name for field in dataclasses.fields(SamplingParams))
_FIELDS = (*PROMPTS, "id", *_PARAMS)


@dataclasses.dataclass(frozen=True)
class BatchRequest:
    """One prompt."""

    index: int  # in the file, from 0; empty lines do not count
    id: str | int | None  # the user's name for it
    prompt: Prompt
    params: SamplingParams

    @property
    def needs_template(self) -> bool:
        return isinstance(self.prompt, list) and isinstance(self.prompt[0], dict)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that differ where the id, the prompt or the parameters do."""
        usual, params = SamplingParams(), dataclasses.asdict(self.params)
        changed = {name: value for name, value in params.items() if value != getattr(usual, name)}
        content = json.dumps([self.id, self.prompt, changed], sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """Return the prompt's token ids.

        Raises:
            InputError: the text is not Unicode, or the chat template refuses the messages.
        """
        if isinstance(self.prompt, str):
            return tokenizer.encode(self.prompt)
        messages = [item for item in self.prompt if isinstance(item, dict)]
        if messages:
            messages = read_messages(messages, tokenizer.template_source())
            return tokenizer.encode_chat(messages, add_generation_prompt=True)
        return [item for item in self.prompt if isinstance(item, int)]


def read_requests(path: Path, defaults: Mapping[str, Any], *, chat: bool = False) -> list[BatchRequest]:
    """Return the prompts of a file: of a .txt each line, of any other what a JSON object a line says.

    Args:
        path: of the file, UTF-8.
        defaults: sampling parameters where a line says nothing; to a seed the index is added.
        chat: take each text for what a user says.

    Raises:
        InputError: the file cannot be read, has no prompts, or a line is not as it must be; the line is named.
    """
    is_text = path.suffix.lower() == ".txt"
    requests: list[BatchRequest] = []
    for number, line in _lines(path):
        if len(requests) == MAX_PROMPTS:
            raise InputError("prompt file", where=path, got=f"more than {MAX_PROMPTS:,} prompts", expected="fewer")
        try:
            fields = {"prompt": line} if is_text else _json_line(line)
            requests.append(_request(fields, len(requests), dict(defaults), chat))
        except _LineError as error:
            raise InputError(f"line {number}", where=path, got=error.got, expected=error.expected) from None
        except EightfoldError as error:
            raise InputError(f"line {number} in {path}: {error}") from None
    if not requests:
        raise InputError("prompt file", where=path, got="no prompts", expected="one a line")
    return requests


class _LineError(Exception):
    def __init__(self, got: str, expected: str) -> None:
        super().__init__(got)
        self.got, self.expected = got, expected


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not empty, and their numbers."""
    with open_given(path, "prompt file") as file:
        try:
            for number, raw in enumerate(iter(lambda: file.readline(console.MAX_LINE_BYTES), b""), 1):
                if len(raw) == console.MAX_LINE_BYTES:
                    got = f"{console.MAX_LINE_BYTES >> 20} MiB or more"
                    raise InputError(f"line {number}", where=path, got=got, expected="less")
                line = _decoded(raw, number, path)
                if line.strip():
                    yield number, line
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}", action="Check the path.") from None


def _decoded(raw: bytes, number: int, path: Path) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        got = f"byte {error.start} that is not UTF-8"
        raise InputError(f"line {number}", where=path, got=got, expected="UTF-8 text") from None


def _json_line(line: str) -> dict[str, Any]:
    expected = 'an object such as {"prompt": "Hello"}'
    try:
        fields = parse_value(line.encode("utf-8", "surrogatepass"))
    except ValueError as error:
        raise _LineError(f"no JSON ({error})", expected) from None
    if not isinstance(fields, dict):
        raise _LineError(shorten(line), expected)
    return fields


def _request(fields: dict[str, Any], index: int, defaults: dict[str, Any], chat: bool) -> BatchRequest:
    for field in fields:
        if field not in _FIELDS:
            near = difflib.get_close_matches(field, _FIELDS, 1)
            hint = near[0] if near else f"{', '.join(_FIELDS[:4])} or a sampling parameter"
            raise _LineError(f"the field {shorten(field)}", hint)
    prompt = _prompt(fields)
    if chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    name = fields.get("id")
    if not (name is None or isinstance(name, str) or WHOLE.fits(name)):
        raise _LineError(f"id {_json(name)}", "a text or a whole number")
    if "seed" in defaults:
        defaults["seed"] = (defaults["seed"] + index) % 2**64
    return BatchRequest(index, name, prompt, sampling_params(defaults, **_params(fields)))


def _prompt(fields: dict[str, Any]) -> Prompt:
    kinds = [name for name in PROMPTS if fields.get(name) is not None]
    if len(kinds) != 1:
        raise _LineError(" and ".join(kinds) or "no prompt", f"exactly one of {one_of(PROMPTS)}")
    value = fields[kinds[0]]
    if kinds[0] == "messages":
        return read_messages(value, None)
    fits, expected = _FORMS[kinds[0]]
    if not fits(value):
        raise _LineError(f"{kinds[0]} {_json(value)}", expected)
    prompt: Prompt = value
    return prompt


_FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "prompt": (lambda value: isinstance(value, str), "a text"),
    "prompt_token_ids": (is_token_ids, "a list of token ids such as [1, 42]"),
}


def _params(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the sampling parameters of a line; null is as if it were not there, but for max_tokens."""
    params = {name: fields[name] for name in _PARAMS if fields.get(name) is not None}
    if "max_tokens" in fields:
        params["max_tokens"] = fields["max_tokens"]
    if "structured" in params:
        params["structured"] = _structured(params["structured"])
    if "logit_bias" in params:
        params["logit_bias"] = _logit_bias(params["logit_bias"])
    return params


def _structured(given: Any) -> StructuredOutput:
    if not isinstance(given, dict) or not given.keys() <= {*FORMS, "begins_after"}:
        raise _LineError(f"structured {_json(given)}", f"an object with one of {one_of(FORMS)}")
    form = {name: value for name, value in given.items() if value is not None}
    if "json_schema" in form:
        form["json_schema"] = schema_text(form["json_schema"])
    return StructuredOutput(**form)


def _logit_bias(given: Any) -> dict[int, Any]:
    biases = biases_by_id(given) if isinstance(given, dict) else None
    if biases is None:
        raise _LineError(f"logit_bias {_json(given)}", "token ids, as texts, and what is added to them")
    return biases


def _json(value: Any) -> str:
    return shorten(json.dumps(value))
