"""What calls look like in the answers of each family.

A reader returns the calls that a text begins with, or None where they are none. It waits for more of the text where it
cannot tell yet, as the steps of tool_source.py do of which it consists.
"""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from eightfold.server.tool_source import Reading, Source

_NAME = re.compile(r"[A-Za-z0-9_.-]*")
_WORD = re.compile(r"\w*")
_IDENTIFIER = re.compile(r"[\w.]*")
_HALF = re.compile("[\ud800-\udfff]")
_PARAMETER = re.compile(r"[^<>\n]*")
_MOST_NAME = 256  # characters of a name


class Found(NamedTuple):
    """A call as it was written; arguments are JSON text."""

    name: str
    arguments: str


Calls = list[Found]
Schemas = Mapping[str, Any]  # name of a function -> the schema of its parameters, where there is one
Reader = Callable[["Source", Schemas], Reading["Calls | None"]]


# --- JSON


def json_calls(source: Source, *, plain: bool = False, one: bool = False) -> Reading[Calls | None]:
    """Read calls as JSON: objects or lists of them, one after the other.

    Args:
        source: stands before the first.
        plain: whether nothing else says that they are calls, so that they have to look like it.
        one: only one value.
    """
    found = Calls()
    while (yield from source.peek()) in ("{", "["):
        if plain and not (yield from _may_be_call(source)):
            return None
        text = yield from source.bracketed('"')
        calls = None if text is None else _calls_in(text, plain=plain)
        if calls is None:
            return None
        found += calls
        if one:
            break
        yield from source.peek()
        yield from source.take(";", ",")
    return found or None


def _may_be_call(source: Source) -> Reading[bool]:
    """Return whether the first key of a JSON value is one of a call: if not, nobody has to wait for its end."""
    begin = source.at
    source.at += 1
    if (yield from source.peek()) == "{":
        source.at += 1
        yield from source.peek()
    may = source.text[source.at : source.at + 1] == '"'
    source.at += 1
    may = may and (yield from source.run(_WORD)) in _KEYS
    source.at = begin
    return may


_KEYS = frozenset(("name", "function", "arguments", "parameters", "type", "id", "index"))


def _calls_in(text: str, *, plain: bool) -> Calls | None:
    value = _parsed(text)
    calls = [_call(each, plain=plain) for each in (value if isinstance(value, list) else [value])]
    found = [call for call in calls if call is not None]
    return found if len(found) == len(calls) else None


def _parsed(text: str) -> Any:
    """Return a JSON value; None where it is none, or has a number that JSON has not."""
    try:
        # Models write line breaks inside of texts, where JSON has none.
        return json.loads(text, strict=False, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):
        return None


def _refuse(text: str) -> Any:
    raise ValueError(text)


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def _call(value: Any, *, plain: bool) -> Found | None:
    """Return the call that a value is: {"name", "arguments"}, or under other names of the same.

    With `plain` it has to have arguments, and nothing that calls have not: the description of a tool is no call of it.
    """
    if not isinstance(value, dict) or (plain and not value.keys() <= _KEYS):
        return None
    inner = value.get("function")
    if isinstance(inner, dict):
        return _call(inner, plain=plain)
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str) and arguments.strip() == "null":
        arguments = None
    if isinstance(arguments, str):
        arguments = _parsed(arguments) if arguments.strip() else {}
    elif arguments is None and not plain:
        arguments = {}
    return _made(value.get("name", inner), arguments)


def _made(name: Any, arguments: Any) -> Found | None:
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        # Half of a surrogate pair, which models write as \ud83d, can be sent only so.
        return Found(name, json.dumps(arguments) if _HALF.search(text) else text)
    except (ValueError, RecursionError):
        return None


# --- between two markers


_MOST_REPEATS = 2  # of a marker: an answer of nothing else must not be read as often as it has markers


def repeated(marker: str, reader: Reader) -> Reader:
    """Return the reader of what stands behind a marker that has been read: small models write it twice at times.

    A marker with nothing behind it is one that ends calls, if it is anything.
    """

    def read(source: Source, schemas: Schemas) -> Reading[Calls | None]:
        for _ in range(_MOST_REPEATS):
            here = source.at
            if not (yield from source.peek()):
                return Calls()
            if not (yield from source.take(marker)):
                source.at = here
                break
        return (yield from reader(source, schemas))

    return read


def between(begin: str, end: str, *, plain: bool = False) -> Reader:
    """Return the reader of calls between two markers, the first of which has been read. The second may be missing."""

    def read(source: Source, schemas: Schemas) -> Reading[Calls | None]:
        if (yield from source.peek()) == "<":
            found = yield from _functions(source, schemas)
        else:
            found = yield from json_calls(source, plain=plain)
        if found is None:
            return None
        if (yield from source.ends(end)):
            return found
        here = source.at
        another = yield from source.take(begin)
        source.at = here
        return found if another else None

    return read


def nothing(source: Source, schemas: Schemas) -> Reading[Calls | None]:
    """Read a marker that ends calls, where those in front of it have ended: there are no more in it."""
    yield from ()
    return Calls()


# In place of <tool_call> smaller models write these, as llama.cpp has found; they mean something else at times.
OTHER_TAGS = ("<tools>", "<tool>", "<function_call>", "<response>", "<json>", "<JSON>", "<xml>")


def fenced(source: Source, schemas: Schemas) -> Reading[Calls | None]:
    """Read calls in a block of code."""
    if (yield from source.run(_WORD)).lower() not in ("", "json", "xml", "tool_call"):
        return None
    if (yield from source.peek()) == "<":
        tag = yield from source.take("<tool_call>", *OTHER_TAGS)
        found = (yield from between(tag, tag.replace("<", "</"), plain=True)(source, schemas)) if tag else None
    else:
        found = yield from json_calls(source, plain=True)
    if found is None:
        return None
    return found if (yield from source.ends("```")) else None


# --- XML, as Qwen3-Coder writes it; Llama 3.1 puts JSON in place of the parameters


def _functions(source: Source, schemas: Schemas) -> Reading[Calls | None]:
    found = Calls()
    while (yield from source.peek()) == "<" and (yield from source.take("<function=")):
        calls = yield from _function(source, schemas)
        if calls is None:
            return None
        found += calls
    return found or None


def function(source: Source, schemas: Schemas) -> Reading[Calls | None]:
    """Read <function=NAME><parameter=NAME>value</parameter>...</function>, from the name on.

    Models forget the <tool_call> before it more often than the </tool_call> behind it, which is no text then.
    """
    found = yield from _function(source, schemas)
    behind = source.at
    if found is not None and (yield from source.peek()) == "<" and (yield from source.take("</tool_call>")):
        return found
    source.at = behind
    return found


def function_name(source: Source, schemas: Schemas) -> Reading[Calls | None]:
    """Read the same where it begins with <function name="NAME">, as smaller models write it."""
    return (yield from _function(source, schemas, '">'))


def _function(source: Source, schemas: Schemas, end: str = ">") -> Reading[Calls | None]:
    name = yield from source.run(_NAME)
    if not name or len(name) > _MOST_NAME or not (yield from source.take(end)):
        return None
    if (yield from source.peek()) == "{":
        text = yield from source.bracketed('"')
        arguments = None if text is None else _parsed(text)
    else:
        arguments = yield from _parameters(source, _properties(schemas.get(name)))
    call = _made(name, arguments)
    return [call] if call is not None and (yield from source.ends("</function>")) else None


def _parameters(source: Source, properties: Mapping[str, Any]) -> Reading[dict[str, Any] | None]:
    found = dict[str, Any]()
    while (yield from source.peek()) == "<" and (yield from source.take("<parameter=")):
        name = yield from source.run(_PARAMETER)
        if not name or len(name) > _MOST_NAME or not (yield from source.take(">")):
            return None
        begin = source.at
        while True:  # the value may hold the marker too
            if (yield from source.until("</parameter>")) is None:
                return None
            end = source.at - len("</parameter>")
            yield from source.peek()
            here = source.at
            if (yield from source.take("<parameter=")) or (yield from source.ends("</function>")):
                source.at = here
                break
        text = source.text[begin:end]
        found[name] = _typed(text.removeprefix("\n").removesuffix("\n"), properties.get(name))
    return found


def _properties(schema: Any) -> Mapping[str, Any]:
    properties = schema.get("properties") if isinstance(schema, dict) else None
    return properties if isinstance(properties, dict) else {}


def _typed(text: str, schema: Any) -> Any:
    """Return a parameter's value, which is written without a type: a text, unless its schema says otherwise."""
    kinds = _kinds(schema)
    if not kinds or kinds == {"string"}:
        return text
    if (word := text.strip()) in _WORDS:
        value = _WORDS[word]
    elif (value := _parsed(text)) is None:
        return text
    return text if "string" in kinds and _kind(value) not in kinds - {"string"} else value


_WORDS = {"null": None, "None": None, "true": True, "True": True, "false": False, "False": False}


def _kinds(schema: Any) -> set[str]:
    """Return the types that a schema names; none where it names none."""
    if not isinstance(schema, dict):
        return set()
    kinds = schema.get("type")
    found = {kind for kind in (kinds if isinstance(kinds, list) else [kinds]) if isinstance(kind, str)}
    if "$ref" in schema:
        found.add("object")
    for values in (schema.get("enum"), [schema["const"]] if "const" in schema else None):
        found |= {_kind(value) for value in values} if isinstance(values, list) and not found else set()
    for key in ("anyOf", "oneOf", "allOf"):
        parts = schema.get(key)
        found |= set().union(*map(_kinds, parts)) if isinstance(parts, list) else set()
    return found | {"integer"} if "number" in found else found


def _kind(value: Any) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


# --- Mistral


def mistral(source: Source, schemas: Schemas) -> Reading[Calls | None]:
    """Read what stands behind [TOOL_CALLS]: JSON, or a name and its arguments."""
    if (yield from source.peek()) in ("{", "["):
        return (yield from json_calls(source, one=True))
    name = yield from source.run(_NAME)
    yield from source.peek()
    if (yield from source.take("[CALL_ID]")):
        yield from source.run(_NAME)
        yield from source.peek()
    yield from source.take("[ARGS]")
    if not name or (yield from source.peek()) != "{":
        return None
    text = yield from source.bracketed('"')
    call = None if text is None else _made(name, _parsed(text))
    return None if call is None else [call]


# --- DeepSeek

DEEPSEEK = tuple(f"<｜tool▁{part}｜>" for part in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep"))
_CALLS_BEGIN, _CALLS_END, _CALL_BEGIN, _CALL_END, _SEP = DEEPSEEK

# How models write the first where it is no token for them.
DEEPSEEK_BEGINS = (_CALLS_BEGIN, "<｜tool_calls_begin｜>", "<｜tool calls begin｜>", "<｜tool▁calls｜>")


def deepseek(source: Source, schemas: Schemas) -> Reading[Calls | None]:
    """Read the calls behind the marker that begins all of them."""
    found = Calls()
    while ((yield from source.peek()) == "<" and (yield from source.take(_CALL_BEGIN))) or not found:
        calls = yield from deepseek_call(source, schemas)
        if calls is None:
            return None
        found += calls
    yield from source.take(_CALLS_END)
    return found or None


def deepseek_call(source: Source, schemas: Schemas) -> Reading[Calls | None]:
    """Read one call: `function<sep>NAME` and a block of code with JSON (V3, R1), or `NAME<sep>` and JSON (V3.1)."""
    yield from source.peek()
    name = yield from source.run(_NAME)
    if not (yield from source.take(_SEP)):
        return None
    if (yield from source.peek()) != "{":
        name = yield from source.run(_NAME)
        yield from source.peek()
        yield from source.take("```json", "```")
        if (yield from source.peek()) != "{":
            return None
    text = yield from source.bracketed('"')
    call = None if text is None else _made(name, _parsed(text))
    if call is None:
        return None
    if (yield from source.peek()) == "`":
        yield from source.take("```")
        yield from source.peek()
    yield from source.take(_CALL_END)
    return [call]


# --- Python


def python_tag(source: Source, schemas: Schemas) -> Reading[Calls | None]:
    """Read what stands behind Llama 3's <|python_tag|>: JSON, or a call of a tool that it knows, in Python."""
    if (yield from source.peek()) in ("{", "["):
        return (yield from json_calls(source))
    begin = source.at
    name = yield from source.run(_IDENTIFIER)
    if not name or (yield from source.peek()) != "(":
        return None
    text = yield from source.bracketed("\"'")
    return None if text is None else _python_calls(f"[{source.text[begin : source.at]}]")


def python_list(source: Source, schemas: Schemas) -> Reading[Calls | None]:
    """Read a list of calls in Python, with a marker behind it or none."""
    begin = source.at
    if not (yield from source.take("[")):
        return None
    yield from source.peek()
    if not (yield from source.run(_IDENTIFIER)) or (yield from source.peek()) != "(":
        return None
    source.at = begin
    text = yield from source.bracketed("\"'")
    found = None if text is None else _python_calls(text)
    if found is not None and (yield from source.peek()) == "<":
        yield from source.take("<|python_end|>")
    return found


def _python_calls(text: str) -> Calls | None:
    """Return the calls in a Python list, whose arguments are literals with names."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about backslashes, for the author of a program
            body = ast.parse(text.strip(), mode="eval").body
        calls = [_python_call(each) for each in body.elts] if isinstance(body, ast.List) else []
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    found = [call for call in calls if call is not None]
    return found if found and len(found) == len(calls) else None


def _python_call(node: ast.expr) -> Found | None:
    if not isinstance(node, ast.Call) or node.args:
        return None
    arguments = {keyword.arg: _literal(keyword.value) for keyword in node.keywords}
    if None in arguments or len(arguments) < len(node.keywords):
        return None
    return _made(ast.unparse(node.func).removesuffix(".call"), arguments)


def _literal(node: ast.expr) -> Any:
    """Return the value of a literal, of Python or JSON, as JSON has it.

    Raises:
        ValueError: it is none.
    """
    match node:
        case ast.Constant(value=None | bool() | int() | float() | str()):
            return node.value
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=ast.Constant(value=int() | float() as value)):
            return -value if isinstance(node.op, ast.USub) else value
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return [_literal(part) for part in parts]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _literal(value) for key, value in zip(keys, values, strict=True)}
        case ast.Name(id="true" | "false" | "null" as word):
            return _WORDS[word]
    raise ValueError(ast.dump(node))


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise ValueError(node)


# --- answers that are calls and nothing else


def whole(source: Source, schemas: Schemas, *, plain: bool) -> Reading[Calls | None]:
    """Read an answer that consists of calls, in JSON, in a block of code or in Python, with nothing behind them.

    Args:
        source: stands before the first character that is no white space.
        schemas: of the functions.
        plain: whether they have to look like calls, because the family does not write them so.
    """
    if (yield from source.take("```")):
        found = yield from fenced(source, schemas)
    else:
        begin, source.at = source.at, source.at + 1
        is_python = source.text[begin] == "[" and (yield from source.peek()) != "{"
        source.at = begin
        if not is_python and not (yield from _may_be_call(source)):
            return None
        found = yield from python_list(source, schemas) if is_python else json_calls(source, plain=plain)
    return None if found is None or (yield from source.peek()) else found
