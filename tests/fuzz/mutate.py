"""Mutations that know JSON, lines and bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 127, 2**31, 2**32, 2**53 + 1, 2**63, -(2**63), 2**64, 10**30, 0.0, -0.5, 1e-300,
    1e308, float("inf"), float("nan"), "", " ", "a", "\x00", "\x1b[2J", "\ud800", "\u202e", "é" * 300, "x" * 5000,
    "9" * 5000, [], {}, [[]], [None], {"": None}, {"a": {}}, "../../etc/passwd", "model.safetensors", "BF16", "I8",
    "FLOAT", "W8A8", "auto",
)  # fmt: skip

PIECES = (
    b"{", b"}", b"[", b"]", b'"', b":", b",", b"\\", b"\n", b"\r\n", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xfe\xff",
    b"- ", b"&a ", b"*a", b"!!", b"{{", b"}}", b"{% for x in range(9) %}", b"{% endfor %}", b"null", b"NaN", b"1e999",
    b"-0", b"\\u0000", b"\\ud800", b"<s>", b"|", b"(", b")", b"{1000}", b"*", b"+", b"?", b"\x80", b"\xc3\x28",
    b"9999999999999999999", b'"a":1,"a":2',
)  # fmt: skip


def mutate_json(value: Any, rng: random.Random) -> Any:
    """Return a JSON value that differs in one place or a few; lists and objects are changed in place."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        value = _once(value, rng)
    return value


def _half(value: float) -> float:
    """Return half of a number, which may be an integer larger than any float."""
    return value / 2 if abs(value) < 2**1000 else value // 2


def _once(value: Any, rng: random.Random) -> Any:
    places: list[tuple[Any, Any]] = []
    pending = [value]
    while pending and len(places) < 5000:
        inner = pending.pop()
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner))) if isinstance(inner, list) else []
        places += [(inner, key) for key in keys]
        pending += [inner[key] for key in keys]
    if not places or rng.random() < 0.02:
        return rng.choice(VALUES)
    holder, key = rng.choice(places)
    what = rng.randrange(7)
    if what == 0:
        del holder[key]
    elif what == 1:
        holder[key] = _many(holder[key], rng) if rng.random() < 0.7 else _deep(holder[key], rng)
    elif what == 2 and isinstance(holder, dict):
        holder[rng.choice((key + "x", "", key.upper(), key[:-1], rng.choice(places)[1]))] = holder.pop(key)
        return _with_texts_for_keys(value)
    elif what == 3:
        other, there = rng.choice(places)
        holder[key] = json.loads(json.dumps(other.get(there) if isinstance(other, dict) else None))
    elif what == 4 and isinstance(holder[key], (int, float)):
        holder[key] = rng.choice((holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * 2, _half(holder[key])))
    elif what == 5 and isinstance(holder[key], str):
        text = holder[key]
        at = rng.randrange(len(text) + 1)
        holder[key] = text[:at] + rng.choice(PIECES).decode("latin-1") + text[at + rng.randrange(3) :]
    else:
        holder[key] = json.loads(json.dumps(rng.choice(VALUES)))
    return value


def _many(value: Any, rng: random.Random) -> Any:
    """Return a value several times; a large one once, or texts would grow without bound."""
    return [value] * (rng.choice((1, 2, 70)) if len(json.dumps(value)) < 200 else 1)


def _deep(value: Any, rng: random.Random) -> Any:
    for _ in range(rng.choice((3, 80, 700))):
        value = [value]
    return value


def _with_texts_for_keys(value: Any) -> Any:
    return json.loads(json.dumps(value))


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Return bytes that differ in a few places."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(found) + 1)
        what = rng.randrange(6)
        if what == 0:
            del found[at : at + rng.choice((1, 2, 8, 64, 4096))]
        elif what == 1:
            found[at:at] = rng.choice(PIECES)
        elif what == 2 and found:
            found[at % len(found)] ^= 1 << rng.randrange(8)
        elif what == 3 and found:
            found[at % len(found)] = rng.randrange(256)
        elif what == 4:
            begin = rng.randrange(len(found) + 1)
            found[at:at] = found[begin : begin + rng.choice((1, 8, 64, 512))] * rng.choice((1, 1, 3, 40))
        else:
            found[at : at + 8] = rng.choice((0, 1, 255, 2**31, 2**63 - 1, 2**64 - 1)).to_bytes(8, "little")
    return bytes(found)


def mutate(data: bytes, rng: random.Random, most: int, by_bytes: Callable[[bytes], bytes]) -> bytes:
    """Return an input made from another one.

    Args:
        data: the other one.
        rng: decides.
        most: bytes.
        by_bytes: mutates what is not taken for JSON or lines of JSON.
    """
    if rng.random() < 0.6:
        lines = data.split(b"\n")
        at = rng.randrange(len(lines))
        for begin, end in ((0, len(lines)), (at, at + 1)):
            try:
                value = json.loads(b"\n".join(lines[begin:end]))
                text = json.dumps(mutate_json(value, rng), ensure_ascii=rng.random() < 0.9)
            except (ValueError, RecursionError, TypeError):
                continue
            lines[begin:end] = [text.encode("utf-8", "surrogatepass")]
            found = b"\n".join(lines)
            return found if len(found) <= most else data
    return (mutate_bytes(data, rng) if rng.random() < 0.5 else by_bytes(data))[:most]
