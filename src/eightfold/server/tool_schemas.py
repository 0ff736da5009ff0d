"""Schemas of tools, made ready to stand in the form of a call.

A reference is relative to its tool's own schema. So that the schemas of several tools can stand in one document, what
references lead to moves under the document's `$defs`, with names of its own. And objects that do not say otherwise are
closed, because a model that may write any further property often does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote, urldefrag, urljoin

from eightfold.server.fields import bad_request
from eightfold.values import shown_as_json

Schema = dict[str, Any]

MAX_PARTS = 20_000  # schemas that are looked into to close those that they are part of, for one tool

NO_ARGUMENTS: Schema = {"type": "object", "properties": {}, "additionalProperties": False}

# Keywords (of all drafts) by what stands under them: schemas by name, schemas in a list, a schema. `items` may be both.
_BY_NAME = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"))
_IN_LISTS = frozenset(("allOf", "anyOf", "oneOf", "prefixItems", "items"))
_ALONE = frozenset(
    ("items", "additionalItems", "additionalProperties", "unevaluatedItems", "unevaluatedProperties", "propertyNames",
     "contains", "not", "if", "then", "else")
)  # fmt: skip

# What applies to the same value as the schema around it.
_IN_PLACE = ("$ref", "allOf", "anyOf", "oneOf", "if", "then", "else", "dependentSchemas")
_TESTS = ("not", "if", "contains")  # a closed object under them would let other values pass
_SAYS = frozenset(
    ("additionalProperties", "patternProperties", "unevaluatedProperties")
)  # what else an object may have

# What else says something of a value. Other keywords, such as a title or a discriminator, are left out: beside a
# reference that leads back to itself, llguidance takes them for a further condition and refuses the schema.
_CONDITIONS = frozenset(
    ("$ref", "$dynamicRef", "$recursiveRef", "const", "enum", "type", "required", "dependentRequired", "dependencies",
     "minProperties", "maxProperties", "minItems", "maxItems", "uniqueItems", "minContains", "maxContains",
     "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
     "multipleOf")
)  # fmt: skip
_KEPT = (_CONDITIONS | _BY_NAME | _IN_LISTS | _ALONE) - {"$defs", "definitions"}


class _Place(NamedTuple):
    """A schema of a tool, and the URI against which its references are resolved."""

    schema: Any
    base: str


class _Way(NamedTuple):
    """How to rewrite a schema: whether it is closed itself, and whether those of its properties are."""

    here: bool
    below: bool


_CLOSED, _OPEN, _UNTOUCHED = _Way(True, True), _Way(False, True), _Way(False, False)


def arguments_schema(parameters: Schema | None, where: str, definitions: dict[str, Any]) -> Schema:
    """Return the schema of a call's arguments.

    Args:
        parameters: the tool's own schema; None: it has no parameters.
        where: names it in errors.
        definitions: what references lead to is added here, for `$defs` of the document.

    Raises:
        ApiError: 400 for a reference that leads nowhere, or parameters that are no object's.
    """
    return _Tool(parameters or {}, where, definitions).arguments()


def beside_others(schema: Schema, where: str, definitions: dict[str, Any]) -> Schema:
    """Return a schema that can stand in a document with others, and lets the same values pass.

    Args:
        schema: a document of its own.
        where: names it in errors.
        definitions: what references lead to is added here, for `$defs` of the document.

    Raises:
        ApiError: 400 for a reference that leads nowhere.
    """
    return _Tool(schema, where, definitions).unchanged()


class _Tool:
    """One tool's schema, and where its references lead."""

    def __init__(self, schema: Schema, where: str, definitions: dict[str, Any]) -> None:
        self._where, self._definitions = where, definitions
        self._resources: dict[str, Schema] = {"": schema}
        self._anchors: dict[tuple[str, str], Schema] = {}
        self._bases: dict[int, str] = {}
        self._root = _Place(schema, "")
        self._index()
        self._parts = 0  # that were looked into
        self._names: dict[tuple[int, _Way], str] = {}  # of what has been referred to, in the definitions
        self._pending = list[tuple[str, _Place, _Way]]()

    def _index(self) -> None:
        pending = [self._root]
        while pending:
            schema, base = pending.pop()
            if isinstance(own := schema.get("$id"), str):
                base = _joined(base, own)[0]
                self._resources.setdefault(base, schema)
            if isinstance(anchor := schema.get("$anchor"), str):
                self._anchors.setdefault((base, anchor), schema)
            self._bases[id(schema)] = base
            pending += [_Place(inner, base) for _, inner in _inner(schema) if isinstance(inner, dict)]

    def arguments(self) -> Schema:
        place, seen = self._root, set[int]()
        while place.schema.keys() & _KEPT == {"$ref"} and id(place.schema) not in seen:
            seen.add(id(place.schema))
            place = self._resolve(place.schema["$ref"], place)
            if not isinstance(place.schema, dict):
                break
        if not isinstance(place.schema, dict) or id(place.schema) in seen:
            raise self._wrong("references that lead to no object's schema", "an object's schema")
        if not place.schema.keys() & _KEPT - {"type"} and self._is_object(place.schema):
            return dict(NO_ARGUMENTS)
        if not self._is_object(place.schema):
            raise self._wrong(f"type {shown_as_json(place.schema['type'])}", 'type "object"')
        found = self._whole(place, _CLOSED)
        return found if "$ref" in found else {**found, "type": "object"}

    def unchanged(self) -> Schema:
        return self._whole(self._root, _UNTOUCHED)

    def _whole(self, place: _Place, way: _Way) -> Schema:
        """Return a schema rewritten, and put what its references lead to among the definitions."""
        found: Schema = self._rewrite(place, way)
        while self._pending:  # and not by recursion: references may be a long chain
            name, inner, other = self._pending.pop()
            self._definitions[name] = self._rewrite(inner, other)
        return found

    @staticmethod
    def _is_object(schema: Schema) -> bool:
        kind = schema.get("type", "object")
        return kind == "object" or (isinstance(kind, list) and "object" in kind)

    def _rewrite(self, place: _Place, way: _Way) -> Any:
        schema = place.schema
        if not isinstance(schema, dict):
            return schema
        base = self._bases.get(id(schema), place.base)
        applied = [key for key in _IN_PLACE if key in schema]
        # Where one of several schemas applies and nothing else, each is closed; where several apply together, all of
        # them are closed as one.
        leaves_it = way.here and not schema.keys() & (_SAYS | {"properties", "required"}) and len(applied) == 1
        leaves_it = leaves_it and (applied[0] in ("$ref", "anyOf", "oneOf") or _has_one(schema.get("allOf")))
        parts = _CLOSED if leaves_it else _Way(False, way.below)
        found = Schema()
        for key, value in schema.items():
            if key not in _KEPT:
                continue
            within = _UNTOUCHED if key in _TESTS else parts if key in _IN_PLACE else _Way(way.below, way.below)
            if key == "$ref":
                found[key] = self._hoisted(self._resolve(value, _Place(schema, base)), within)
            elif key in _BY_NAME:
                if not isinstance(value, dict):
                    raise self._wrong(f"{key} {shown_as_json(value)}", "schemas by name")
                found[key] = {name: self._rewrite(_Place(inner, base), within) for name, inner in value.items()}
            elif key in _IN_LISTS and isinstance(value, list):
                # With a discriminator one of them excludes the others, which llguidance does not see.
                key = "anyOf" if key == "oneOf" and "discriminator" in schema and "anyOf" not in schema else key
                found[key] = [self._rewrite(_Place(inner, base), within) for inner in value]
            elif key in _ALONE:
                found[key] = self._rewrite(_Place(value, base), within)
            else:
                found[key] = value
        if way.here and not leaves_it:
            self._close(found, _Place(schema, base))
        return found

    def _close(self, found: Schema, place: _Place) -> None:
        """Let an object have no properties but those that are named in its schema, or in those that it consists of."""
        names, has_properties, pending, seen = dict[str, None](), False, [place], set[int]()
        while pending:
            schema, base = pending.pop()
            if not isinstance(schema, dict) or id(schema) in seen:
                continue
            seen.add(id(schema))
            self._parts += 1
            if self._parts > MAX_PARTS:
                raise self._wrong(f"more than {MAX_PARTS} schemas that apply together", "fewer")
            if schema.keys() & _SAYS:
                return
            if isinstance(properties := schema.get("properties"), dict):
                has_properties = True
                names.update(dict.fromkeys(properties))
            if isinstance(required := schema.get("required"), list):
                names.update({name: None for name in required if isinstance(name, str)})
            base = self._bases.get(id(schema), base)
            if "$ref" in schema:
                pending.append(self._resolve(schema["$ref"], _Place(schema, base)))
            pending += [_Place(inner, base) for key, inner in _inner(schema) if key in _IN_PLACE]
        if has_properties:
            further = {name: True for name in names if name not in found.get("properties", {})}
            if further:  # where properties stand, or behind everything: the order in which they come stays the same
                found["properties"] = {**found.get("properties", {}), **further}
            found["additionalProperties"] = False

    def _hoisted(self, place: _Place, way: _Way) -> str:
        """Return a reference to a schema under the document's `$defs`."""
        key = (id(place.schema), way)
        if key not in self._names:
            self._names[key] = name = f"d{len(self._definitions)}"
            self._definitions[name] = True  # takes the name
            self._pending.append((name, place, way))
        return f"#/$defs/{self._names[key]}"

    def _resolve(self, reference: Any, place: _Place) -> _Place:
        """Return what a reference leads to."""
        if not isinstance(reference, str):
            raise self._wrong(f"$ref {shown_as_json(reference)}", "a text")
        base, fragment = _joined(self._bases.get(id(place.schema), place.base), reference)
        schema: Any = self._resources.get(base)
        if schema is not None and fragment and not fragment.startswith("/"):
            schema = self._anchors.get((base, unquote(fragment)))
        elif schema is not None:
            for part in unquote(fragment).split("/")[1:]:
                schema = _child(schema, part.replace("~1", "/").replace("~0", "~"))
                base = self._bases.get(id(schema), base)
        if not isinstance(schema, (dict, bool)):
            raise self._wrong(f"$ref {shown_as_json(reference)}", "one that leads to a schema in the same parameters")
        return _Place(schema, base)

    def _wrong(self, got: str, expected: str) -> Exception:
        return bad_request(f"{self._where}: got {got}, expected {expected}", param="tools")


def _inner(schema: Schema) -> Iterator[tuple[str, Any]]:
    """Yield the schemas directly under a schema, and by which keyword."""
    for key, value in schema.items():
        if key in _BY_NAME and isinstance(value, dict):
            yield from ((key, inner) for inner in value.values())
        elif key in _IN_LISTS and isinstance(value, list):
            yield from ((key, inner) for inner in value)
        elif key in _ALONE:
            yield key, value


def _joined(base: str, reference: str) -> tuple[str, str]:
    """Return a reference's URI and its fragment."""
    if reference.startswith("#"):  # urljoin would drop a base such as urn:x
        return base, reference[1:]
    try:
        found = urldefrag(urljoin(base, reference))
    except ValueError:  # no URI
        return reference, ""
    return found.url, found.fragment


def _child(value: Any, part: str) -> Any:
    if isinstance(value, list):
        return value[int(part)] if part.isdecimal() and len(part) < 6 and int(part) < len(value) else None
    return value.get(part) if isinstance(value, dict) else None


def _has_one(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 1
