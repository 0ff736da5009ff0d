"""Whether an answer can end that keeps to a JSON schema.

A schema may require itself, such as a node of a list whose next node is required. Only endless texts have such a form,
which llguidance does not see.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

# Definitions that refer to each other further than this are taken to end.
_ROUNDS = 64


def has_end(schema: Any) -> bool:
    """Return whether there is a finite value of a schema. Where that is hard to tell, there is."""
    try:
        return _Search(schema).succeeds()
    except RecursionError:
        return True


class _Search:
    """The least fixed point: a schema has an end if all that it requires has one."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._open: set[str] = set()  # references to schemas of which no end is known yet
        self._ended: set[str] = set()

    def succeeds(self) -> bool:
        for _ in range(_ROUNDS):
            before = len(self._open), len(self._ended)
            if self._ends(self._root):
                return True
            found = {ref for ref in tuple(self._open) if self._ends(self._target(ref))}
            self._ended |= found
            self._open -= found
            if (len(self._open), len(self._ended)) == before:
                return False
        return True

    def _ends(self, schema: Any) -> bool:
        if not isinstance(schema, dict) or "const" in schema or "enum" in schema:
            return schema is not False
        choices = [schema[name] for name in ("anyOf", "oneOf") if isinstance(schema.get(name), list)]
        return (
            self._reference_ends(schema.get("$ref"))
            and self._values_end(schema)
            and all(self._ends(each) for each in _list(schema, "allOf"))
            and all(any(self._ends(each) for each in choice) for choice in choices)
        )

    def _reference_ends(self, ref: Any) -> bool:
        if not isinstance(ref, str) or ref in self._ended:
            return True
        self._open.add(ref)
        return False

    def _target(self, ref: str) -> Any:
        """Return the schema that a reference means; True, which anything fits, if it is not to be found here."""
        found = self._root
        for part in unquote(ref).split("/")[1:] if ref.startswith("#") else ["elsewhere"]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            elif isinstance(found, dict) and name in found:
                found = found[name]
            else:
                return True
        return found if ref in ("", "#") or "/" in ref else True

    def _values_end(self, schema: dict[str, Any]) -> bool:
        types = schema.get("type")
        kinds = types if isinstance(types, list) else [types]
        return not {"object", "array"}.issuperset(map(str, kinds)) or any(
            all(self._ends(each) for each in (_members(schema) if kind == "object" else _items(schema)))
            for kind in kinds
        )


def _list(schema: dict[str, Any], name: str) -> list[Any]:
    found = schema.get(name)
    return found if isinstance(found, list) else []


def _members(schema: dict[str, Any]) -> Iterator[Any]:
    """Return the schemas of what an object must have."""
    known = schema.get("properties")
    others = True if "patternProperties" in schema else schema.get("additionalProperties", True)
    for name in _list(schema, "required"):
        yield known[name] if isinstance(known, dict) and name in known else others


def _items(schema: dict[str, Any]) -> Iterator[Any]:
    """Return the schemas of what a list must have."""
    least, first = schema.get("minItems", 0), _list(schema, "prefixItems")
    if isinstance(least, int):
        yield from first[:least]
        if least > len(first):
            yield schema.get("items", True)
