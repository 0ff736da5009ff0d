"""Schemas of which only endless texts are."""

from __future__ import annotations

from typing import Any

import pytest

from eightfold.engine.schema_ends import has_end


def defined(**schemas: Any) -> dict[str, Any]:
    """Return a schema that is the first of several which may refer to each other."""
    return {"$ref": f"#/$defs/{next(iter(schemas))}", "$defs": schemas}


def node(following: Any, *, required: bool = True) -> dict[str, Any]:
    return {"type": "object", "properties": {"next": following}, "required": ["next"] if required else []}


A, B = {"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}

ENDLESS: list[Any] = [
    False,
    {"$ref": "#"},
    node({"$ref": "#"}),
    node({"$ref": "#/properties/next"}),
    defined(a=node(A)),
    defined(a=node(B), b=node(A)),
    defined(a=node({"anyOf": [A, B]}), b=node(A)),
    defined(a=node({"allOf": [A, {"type": "object"}]})),
    defined(a={"type": "array", "items": A, "minItems": 1}),
    defined(a={"type": "array", "prefixItems": [{"type": "integer"}, A], "minItems": 2}),
    defined(a={"type": ["object", "array"], "required": ["x"], "additionalProperties": A, "items": A, "minItems": 1}),
    defined(a=node(A), b={"type": "null"}),
    {"type": "object", "properties": {"a~/b": {"$ref": "#/properties/a~0~1b"}}, "required": ["a~/b"]},
]

ENDING: list[Any] = [
    True,
    {},
    {"type": "object"},
    node({"$ref": "#"}, required=False),
    node({"anyOf": [{"$ref": "#"}, {"type": "null"}]}),
    node({"oneOf": [{"type": "null"}, {"$ref": "#"}]}),
    {"anyOf": [node({"$ref": "#"}), {"type": "string"}]},
    {**node({"$ref": "#"}), "type": ["object", "null"]},
    {key: value for key, value in node({"$ref": "#"}).items() if key != "type"},  # a number has no next
    defined(a=node(B), b=node(A, required=False)),
    defined(a=node(B), b=node({"anyOf": [A, {"const": 1}]})),
    defined(a={"type": "array", "items": A}),
    defined(a={"type": "array", "prefixItems": [{"type": "integer"}, A], "minItems": 1}),
    defined(a={"type": "object", "required": ["x"], "patternProperties": {"x": {}}, "additionalProperties": A}),
    {"const": {"$ref": "#"}},
    {"enum": [1]},
    {"$ref": "http://elsewhere/x#/a"},
    {"$ref": "#/nowhere"},
    {"$ref": "#anchor"},
    defined(**{f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(40)}, d40={"type": "integer"}),
    {"type": 5, "required": 5, "properties": 5, "anyOf": 5, "allOf": None, "$ref": 5, "minItems": "x"},
    {"type": "array", "minItems": "x", "prefixItems": 5},
]


@pytest.mark.parametrize("schema", ENDLESS)
def test_what_requires_itself_has_no_end(schema):
    assert not has_end(schema)


@pytest.mark.parametrize("schema", ENDING)
def test_whatever_may_end_has_one(schema):
    assert has_end(schema)


def test_a_deep_schema_is_taken_to_end():
    deep: Any = {"$ref": "#"}
    for _ in range(100_000):
        deep = {"allOf": [deep]}
    assert has_end(deep)
