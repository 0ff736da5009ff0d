"""GET /openapi.json describes what is served, and GET /tokenizer_info the tokenizer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from eightfold.server.field_table import CHAT, ENDPOINTS, FIELDS
from eightfold.server.openapi import schema_of, schema_of_fields
from eightfold.values import SWITCH, TEXTS, WORDS, Kind, choice, number_above, optional, whole

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


@pytest.fixture
def document(serve):
    return serve().http.get("/openapi.json").json()


def every(value, name):
    """Yield all values of a name, however deep."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == name:
                yield inner
            yield from every(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from every(inner, name)


def operations(document):
    return [(path, method, each) for path, item in document["paths"].items() for method, each in item.items()]


def test_it_is_a_document_of_openapi_3_1(document):
    """What the specification demands, as far as this document has it; openapi-spec-validator finds nothing either."""
    assert document["openapi"] == "3.1.0"
    assert {"title", "version"} <= document["info"].keys()
    ids = [each["operationId"] for _, _, each in operations(document)]
    assert len(ids) == len(set(ids)) > 10
    for path, method, each in operations(document):
        assert method in ("get", "post", "delete") and path.startswith("/")
        assert each["responses"] and all(re.fullmatch("[1-5](XX|[0-9]{2})", status) for status in each["responses"])
        named = {parameter["name"] for parameter in each.get("parameters", ())}
        assert named == set(re.findall(r"\{(.+?)\}", path))
        assert all(parameter["required"] and parameter["in"] == "path" for parameter in each.get("parameters", ()))
        assert ("requestBody" in each) == (path in ENDPOINTS.values())
        assert each["summary"].endswith("."), path
        assert all(response.get("description") or "$ref" in response for response in each["responses"].values())
    for reference in every(document, "$ref"):
        found = document
        for name in reference.removeprefix("#/").split("/"):
            found = found[name]
        assert isinstance(found, dict)
    schemes = set(document["components"]["securitySchemes"])
    assert all(set(each) <= schemes for each in [*document["security"]])


def test_it_has_what_the_page_of_the_documentation_has(document):
    table = PAGE.partition("## What is served")[2].partition("## Options")[0]
    for row in re.findall(r"^\| (.+?) \|", table, re.MULTILINE):
        method = None
        for found in re.findall(r"`(?:(GET|POST|DELETE) )?(/[^`]*)`", row):
            method, path = found[0] or method, found[1].replace("NAME", "{name}").replace("ID", "{response_id}")
            if method and path not in ("/", "/render"):
                assert method.lower() in document["paths"][path], (method, path)


def test_a_key_is_asked_for_where_there_is_one(serve):
    running = serve({"api_keys": ("k",)})
    assert running.http.get("/openapi.json").status_code == 401
    document = running.http.get("/openapi.json", headers={"x-api-key": "k"}).json()
    assert document["security"] == [{"bearer": []}, {"key": []}]
    assert document["paths"]["/health"]["get"]["security"] == []
    assert "security" not in document["paths"]["/v1/models"]["get"]
    assert serve().http.get("/openapi.json").json()["security"] == []


def test_requests_have_the_fields_of_the_table(document):
    for path in ENDPOINTS:
        schema = document["components"]["schemas"][f"{path.capitalize()}Request"]
        for field in FIELDS:
            if path in field.paths:
                *heads, last = field.name.split(".")
                inner = schema
                for head in heads:
                    outer = inner["properties"].get(head)
                    inner = outer["anyOf"][0] if outer is not None else {"properties": {last: None}}
                assert {last, *field.also} <= inner["properties"].keys(), field.name


def test_fields_say_what_they_have_to_be():
    chat = schema_of_fields(CHAT)
    assert (chat["required"], chat["additionalProperties"]) == (["messages"], True)
    fields = chat["properties"]
    assert fields["temperature"]["anyOf"][0] == {"type": "number", "minimum": 0}
    assert fields["temperature"]["default"] == 1.0
    assert fields["max_tokens"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 2**31}
    assert fields["max_tokens"]["anyOf"][1] == {"enum": [None, -1]}
    assert fields["n_predict"]["description"] == "The same as max_tokens."
    assert fields["stop"]["anyOf"][0] == {"type": ["string", "array"]}
    assert fields["mirostat"]["enum"] == [0, None]
    usage = fields["stream_options"]["anyOf"][0]["properties"]["include_usage"]
    assert (usage["anyOf"][0], usage["default"]) == ({"type": "boolean"}, False)
    assert "schema" in fields["response_format"]["anyOf"][0]["properties"]["json_schema"]["anyOf"][0]["properties"]


@pytest.mark.parametrize(
    ("kind", "schema"),
    [
        (whole(0, 20), {"type": "integer", "minimum": 0, "maximum": 20}),
        (optional(whole(1)), {"type": ["integer", "null"], "minimum": 1, "maximum": 2**63 - 1}),
        (number_above(0, 1), {"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
        (SWITCH, {"type": "boolean"}),
        (WORDS, {"type": "string", "minLength": 1}),
        (TEXTS, {"type": "array", "items": {"type": "string"}}),
        (choice("a", "b"), {"type": "string", "enum": ["a", "b"]}),
        (optional(choice("a")), {"type": ["string", "null"], "enum": ["a", None]}),
        (Kind((object,), "any value"), {}),
    ],
)
def test_a_kind_as_a_schema(kind, schema):
    assert schema_of(kind) == schema


def test_tokenizer_info_has_what_a_remote_tokenizer_needs(serve):
    running = serve()
    info = running.http.get("/tokenizer_info").json()
    settings = json.loads((running.engine.tokenizer.directory / "tokenizer_config.json").read_text())
    assert settings.keys() <= info.keys()
    assert isinstance(info["tokenizer_class"], str)
    assert info["chat_template"] == running.server.service.template
    assert info["model_max_length"] == 256
    for name in ("bos_token", "eos_token"):
        ids = running.post("/tokenize", {"prompt": info[name], "add_special_tokens": False}).json()["tokens"]
        assert ids == [info[f"{name}_id"]]
    assert (info["pad_token"], info["pad_token_id"]) == (None, None)


def test_tokenizer_info_of_a_model_without_a_chat_template(serve):
    running = serve()
    running.server.service.template = None
    assert running.http.get("/tokenizer_info").json()["chat_template"] is None
