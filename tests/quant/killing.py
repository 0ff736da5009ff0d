"""A kill -9 at the n-th operation on files, without a process: from then on no operation has an effect.

Everything that can change a file goes through the operations watched here. After the kill each of them raises, so that
no clean-up reaches the disk either; what lies there is what a killed process would have left.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

# Operations that the interpreter announces; the others are replaced.
_EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "shutil.copyfile"}
_CALLS = ("pwrite", "fsync", "fdatasync", "ftruncate")


class Killed(BaseException):
    """The process is no more."""


class _Watch:
    """What counts operations while it is armed."""

    def __init__(self) -> None:
        self.is_armed = False
        self.left = self.seen = 0

    def step(self) -> None:
        if not self.is_armed:
            return
        self.seen += 1
        if self.seen > self.left:
            raise Killed


_watch = _Watch()


def _hear(event: str, args: tuple[Any, ...]) -> None:
    if not _watch.is_armed:
        return
    writes = event == "open" and isinstance(args[2], int) and bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if event in _EVENTS or writes:
        _watch.step()


_hooks: list[Callable[..., None]] = []


def _watched(call: Callable[..., Any]) -> Callable[..., Any]:
    def watched(*args: Any, **options: Any) -> Any:
        _watch.step()
        return call(*args, **options)

    return watched


@contextmanager
def killed_after(operations: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Watch]:
    """Let so many operations on files have an effect; swallow the kill. `seen` tells how many there were."""
    if not _hooks:  # a hook stays for ever, so there is one
        _hooks.append(_hear)
        sys.addaudithook(_hear)
    _watch.left, _watch.seen = operations, 0
    with monkeypatch.context() as patched:
        for name in _CALLS:
            patched.setattr(os, name, _watched(getattr(os, name)))
        _watch.is_armed = True
        try:
            yield _watch
        except Killed:
            pass
        finally:
            _watch.is_armed = False
