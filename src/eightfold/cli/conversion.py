"""What was typed -> Python's values, at once where that is plain.

From 0.27 on typer has pydantic make a validator for every option of a command, given or not: 80 ms of what were 400 to
a first token. So options that are absent, texts, whole numbers within their limits, paths and choices are converted
here; typer converts the rest, and says what is wrong with a value. Without its hook for that, it converts all.
"""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Any

import typer

_HOOK = "_runtime_param"  # typer's: what converts a parameter's values; None until it is needed
_NOT_PLAIN = object()


def convert_soon(command: Any, above: Any = None) -> None:
    """Let a command of typer, and those below it, convert plain values without pydantic."""
    context = typer.Context(command, parent=above, **command.context_settings)
    for parameter in command.get_params(context):  # with that of --help, which is made here
        if _has_hook(parameter):
            setattr(parameter, _HOOK, _Plain())
    for below in getattr(command, "commands", {}).values():
        convert_soon(below, context)


def _has_hook(parameter: Any) -> bool:
    described = getattr(parameter, "type_descriptor", None)
    is_described = hasattr(described, "annotation") and hasattr(described, "parameter_info")
    return is_described and hasattr(parameter, "get_runtime_param") and getattr(parameter, _HOOK, _NOT_PLAIN) is None


class _Plain:
    """Stands where typer's converter will."""

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        described = param.type_descriptor
        found = _converted(value, described.annotation, described.parameter_info)
        if found is not _NOT_PLAIN and not (param.multiple or param.nargs == -1):
            return found
        if value is None:
            return ()
        setattr(param, _HOOK, None)
        return param.get_runtime_param().coerce(value, param=param, ctx=ctx)


def _converted(value: Any, annotation: Any, limits: Any) -> Any:
    """Return what typer would make of a value, or _NOT_PLAIN.

    Args:
        value: what was typed, a default, or None.
        annotation: the type that is wanted.
        limits: typer's Argument or Option.
    """
    if value is None:
        return None
    if limits.parser is not None:
        return _NOT_PLAIN
    if annotation is str and type(value) is str:
        return value
    if annotation is int:
        return _whole_number(value, limits)
    if annotation is Path and type(value) is str:
        return _path(value, limits)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return next((choice for choice in annotation if value is choice or value == choice.value), _NOT_PLAIN)
    return _NOT_PLAIN


def _whole_number(value: Any, limits: Any) -> Any:
    if type(value) is str and value.isascii() and value.isdecimal() and len(value) < 19:
        value = int(value)
    is_within = type(value) is int and not (
        (limits.min is not None and value < limits.min) or (limits.max is not None and value > limits.max)
    )
    return value if is_within else _NOT_PLAIN


def _path(value: str, limits: Any) -> Any:
    is_any = limits.file_okay and limits.dir_okay and not (limits.exists or limits.writable or limits.resolve_path)
    is_text = limits.path_type in (None, Path) and value and "\0" not in value
    if not (is_any and is_text):
        return _NOT_PLAIN
    try:
        os.stat(value)  # noqa: PTH116 (what it raises is not sorted out as Path.exists does)
    except OSError:
        return Path(value)  # whoever reads or writes it finds out, and says so
    return Path(value) if os.access(value, os.R_OK) else _NOT_PLAIN
