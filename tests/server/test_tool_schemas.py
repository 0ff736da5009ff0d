"""Schemas of tools as the form of a call: where references lead, and what is closed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eightfold.server.fields import ApiError
from eightfold.server.tool_schemas import NO_ARGUMENTS, arguments_schema

A = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
B = {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}


def document(*tools: Any) -> dict[str, Any]:
    """Return the schema of a list of arguments, one of each tool."""
    definitions: dict[str, Any] = {}
    arguments = [arguments_schema(tool, "tools[0].function.parameters", definitions) for tool in tools]
    return {"type": "array", "prefixItems": arguments, "items": False, "$defs": definitions}


def allows(schema: dict[str, Any], *values: Any) -> list[bool]:
    """Return which values llguidance lets pass."""
    llguidance = pytest.importorskip("llguidance")
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    found = []
    for value in values:
        text, copy = json.dumps(value).encode(), matcher.deep_copy()
        found.append(copy.try_consume_tokens(list(text)) == len(text) and copy.is_accepting())
    return found


def takes(parameters: Any, *values: Any) -> list[bool]:
    return allows(document(parameters), *([value] for value in values))


@pytest.mark.parametrize(
    "reference",
    ["#/$defs/A", "#/definitions/A", "#/$defs/with~1slash~0", "#/$defs/with%20space", "#named", "urn:a", "#/parts/0",
     "item.json", "https://host/dir/item.json", "#/properties/other", "#/$defs/chain"],
)  # fmt: skip
def test_references_lead_to_the_tools_own_schemas(reference):
    parameters = {
        "$id": "https://host/dir/tool.json",
        "type": "object",
        "properties": {"x": {"$ref": reference}, "other": A},
        "required": ["x"],
        "parts": [A],
        "$defs": {
            "A": A,
            "with/slash~": A,
            "with space": A,
            "anchored": {"$anchor": "named", **A},
            "urn": {"$id": "urn:a", **A},
            "item": {"$id": "item.json", **A},
            "chain": {"$ref": "#/$defs/A"},
        },
        "definitions": {"A": A},
    }
    assert takes(parameters, {"x": {"a": 1}}, {"x": {"a": "1"}}, {"x": {}}, {"x": {"a": 1, "z": 1}}, {}) == [
        True, False, False, False, False,
    ]  # fmt: skip


def test_references_are_relative_to_the_nearest_id():
    inner = {"$id": "urn:inner", "properties": {"y": {"$ref": "#/$defs/T"}}, "$defs": {"T": {"type": "boolean"}}}
    parameters = {
        "properties": {"x": {"$ref": "#/$defs/T"}, "inner": {"type": "object", **inner}},
        "$defs": {"T": {"type": "integer"}},
    }
    assert takes(parameters, {"x": 1, "inner": {"y": True}}, {"x": 1, "inner": {"y": 1}}) == [True, False]


def test_several_tools_may_use_the_same_names():
    def tool(kind):
        return {"properties": {"x": {"$ref": "#/$defs/T"}}, "required": ["x"], "$defs": {"T": {"type": kind}}}

    schema = document(tool("integer"), tool("boolean"), tool("string"))
    assert allows(schema, [{"x": 1}, {"x": True}, {"x": "a"}], [{"x": True}, {"x": 1}, {"x": "a"}]) == [True, False]


@pytest.mark.parametrize("reference", ["#", "#/$defs/Node"])
def test_a_schema_may_refer_to_itself(reference):
    node = {
        "type": "object",
        "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": reference}, {"type": "null"}]}},
        "required": ["value", "next"],
    }
    parameters = node if reference == "#" else {"$ref": reference, "$defs": {"Node": node}}
    end = {"value": 2, "next": None}
    assert takes(parameters, {"value": 1, "next": end}, {"value": 1, "next": {**end, "z": 1}}, {"value": 1}) == [
        True, False, False,
    ]  # fmt: skip


def test_a_property_may_be_called_like_a_keyword():
    parameters = {"properties": {"$ref": {"type": "string"}, "$defs": {"type": "integer"}, "not": {"type": "null"}}}
    assert takes(parameters, {"$ref": "x", "$defs": 1, "not": None}, {"$ref": 1}) == [True, False]


def test_data_is_left_as_it_is():
    value = {"$ref": "#/nowhere", "properties": {"a": 1}, "$defs": 2}
    parameters = {"properties": {"x": {"const": value}, "y": {"enum": [value]}, "z": {"default": value}}}
    assert takes(parameters, {"x": value, "y": value, "z": 1}, {"x": {}}) == [True, False]


def test_a_chain_of_references_may_be_long():
    chain = {f"d{at}": {"allOf": [{"$ref": f"#/$defs/d{at + 1}"}, {}]} for at in range(3000)}
    parameters = {"properties": {"x": {"$ref": "#/$defs/d0"}}, "$defs": {**chain, "d3000": A}}
    assert len(document(parameters)["$defs"]) == 3001


def test_schemas_that_apply_together_have_a_limit():
    """Each of n properties consists of the same n schemas: n x n are looked into."""
    every = {"allOf": [{"$ref": f"#/$defs/d{at}"} for at in range(200)]}
    parameters = {
        "properties": {f"p{at}": {"properties": {"x": {}}, **every} for at in range(200)},
        "$defs": {f"d{at}": A for at in range(200)},
    }
    with pytest.raises(ApiError, match="got more than 20000 schemas that apply together"):
        document(parameters)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"properties": {"x": {"$ref": "https://example.com/x.json"}}}, "got $ref 'https://example.com/x.json'"),
        ({"properties": {"x": {"$ref": "#/$defs/None"}}}, "got $ref '#/$defs/None'"),
        ({"properties": {"x": {"$ref": "#none"}}}, "got $ref '#none'"),
        ({"properties": {"x": {"$ref": "http://[x"}}}, "got $ref 'http://[x'"),
        ({"properties": {"x": {"$ref": "#/required/0"}}, "required": ["x"]}, "got $ref '#/required/0'"),
        ({"properties": {"x": {"$ref": 1}}}, "got $ref 1, expected a text"),
        ({"$ref": "#"}, "got references that lead to no object's schema"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "got references"),
        ({"properties": {"x": {"properties": []}}}, "got properties a list, expected schemas by name"),
        ({"dependentSchemas": {"a": A}, "properties": None}, "got properties null"),
        ({"type": "string"}, "got type 'string', expected type \"object\""),
        ({"type": ["array", "null"]}, "got type a list"),
    ],
)
def test_what_leads_nowhere_is_named(parameters, said):
    with pytest.raises(ApiError, match="got") as caught:
        document(parameters)
    assert caught.value.message.startswith(f"tools[0].function.parameters: {said}")
    assert (caught.value.status, caught.value.param) == (400, "tools")


@pytest.mark.parametrize(
    "parameters", [None, {}, {"type": "object"}, {"type": "object", "properties": {}}, {"description": "none"}]
)
def test_a_tool_without_parameters_gets_none(parameters):
    assert arguments_schema(parameters, "tools[0]", {}) == NO_ARGUMENTS
    assert takes(parameters, {}, {"a": 1}, "x") == [True, False, False]


def test_arguments_are_an_object():
    assert takes({"properties": {"a": {"type": "integer"}}}, {"a": 1}, "a", {"z": 1}) == [True, False, False]
    assert takes({**A, "type": ["object", "null"]}, {"a": 1}, None) == [True, False]
    assert takes({"anyOf": [A, {"type": "string"}]}, {"a": 1}, "x") == [True, False]


@pytest.mark.parametrize(
    "inner",
    [
        A,
        {"$ref": "#/$defs/A"},
        {"allOf": [{"$ref": "#/$defs/A"}], "description": "as pydantic 1 has it"},
        {"anyOf": [{"$ref": "#/$defs/A"}, {"type": "null"}]},
        {"oneOf": [A, B]},
        {"type": "object", "anyOf": [A, B]},
    ],
)
def test_every_object_is_closed(inner):
    for parameters in (inner, {"properties": {"x": inner}}, {"properties": {"x": {"items": inner}}}):
        parameters = {**parameters, "$defs": {"A": A}}
        wrap = (lambda value: value) if parameters.keys() >= inner.keys() else (lambda value: {"x": value})
        if "items" in parameters.get("properties", {}).get("x", {}):
            wrap = lambda value: {"x": [value]}  # noqa: E731
        assert takes(parameters, wrap({"a": 1}), wrap({"a": 1, "z": 1})) == [True, False]


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [A, B]},
        {"allOf": [{"$ref": "#/$defs/A"}, B]},
        {**A, "allOf": [B]},
        {"$ref": "#/$defs/A", "properties": B["properties"], "required": ["b"]},
        {"allOf": [{"allOf": [A]}, {"allOf": [{"allOf": [B]}, {}]}]},
    ],
)
def test_what_several_schemas_say_together_is_closed_as_one(schema):
    parameters = {**schema, "$defs": {"A": A}}
    assert takes(parameters, {"a": 1, "b": 2}, {"a": 1}, {"a": 1, "b": 2, "z": 1}, {"a": "x", "b": 2}) == [
        True, False, False, False,
    ]  # fmt: skip


def test_a_schema_may_be_closed_here_and_not_there():
    parameters = {
        "properties": {"one": {"$ref": "#/$defs/A"}, "both": {"allOf": [{"$ref": "#/$defs/A"}, B]}},
        "$defs": {"A": A},
    }
    assert takes(
        parameters, {"one": {"a": 1}, "both": {"a": 1, "b": 2}}, {"one": {"a": 1, "b": 2}}, {"both": {"a": 1, "z": 2}}
    ) == [True, False, False]


def test_alternatives_beside_properties_are_closed_with_them():
    parameters = {"properties": {"k": {"type": "string"}}, "required": ["k"], "anyOf": [A, B]}
    assert takes(parameters, {"k": "x", "a": 1}, {"k": "x", "b": 1}, {"k": "x"}, {"k": "x", "a": 1, "z": 1}) == [
        True, True, False, False,
    ]  # fmt: skip


def test_required_names_stay_possible():
    parameters = {"properties": {"a": {"type": "integer"}}, "required": ["a", "other"]}
    assert takes(parameters, {"a": 1, "other": [2]}, {"a": 1, "other": 2, "z": 3}) == [True, False]


@pytest.mark.parametrize(
    "says",
    [{"additionalProperties": True}, {"additionalProperties": {"type": "integer"}}, {"patternProperties": {"^z": {}}}],
)
def test_an_object_that_says_what_else_it_may_have_is_left_as_it_is(says):
    for parameters in (
        {**A, **says},
        {"allOf": [A, {**B, **says}]},
        {"$ref": "#/$defs/A", "$defs": {"A": {**A, **says}}},
    ):
        assert takes(parameters, {"a": 1, "b": 2, "z": 1}) == [True]
    assert takes({"properties": {"x": {"type": "object"}}}, {"x": {"z": 1}}, {"z": 1}) == [True, False]


def test_what_must_not_be_is_not_closed():
    found = arguments_schema({"properties": {"x": {"not": A}}, "if": A}, "tools[0]", {})
    assert (found["properties"]["x"], found["if"]) == ({"not": A}, A)


def test_alternatives_with_a_discriminator_exclude_each_other():
    """As pydantic writes a union whose tags have defaults; strict tools do not let llguidance approximate."""

    def part(kind):
        return {"properties": {"kind": {"const": kind, "default": kind}, "x": {"type": "integer"}}}

    parameters = {
        "properties": {"one": {"oneOf": [{"$ref": "#/$defs/A"}, part("b")], "discriminator": {"propertyName": "kind"}}},
        "$defs": {"A": part("a")},
    }
    assert takes(parameters, {"one": {"kind": "a"}}, {"one": {"kind": "b", "x": 1}}, {"one": {"kind": "c"}}) == [
        True, True, False,
    ]  # fmt: skip


def test_a_schema_that_refers_to_itself_may_be_described_where_it_does():
    node = {"type": "object", "properties": {"next": {"$ref": "#", "description": "or none", "title": "Next"}}}
    assert takes(node, {"next": {"next": {}}}, {"next": {"z": 1}}) == [True, False]


def test_a_union_of_models_may_refer_to_itself():
    """As pydantic writes pets that have pets."""
    cat = {"properties": {"kind": {"const": "cat", "default": "cat", "title": "Kind"}}, "title": "Cat"}
    dog = {"properties": {"kind": {"const": "dog"}, "friend": {"anyOf": [{"$ref": "#/$defs/Pet"}, {"type": "null"}]}}}
    mapping = {"cat": "#/$defs/Cat", "dog": "#/$defs/Dog"}
    one = {"oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}], "title": "Animal"}
    one["discriminator"] = {"propertyName": "kind", "mapping": mapping}
    pet = {"type": "object", "properties": {"animal": one}, "required": ["animal"]}
    parameters = {"$ref": "#/$defs/Pet", "$defs": {"Cat": cat, "Dog": dog, "Pet": pet}}
    values = [{"animal": {"kind": kind, "friend": {"animal": {"kind": "cat"}}}} for kind in ("dog", "cat")]
    assert takes(parameters, *values) == [True, False]


KEYWORDS = st.sampled_from(
    ["properties", "$ref", "$defs", "allOf", "anyOf", "oneOf", "items", "additionalProperties", "patternProperties",
     "type", "required", "const", "enum", "not", "if", "$id", "$anchor", "dependentSchemas", "a", "title"]
)  # fmt: skip
VALUES = st.none() | st.booleans() | st.sampled_from(
    ["#", "#/$defs/a", "#/properties/a", "#a", "a", "object", "urn:a", "#/allOf/0", "#/anyOf/-1", "//[", "#/%", "#/a~0"]
)  # fmt: skip
ANYTHING = st.recursive(
    VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYWORDS, inner, max_size=5)
)


@given(st.dictionaries(KEYWORDS, ANYTHING, max_size=6))
def test_whatever_is_given_is_a_schema_or_refused(parameters):
    definitions: dict[str, Any] = {}
    try:
        found = arguments_schema(parameters, "tools[0].function.parameters", definitions)
    except ApiError as error:
        assert (error.status, error.param) == (400, "tools")
    else:
        assert isinstance(found, dict)
        json.dumps([found, definitions])
