"""The forms that requests ask of answers: response_format, guided_* and structured_outputs."""

from __future__ import annotations

import json
from typing import Any

from eightfold.engine.sampling_params import StructuredOutput, schema_text
from eightfold.errors import EightfoldError
from eightfold.server.fields import Fields, bad_request, refused, wrong
from eightfold.values import OBJECT

MAX_SCHEMA_BYTES = 64 * 2**10  # of a JSON schema, regex or grammar, as text

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
