"""The requests of `run --input-file` in our own form: lines of JSON, or one text a line; and what tells forms apart.

A line of the output carries a fingerprint of what it answers, `SETUP.REQUEST`: of the model and how it computes, and of
the prompt and its parameters.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightfold.cli.batch import Batch, LineError, Started, json_line, name_of, read_lines
from eightfold.cli.batch_output import OWN
from eightfold.cli.generating import sampling_params
from eightfold.cli.options import flags_of, in_flags
from eightfold.engine.conversation import Conversation
from eightfold.engine.reasoning import Thinking
from eightfold.engine.sampling_params import FORMS, SamplingParams, StructuredOutput, biases_by_id, schema_text
from eightfold.engine.settings import EngineConfig
from eightfold.errors import EightfoldError, InputError, one_of
from eightfold.messages import Message, is_continued, read_messages
from eightfold.tokenizer import Tokenizer
from eightfold.values import WHOLE, is_token_ids, shorten

if TYPE_CHECKING:
    from eightfold.engine.engine import Engine
    from eightfold.engine.outputs import CompletionOutput, RequestOutput
    from eightfold.engine.sampler import Sampled

# A text, a chat, or token ids.
Prompt = str | list[Message] | list[int]

MAX_PROMPTS = 1_000_000  # in a file

PROMPTS = ("prompt", "messages", "prompt_token_ids")
_PARAMS = tuple(field.name for field in dataclasses.fields(SamplingParams))
_FIELDS = (*PROMPTS, "id", *_PARAMS)
_OF_OPENAI = frozenset({"custom_id", "url", "body"})  # a field of OpenAI's batch file


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

    def encode(self, tokenizer: Tokenizer, thinking: Thinking) -> list[int]:
        """Return the prompt's token ids.

        Raises:
            InputError: the text is not Unicode, or the chat template refuses the messages.
        """
        if isinstance(self.prompt, str):
            return tokenizer.encode(self.prompt)
        messages = [item for item in self.prompt if isinstance(item, dict)]
        if messages:
            continues = is_continued(messages)
            conversation = Conversation(messages=messages, opens_answer=not continues, continues=continues)
            return conversation.prompt(tokenizer, thinking).token_ids
        return [item for item in self.prompt if isinstance(item, int)]


class OwnBatch:
    """The requests of a file in our own form: a prompt and its parameters on each line.

    Args:
        defaults: sampling parameters where a line says nothing; to a seed the index is added.
        chat: take each text for what a user says.
    """

    form = OWN
    refusals: tuple[type[Exception], ...] = (EightfoldError,)

    def __init__(self, defaults: Mapping[str, Any], *, chat: bool = False) -> None:
        self.requests: list[BatchRequest] = []
        self._defaults, self._chat, self._setup = defaults, chat, ""

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def needs_template(self) -> bool:
        return any(request.needs_template for request in self.requests)

    def add(self, fields: dict[str, Any], number: int) -> None:
        """Add the request of a line; LineError or EightfoldError where it is none."""
        self.requests.append(_request(fields, len(self.requests), dict(self._defaults), self._chat))

    def fingerprint(self, index: int) -> str:
        return self.requests[index].fingerprint

    def open(self, engine: Engine, setup: str) -> None:
        self._tokenizer, self._setup = engine.tokenizer, setup
        self._thinking = Thinking(engine.tokenizer)

    def start(self, index: int) -> Started:
        request = self.requests[index]
        head = self._head(request)
        return Started(
            [request.encode(self._tokenizer, self._thinking)], request.params, lambda found: head | _answer(found[0])
        )

    def refused(self, index: int, error: Exception) -> dict[str, Any]:
        assert isinstance(error, EightfoldError)
        return {**self._head(self.requests[index]), "error": in_flags(error, flags_of(EngineConfig))}

    def _head(self, request: BatchRequest) -> dict[str, Any]:
        return {"index": request.index, "id": request.id, "fingerprint": f"{self._setup}.{request.fingerprint}"}


def read_batch(path: Path, defaults: Mapping[str, Any], names: Sequence[str], *, chat: bool = False) -> Batch:
    """Return the requests of a file: of a .txt each line, of any other what a JSON object a line says.

    Args:
        path: of the file, UTF-8; `-` for standard input.
        defaults: sampling parameters, for lines of our own form.
        names: of the model, for requests of OpenAI's form.
        chat: take each text for what a user says.

    Raises:
        InputError: the file cannot be read, has no prompts, or a line is not as it must be; the line is named.
    """
    where, is_text = name_of(path), path.suffix.lower() == ".txt"
    batch: Batch | None = None
    for number, line in read_lines(path):
        if batch is not None and len(batch) == MAX_PROMPTS:
            raise InputError("prompt file", where=where, got=f"more than {MAX_PROMPTS:,} prompts", expected="fewer")
        try:
            fields = {"prompt": line} if is_text else json_line(line)
            if batch is None:  # the first line says of what form all are
                batch = _openai(names) if _OF_OPENAI & fields.keys() else OwnBatch(defaults, chat=chat)
            batch.add(fields, number)
        except LineError as error:
            raise InputError(f"line {number}", where=where, got=error.got, expected=error.expected) from None
        except EightfoldError as error:
            raise InputError(f"line {number} in {where}: {error}") from None
    if batch is None:
        raise InputError("prompt file", where=where, got="no prompts", expected="one a line")
    return batch


def _openai(names: Sequence[str]) -> Batch:
    from eightfold.cli.batch_openai import OpenAiBatch  # and with it the readers of the server

    return OpenAiBatch(names)


def _request(fields: dict[str, Any], index: int, defaults: dict[str, Any], chat: bool) -> BatchRequest:
    for field in fields:
        if field not in _FIELDS:
            near = difflib.get_close_matches(field, _FIELDS, 1)
            hint = near[0] if near else f"{', '.join(_FIELDS[:4])} or a sampling parameter"
            raise LineError(f"the field {shorten(field)}", hint)
    prompt = _prompt(fields)
    if chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    name = fields.get("id")
    if not (name is None or isinstance(name, str) or WHOLE.fits(name)):
        raise LineError(f"id {_json(name)}", "a text or a whole number")
    if "seed" in defaults:
        defaults["seed"] = (defaults["seed"] + index) % 2**64
    return BatchRequest(index, name, prompt, sampling_params(defaults, **_params(fields)))


def _prompt(fields: dict[str, Any]) -> Prompt:
    kinds = [name for name in PROMPTS if fields.get(name) is not None]
    if len(kinds) != 1:
        raise LineError(" and ".join(kinds) or "no prompt", f"exactly one of {one_of(PROMPTS)}")
    value = fields[kinds[0]]
    if kinds[0] == "messages":
        return read_messages(value, None)
    fits, expected = _FORMS[kinds[0]]
    if not fits(value):
        raise LineError(f"{kinds[0]} {_json(value)}", expected)
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
        raise LineError(f"structured {_json(given)}", f"an object with one of {one_of(FORMS)}")
    form = {name: value for name, value in given.items() if value is not None}
    if "json_schema" in form:
        form["json_schema"] = schema_text(form["json_schema"])
    return StructuredOutput(**form)


def _logit_bias(given: Any) -> dict[int, Any]:
    biases = biases_by_id(given) if isinstance(given, dict) else None
    if biases is None:
        raise LineError(f"logit_bias {_json(given)}", "token ids, as texts, and what is added to them")
    return biases


def _json(value: Any) -> str:
    return shorten(json.dumps(value))


def _answer(output: RequestOutput) -> dict[str, Any]:
    line: dict[str, Any] = {"prompt_tokens": len(output.prompt_ids)}
    line["outputs"] = [_completion(answer) for answer in output.outputs]
    if output.prompt_logprobs is not None:
        line["prompt_logprobs"] = [None if each is None else _logprob(each) for each in output.prompt_logprobs]
    return line


def _completion(answer: CompletionOutput) -> dict[str, Any]:
    content = {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }
    logprobs = answer.logprobs
    return content if logprobs is None else {**content, "logprobs": [_logprob(each) for each in logprobs]}


def _logprob(sampled: Sampled) -> dict[str, Any]:
    top = [[token, _finite(value)] for token, value in sampled.top]
    return {"token_id": sampled.token_id, "logprob": _finite(sampled.logprob), "top": top}


def _finite(value: float | None) -> float | None:
    """Return a number that JSON knows: minus infinity, which a banned token has, becomes null."""
    return value if value is not None and math.isfinite(value) else None
