"""The server's description in OpenAPI 3.1, made from its routes and the table of fields."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from eightfold import __version__
from eightfold.server.field_table import CHAT, COMPLETIONS, DETOKENIZE, ENDPOINTS, FIELDS, RESPONSES, TOKENIZE, Field
from eightfold.values import Kind

_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", dict: "object", list: "array",
          tuple: "array", Mapping: "object"}  # fmt: skip

_REQUIRED = {CHAT: "messages", COMPLETIONS: "prompt", RESPONSES: "input", DETOKENIZE: "tokens"}

_OF_THE_PAGE = ("/", "/render")  # which are no API

# Method and path -> what it does.
_SUMMARIES = {
    ("POST", "/v1/chat/completions"): "Answer a chat.",
    ("POST", "/v1/completions"): "Continue prompts.",
    ("POST", "/v1/responses"): "Answer items, as OpenAI's Responses API does.",
    ("POST", "/v1/responses/input_tokens"): "Return how many tokens such a request has.",
    ("GET", "/v1/responses/{response_id}"): "Return a response that is kept.",
    ("DELETE", "/v1/responses/{response_id}"): "Forget a response.",
    ("GET", "/v1/responses/{response_id}/input_items"): "Return what a response answers.",
    ("POST", "/v1/responses/{response_id}/cancel"): "End a response in the background, of which there are none.",
    ("GET", "/v1/models"): "Return the model under each of its names.",
    ("GET", "/v1/models/{name}"): "Return the model under one of its names.",
    ("POST", "/tokenize"): "Return the tokens of a text or a chat.",
    ("POST", "/detokenize"): "Return the text of tokens.",
    ("GET", "/tokenizer_info"): "Return the tokenizer's settings, special tokens and chat template.",
    ("GET", "/health"): "Return whether the server answers.",
    ("GET", "/metrics"): "Return Prometheus's metrics.",
    ("GET", "/version"): "Return the version.",
    ("GET", "/openapi.json"): "Return this description.",
}

_STREAMS = {"text/event-stream": {"schema": {"type": "string"}}}
_ANY_OBJECT = {"schema": {"type": "object"}}
_FAILURE = {"$ref": "#/components/responses/Failure"}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def description(served: Iterable[tuple[str, str]], *, needs_key: bool, open_paths: Iterable[str]) -> dict[str, Any]:
    """Return the description of a server.

    Args:
        served: methods and paths.
        needs_key: whether clients have to send one.
        open_paths: what needs none.
    """
    is_open = frozenset(open_paths)
    paths: dict[str, dict[str, Any]] = {}
    for method, route in served:
        path = re.sub(r"\{(\w+):path\}", r"{\1}", route)
        if method != "HEAD" and path not in _OF_THE_PAGE:
            operation = _operation(method, path)
            if path in is_open:
                operation["security"] = []
            paths.setdefault(path, {})[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "Eightfold", "version": __version__, "license": {"name": "Apache-2.0"}},
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}, {"key": []}] if needs_key else [],
        "paths": paths,
        "components": {
            "schemas": {**{_schema_name(path): schema_of_fields(path) for path in ENDPOINTS}, "Error": _ERROR},
            "responses": {
                "Failure": {
                    "description": "What is wrong, and with which field.",
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                }
            },
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            },
        },
    }


def _operation(method: str, path: str) -> dict[str, Any]:
    name = next((name for name, where in ENDPOINTS.items() if (method, where) == ("POST", path)), None)
    kind = "text/plain" if path == "/metrics" else "application/json"
    content: dict[str, Any] = {kind: {"schema": {"type": "string"}} if path == "/metrics" else _ANY_OBJECT}
    operation: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{method.lower()}{path}").strip("_"),
        "summary": _SUMMARIES.get((method, path), ""),
        "responses": {
            "200": {"description": "The answer.", "content": content},
            "4XX": _FAILURE,
            "5XX": _FAILURE,
        },
    }
    parameters = re.findall(r"\{(\w+)\}", path)
    if parameters:
        schema = {"type": "string"}
        operation["parameters"] = [{"name": p, "in": "path", "required": True, "schema": schema} for p in parameters]
    if name is not None:
        reference = {"$ref": f"#/components/schemas/{_schema_name(name)}"}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference}}}
        if name not in (TOKENIZE, DETOKENIZE):
            content.update(_STREAMS)
    return operation


def _schema_name(path: str) -> str:
    return f"{path.capitalize()}Request"


def schema_of_fields(path: str) -> dict[str, Any]:
    """Return the JSON schema of a request to an endpoint, as the table of fields calls it."""
    schema = _object(path, "")
    return {**schema, "required": [_REQUIRED[path]]} if path in _REQUIRED else schema


def _object(path: str, within: str) -> dict[str, Any]:
    """Return the schema of an object in a request; `within` stands before the names of its fields."""
    properties: dict[str, Any] = {}
    for field in FIELDS:
        head, _, name = field.name.rpartition(".")
        if path not in field.paths or (f"{head}." if head else "") != within:
            continue
        properties[name] = _property(field, path)
        for other in field.also:
            properties[other] = {**properties[name], "description": f"The same as {name}."}
    return {"type": "object", "properties": properties, "additionalProperties": True}


def _property(field: Field, path: str) -> dict[str, Any]:
    if field.is_refused:
        known = {"description": f"Not supported. {field.help}".strip(), "deprecated": True}
        return {"enum": [*field.neutral, None], **known}
    schema = schema_of(field.kind)
    if field.kind.types == (dict,):
        inside = _object(path, f"{field.name}.")
        schema |= {"properties": inside["properties"]} if inside["properties"] else {}
    others = [value for value in (None, *field.neutral) if not field.kind.fits(value)]
    schema = {"anyOf": [schema, {"enum": others}]} if others else schema
    default = {} if field.default is None else {"default": field.default}
    return {"description": field.help, **schema, **default}


def schema_of(kind: Kind) -> dict[str, Any]:
    """Return the JSON schema of what a kind of values has to be."""
    names = list(dict.fromkeys(_names(kind)))
    if not names:
        return {}
    schema: dict[str, Any] = {"type": names[0] if len(names) == 1 else names}
    if kind.choices:
        schema["enum"] = [*kind.choices, *([None] if kind.is_optional else [])]
    elif "string" in names and kind.least:
        schema["minLength"] = kind.least
    if "integer" in names or "number" in names:
        limits = {"exclusiveMinimum": kind.above, "minimum": kind.least, "maximum": kind.most}
        schema |= {name: limit for name, limit in limits.items() if limit is not None and abs(limit) != float("inf")}
    if kind.each is not None:
        schema["items"] = schema_of(kind.each)
    return schema


def _names(kind: Kind) -> Iterator[str]:
    is_number = float in kind.types
    for each in kind.types:
        if each is object:
            return
        if not (each is int and is_number):
            yield _TYPES[each]
    if kind.is_optional:
        yield "null"
