"""From a request's fields to SamplingParams, which checks values and ranges."""

from __future__ import annotations

import json
from typing import Any

from eightfold.engine.sampling_params import SamplingParams, StructuredOutput
from eightfold.errors import EightfoldError
from eightfold.server.fields import Fields, wrong
from eightfold.server.problems import bad_request, refused
from eightfold.server.settings import MAX_LOGIT_BIASES, MAX_SCHEMA_BYTES

# Fields whose name and meaning are those of SamplingParams.
_SAME = (
    "n",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "prompt_logprobs",
)


def sampling_params(fields: Fields, **given: Any) -> SamplingParams:
    """Return how a request wants its tokens chosen.

    Args:
        fields: of the request.
        given: what endpoints read in ways of their own: max_tokens, logprobs, structured.

    Raises:
        ApiError: 400.
    """
    values = {name: fields.any(name) for name in _SAME}
    values["logit_bias"] = _logit_bias(fields)
    best_of = fields.whole("best_of", 1, 2**31)
    if best_of is not None and best_of != (values["n"] or 1):
        raise bad_request("best_of: expected the same as n. Ask for n answers and choose.", param="best_of")
    # What the endpoint read stands above; null is the same as not given, except for max_tokens.
    read = {name: value for name, value in values.items() if value is not None}
    try:
        return SamplingParams(**{**read, **given})
    except EightfoldError as error:
        name = str(error).partition(":")[0].partition(" ")[0]
        raise refused(error, param=name if name in values or name in given else None) from None


def read_max_tokens(fields: Fields, default: int | None, least: int = 1) -> int | None:
    """Return how many tokens an answer may have, by either of the two names.

    Raises:
        ApiError: 400.
    """
    names = ("max_completion_tokens", "max_tokens")
    found = {value for name in names if (value := fields.whole(name, least, 2**31)) is not None}
    if len(found) > 1:
        raise bad_request("max_tokens and max_completion_tokens: got both. Give one.", param="max_tokens")
    return found.pop() if found else default


def read_stream(fields: Fields) -> tuple[bool, bool]:
    """Return whether the answer is streamed, and whether the stream ends with the usage.

    Raises:
        ApiError: 400.
    """
    streams, options = fields.flag("stream"), fields.object("stream_options")
    if options is None:
        return streams, False
    if not streams:
        raise bad_request("stream_options: only with stream", param="stream_options")
    return True, Fields(options).flag("include_usage")


def _logit_bias(fields: Fields) -> dict[int, Any] | None:
    given = fields.object("logit_bias")
    if given is None:
        return None
    if len(given) > MAX_LOGIT_BIASES:
        raise bad_request(f"logit_bias: got {len(given)}, expected at most {MAX_LOGIT_BIASES}", param="logit_bias")
    if any(not token.isdecimal() or len(token) > 9 for token in given):
        raise bad_request("logit_bias: expected token ids, as texts, and what is added to them", param="logit_bias")
    return {int(token): bias for token, bias in given.items()}


def structured_output(fields: Fields) -> StructuredOutput | None:
    """Return the form that answers must have, from response_format, guided_* or structured_outputs.

    Raises:
        ApiError: 400: more than one, or one that makes no sense.
    """
    asked = {
        "json_schema": fields.any("guided_json"),
        "regex": fields.any("guided_regex"),
        "grammar": fields.any("guided_grammar"),
        "choices": fields.any("guided_choice"),
    }
    forms = [{name: value} for name, value in asked.items() if value is not None]
    forms += [form for form in (_response_format(fields), _structured_outputs(fields)) if form]
    if len(forms) > 1 or any(len(form) > 1 for form in forms):
        raise bad_request("structured output: got more than one form, expected one of response_format and guided_*")
    return form_of(forms[0]) if forms else None


def form_of(form: dict[str, Any]) -> StructuredOutput:
    """Return one form; a schema may be an object or its text.

    Raises:
        ApiError: 400.
    """
    values = {name: _as_text(value) if name == "json_schema" else value for name, value in form.items()}
    if len(json.dumps(values)) > MAX_SCHEMA_BYTES:
        raise bad_request(f"structured output: got a form of more than {MAX_SCHEMA_BYTES} bytes. Send a smaller one.")
    try:
        return StructuredOutput(**values)
    except EightfoldError as error:
        raise refused(error) from None


def _as_text(schema: Any) -> Any:
    return json.dumps(schema) if isinstance(schema, (dict, list, bool)) else schema


def _response_format(fields: Fields) -> dict[str, Any] | None:
    given = fields.object("response_format")
    if given is None:
        return None
    kind = given.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind != "json_schema":
        raise wrong("response_format", kind, "type text, json_object or json_schema")
    inner = given.get("json_schema")
    if not isinstance(inner, dict) or not isinstance(inner.get("schema"), dict):
        raise bad_request("response_format: expected json_schema with an object as schema", param="response_format")
    return {"json_schema": inner["schema"]}


_STRUCTURED = {"json": "json_schema", "regex": "regex", "choice": "choices", "grammar": "grammar"}


def _structured_outputs(fields: Fields) -> dict[str, Any] | None:
    given = fields.object("structured_outputs")
    if given is None:
        return None
    form = {ours: given[theirs] for theirs, ours in _STRUCTURED.items() if given.get(theirs) is not None}
    if given.get("json_object"):
        form["json_object"] = True
    if not form:
        expected = "json, regex, choice, grammar or json_object"
        raise wrong("structured_outputs", given, expected)
    return form
