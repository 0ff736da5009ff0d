"""From a request's fields to SamplingParams, which checks values and ranges."""

from __future__ import annotations

import json
from dataclasses import fields as fields_of
from typing import Any

from eightfold.engine.sampling_params import SamplingParams, StructuredOutput, biases_by_id, schema_text
from eightfold.errors import EightfoldError
from eightfold.server.fields import OBJECT, Fields, bad_request, between, refused, wrong
from eightfold.values import SWITCH, WORDS

MAX_LOGIT_BIASES = 1024
MAX_SCHEMA_BYTES = 64 * 2**10  # of a JSON schema, regex or grammar, as text

# What endpoints read in ways of their own; other fields have the names and meanings of SamplingParams.
_OWN = ("max_tokens", "logprobs", "structured", "logit_bias")
_SAME = tuple(field.name for field in fields_of(SamplingParams) if field.name not in _OWN)


def sampling_params(fields: Fields, **given: Any) -> SamplingParams:
    """Return how a request wants its tokens chosen.

    Args:
        fields: of the request.
        given: what the endpoint has read: max_tokens, logprobs, structured.
    """
    values = {name: fields.any(name) for name in _SAME}
    values["logit_bias"] = _logit_bias(fields)
    best_of = fields.read("best_of", between(1, 2**31))
    if best_of is not None and best_of != (values["n"] or 1):
        raise bad_request("best_of: expected the same as n. Ask for n answers and choose.", param="best_of")
    # Null is the same as not given, except for the max_tokens that an endpoint has read.
    read = {name: value for name, value in values.items() if value is not None}
    try:
        return SamplingParams(**{**read, **given})
    except EightfoldError as error:
        name = str(error).partition(":")[0].partition(" ")[0]
        raise refused(error, param=name if name in values or name in given else None) from None


def read_max_tokens(fields: Fields, default: int | None, least: int = 1) -> int | None:
    """Return how many tokens an answer may have, by either of the two names."""
    names = ("max_completion_tokens", "max_tokens")
    found = {value for name in names if (value := fields.read(name, between(least, 2**31))) is not None}
    if len(found) > 1:
        raise bad_request("max_tokens and max_completion_tokens: got both. Give one.", param="max_tokens")
    return found.pop() if found else default


def read_stream(fields: Fields) -> dict[str, bool]:
    """Return whether the answer `streams`, and whether the stream `shows_usage` at its end."""
    streams, options = fields.read("stream", SWITCH, False), fields.read("stream_options", OBJECT)
    if options is None:
        return {"streams": streams, "shows_usage": False}
    if not streams:
        raise bad_request("stream_options: only with stream", param="stream_options")
    return {"streams": True, "shows_usage": Fields(options).read("include_usage", SWITCH, False)}


def read_cache_salt(fields: Fields) -> str:
    """Return a request's own salt of the prefix cache, which vLLM has too; empty where there is none."""
    return str(fields.read("cache_salt", WORDS, ""))


def _logit_bias(fields: Fields) -> dict[int, Any] | None:
    given = fields.read("logit_bias", OBJECT)
    if given is None:
        return None
    if len(given) > MAX_LOGIT_BIASES:
        raise bad_request(f"logit_bias: got {len(given)}, expected at most {MAX_LOGIT_BIASES}", param="logit_bias")
    biases = biases_by_id(given)
    if biases is None:
        raise bad_request("logit_bias: expected token ids, as texts, and what is added to them", param="logit_bias")
    return biases


_GUIDED = {"json": "json_schema", "regex": "regex", "grammar": "grammar", "choice": "choices"}


def structured_output(fields: Fields) -> StructuredOutput | None:
    """Return the form that answers must have, from response_format, guided_* or structured_outputs."""
    asked = {ours: fields.any(f"guided_{theirs}") for theirs, ours in _GUIDED.items()}
    forms = [{name: value} for name, value in asked.items() if value is not None]
    forms += [form for form in (_response_format(fields), _structured_outputs(fields)) if form]
    if len(forms) > 1 or any(len(form) > 1 for form in forms):
        raise bad_request("structured output: got more than one form, expected one of response_format and guided_*")
    return form_of(forms[0]) if forms else None


def form_of(form: dict[str, Any]) -> StructuredOutput:
    """Return one form; a schema may be an object or its text."""
    values = {name: schema_text(value) if name == "json_schema" else value for name, value in form.items()}
    if len(json.dumps(values)) > MAX_SCHEMA_BYTES:
        raise bad_request(f"structured output: got a form of more than {MAX_SCHEMA_BYTES} bytes. Send a smaller one.")
    try:
        return StructuredOutput(**values)
    except EightfoldError as error:
        raise refused(error) from None


def _response_format(fields: Fields) -> dict[str, Any] | None:
    given = fields.read("response_format", OBJECT, {"type": "text"})
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


def _structured_outputs(fields: Fields) -> dict[str, Any] | None:
    given = fields.read("structured_outputs", OBJECT)
    if given is None:
        return None
    form = {ours: given[theirs] for theirs, ours in _GUIDED.items() if given.get(theirs) is not None}
    if given.get("json_object"):
        form["json_object"] = True
    if not form:
        raise wrong("structured_outputs", given, "json, regex, choice, grammar or json_object")
    return form
