"""The forms that requests ask of answers, in the dialects of this field: response_format, json_schema, regex, ..."""

from __future__ import annotations

import json
import re
import sys
from typing import Any, NamedTuple

from eightfold.engine.sampling_params import StructuredOutput, schema_text
from eightfold.errors import EightfoldError, one_of
from eightfold.server.fields import ApiError, Fields, bad_request, refused, wrong
from eightfold.server.tool_schemas import beside_others

MAX_SCHEMA_BYTES = 64 * 2**10  # of a JSON schema, regex or grammar, as text

# Rules times characters of a grammar in GBNF, whose conversion takes a time of that order.
MAX_GBNF = 2_000_000

# Field -> form of StructuredOutput.
_FORMS = {"json_schema": "json_schema", "regex": "regex", "grammar": "grammar", "guided_choice": "choices"}
_VLLM = {
    "json": "json_schema", "regex": "regex", "grammar": "grammar", "choice": "choices", "json_object": "json_object",
}  # fmt: skip

# Type of a response_format -> form, and the fields in which it may stand.
_TYPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "text": ("", ()),
    "json_object": ("json_schema", ("schema", "value")),  # llama.cpp's and TGI's; OpenAI's has neither
    "json": ("json_schema", ("schema", "value")),
    "json_schema": ("json_schema", ("json_schema", "schema", "value")),
    "regex": ("regex", ("pattern", "value")),
    "grammar": ("grammar", ("grammar", "value")),
}

_LARK = re.compile(r"^\s*(?:%llguidance\b|start\s*:(?!:=))", re.MULTILINE)  # GBNF has neither
# A rule called start, but not in texts, classes of characters and comments: in Lark it is the first one.
_START = re.compile(r'"(?:\\.|[^"\\])*"?|\[(?:\\.|[^\]\\])*\]?|#[^\n]*|(?<![\w-])(start)(?![\w-])', re.DOTALL)
_ESCAPES = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|.)", re.DOTALL)


class Form(NamedTuple):
    """A form of an answer, and the field that asks for it."""

    field: str
    name: str  # as StructuredOutput calls it
    value: Any


def structured_output(fields: Fields) -> tuple[StructuredOutput | None, str | None]:
    """Return the form that answers must have, in whichever field it stands, and that field."""
    form = asked_form(fields)
    if form is None:
        return None, None
    try:
        return form_of({form.name: form.value}), form.field
    except ApiError as error:
        raise bad_request(error.message, param=form.field, code=error.code) from None


def asked_form(fields: Fields) -> Form | None:
    """Return the form that a request asks for, as it stands there, but grammars in llguidance's Lark."""
    found = [Form(fields.spelled(name), ours, fields.read(name)) for name, ours in _FORMS.items()]
    found += [*_response_format(fields), *_structured_outputs(fields)]
    forms = [form for form in found if form.value not in (None, "") and form[1:] != ("json_object", False)]
    if len(forms) > 1:
        names = " and ".join(form.field for form in forms)
        raise bad_request(f"structured output: got more than one form: {names}. Give one.", param=forms[1].field)
    if not forms:
        return None
    field, name, value = forms[0]
    if name == "grammar" and isinstance(value, dict):  # TGI's
        kind, value = value.get("type"), value.get("value")
        name = _TYPES[kind][0] if kind in ("json", "json_schema", "regex") else ""
        if not name or value is None:
            raise wrong(field, kind, 'a grammar, or an object with a value and "type": "json" or "regex"')
        value = _unnamed(value)
    return Form(field, name, _lark(field, value) if name == "grammar" else value)


def form_of(form: dict[str, Any]) -> StructuredOutput:
    """Return one form; a schema may be an object or its text."""
    values = {
        name: schema_text(_plain_union(value)) if name == "json_schema" else value for name, value in form.items()
    }
    if len(json.dumps(values)) > MAX_SCHEMA_BYTES:
        raise bad_request(f"structured output: got a form of more than {MAX_SCHEMA_BYTES} bytes. Send a smaller one.")
    try:
        return StructuredOutput(**values)
    except EightfoldError as error:
        raise refused(error) from None


def _plain_union(schema: Any) -> Any:
    """Return a schema with anyOf where a discriminator, as Pydantic writes it, says that only one can apply.

    llguidance does not know the keyword, and refuses what stands beside a reference that leads back to itself.
    """
    if not isinstance(schema, dict) or "x-guidance" in schema:
        return schema
    text = json.dumps(schema)
    if '"discriminator"' not in text or len(text) > MAX_SCHEMA_BYTES:
        return schema
    definitions = dict[str, Any]()
    found = beside_others(schema, "schema", definitions)
    return {**found, "$defs": definitions} if definitions else found


def _lark(field: str, text: Any) -> Any:
    """Return a grammar in llguidance's Lark, also one that is written in llama.cpp's GBNF."""
    if not isinstance(text, str) or "::=" not in text or _LARK.search(text) or len(text) > MAX_SCHEMA_BYTES:
        return text
    if (rules := text.count("::=")) * len(text) > MAX_GBNF:
        got = f"{rules} rules in {len(text)} characters of GBNF"
        raise bad_request(f"{field}: got {got}, expected fewer. Send a smaller grammar, or one in Lark.", param=field)
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(_ESCAPES.sub(_plain, _START.sub(_renamed, text)))
    except Exception as error:  # of any kind; the library's words say where
        raise bad_request(f"{field}: got {error}, expected a grammar in GBNF or Lark", param=field) from None


def _renamed(match: re.Match[str]) -> str:
    return "start-of-gbnf" if match[1] else match[0]


def _plain(match: re.Match[str]) -> str:
    """Return an escape of GBNF without zeros at its beginning, which the library would lose."""
    digits = match[1] or match[2]
    code = int(digits, 16) if digits else 0xD800
    if code > sys.maxunicode or 0xD800 <= code < 0xE000:  # no character; half of one would be refused
        return match[0]
    return f"\\x{code:02x}" if code < 0x80 and not chr(code).isalnum() else chr(code)


def _response_format(fields: Fields) -> list[Form]:
    """Return the form of response_format, in the dialects of OpenAI, llama.cpp, TGI, Together and Fireworks."""
    given = fields.inside("response_format")
    if given is None:
        return []
    kind, inner = given.read("type"), given.inside("json_schema")
    if kind not in _TYPES:
        raise wrong("response_format", kind, "type text, json_object, json_schema, regex or grammar")
    form, allowed = _TYPES[kind]
    values = {name: given.read(name) for name in ("schema", "value", "pattern", "grammar")}
    if inner is not None:
        values["json_schema"] = _schema(inner)
    if kind in ("json_object", "json"):  # of llama.cpp an empty schema says no more than the type
        values = {name: value or None for name, value in values.items()}
    found = [(name, value) for name, value in values.items() if value is not None]
    for name, _ in found:
        if name not in allowed:
            where = f"response_format.{name}"
            raise bad_request(f"{where}: got one, expected none beside type {kind}", param=where)
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise bad_request(f"response_format: got {names}. Give one.", param="response_format")
    if found:
        return [Form(f"response_format.{found[0][0]}", form, _unnamed(found[0][1]))]
    if kind in ("regex", "grammar", "json_schema"):
        expected = "json_schema with an object as schema" if kind == "json_schema" else f"{allowed[0]} beside its type"
        raise bad_request(f"response_format: expected {expected}", param="response_format")
    return [] if kind == "text" else [Form("response_format", "json_object", True)]


def _schema(given: Fields) -> Any:
    for hint in ("name", "description", "strict"):
        given.read(hint)
    return given.read("schema")


def _unnamed(value: Any) -> Any:
    """Return the schema of an object that has its name too, as TGI takes it; any other value as it is."""
    is_named = isinstance(value, dict) and isinstance(value.get("schema"), dict) and "name" in value
    return value["schema"] if is_named else value


def _structured_outputs(fields: Fields) -> list[Form]:
    given = fields.inside("structured_outputs")
    if given is None:
        return []
    forms = [Form(f"structured_outputs.{theirs}", ours, given.read(theirs)) for theirs, ours in _VLLM.items()]
    if all(form.value in (None, False, "", []) for form in forms):
        message = f"structured_outputs: expected one of {one_of(_VLLM)}"
        raise bad_request(message, param="structured_outputs")
    return forms
