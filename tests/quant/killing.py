"""What can go wrong at the n-th operation on files, without a process: a kill -9, or an operation that fails.

Everything that can change a file goes through the operations watched here. After a kill each of them raises, so that
no clean-up reaches the disk either; what lies there is what a killed process would have left. A fault is one operation
that fails, or one write that is cut short; those after it work.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest
import torch

# Operations that the interpreter announces; the others are replaced.
_EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "shutil.copyfile"}
_CALLS = ("fsync", "fdatasync", "ftruncate")

# Where a run takes memory for what is large.
_ALLOCATIONS = (
    *((torch, name) for name in ("empty", "zeros", "zeros_like", "cat", "empty_like")),
    (torch.Tensor, "to"),
    (torch.Tensor, "contiguous"),
    (torch.nn.functional, "linear"),
    (np, "fromfile"),
)


class Killed(BaseException):
    """The process is no more."""


class _Watch:
    """What counts operations while it is armed, and knows which of them go wrong.

    Attributes:
        kinds: of operations that are counted: `file`, `write`, `memory`.
        left: so many work.
        seen: so many there were.
        error: makes what the next one raises; None for a write that is cut short.
        is_over: whether none of those after it works either.
    """

    def __init__(self) -> None:
        self.is_armed = self.is_over = False
        self.kinds: tuple[str, ...] = ()
        self.left = self.seen = 0
        self.error: Callable[[], BaseException] | None = Killed

    def step(self, kind: str) -> bool:
        """Count an operation; return whether it is to be cut short."""
        if not self.is_armed or kind not in self.kinds:
            return False
        self.seen += 1
        is_hit = self.seen > self.left if self.is_over else self.seen == self.left + 1
        if is_hit and self.error is not None:
            raise self.error()
        return is_hit


_watch = _Watch()


def _hear(event: str, args: tuple[Any, ...]) -> None:
    writes = event == "open" and isinstance(args[2], int) and bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if event in _EVENTS or writes:
        _watch.step("file")


_hooks: list[Callable[..., None]] = []


def _watched(call: Callable[..., Any], kind: str) -> Callable[..., Any]:
    def watched(*args: Any, **options: Any) -> Any:
        _watch.step(kind)
        return call(*args, **options)

    return watched


def _pwrite(file: int, data: Any, at: int, call: Callable[[int, Any, int], int] = os.pwrite) -> int:
    return call(file, data[: max(1, len(data) // 2)] if _watch.step("write") else data, at)


class _Written:
    """A file that is being written; of what cannot be written, half is there."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: Any) -> int:
        try:
            _watch.step("file")
        except OSError:
            self._file.write(data[: len(data) // 2])
            raise
        return int(self._file.write(data))


def _open(*args: Any, call: Callable[..., Any] = io.open, **options: Any) -> Any:
    file = call(*args, **options)
    mode = args[1] if len(args) > 1 else options.get("mode", "r")
    return _Written(file) if "w" in mode else file


@contextmanager
def _armed(
    kinds: tuple[str, ...],
    left: int,
    error: Callable[[], BaseException] | None,
    monkeypatch: pytest.MonkeyPatch,
    *,
    is_over: bool = False,
) -> Iterator[_Watch]:
    if not _hooks:  # a hook stays for ever, so there is one
        _hooks.append(_hear)
        sys.addaudithook(_hear)
    _watch.kinds, _watch.left, _watch.error, _watch.is_over, _watch.seen = kinds, left, error, is_over, 0
    with monkeypatch.context() as patched:
        for name in _CALLS:
            patched.setattr(os, name, _watched(getattr(os, name), "file"))
        patched.setattr(os, "pwrite", _pwrite)
        if not is_over:
            patched.setattr(io, "open", _open)
        for owner, name in _ALLOCATIONS if "memory" in kinds else ():
            patched.setattr(owner, name, _watched(getattr(owner, name), "memory"))
        _watch.is_armed = True
        try:
            yield _watch
        finally:
            _watch.is_armed = False


@contextmanager
def killed_after(operations: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Watch]:
    """Let so many operations on files have an effect; swallow the kill. `seen` tells how many there were."""
    with _armed(("file", "write"), operations, Killed, monkeypatch, is_over=True) as watch, suppress(Killed):
        yield watch


FAULTS: dict[str, tuple[tuple[str, ...], Callable[[], BaseException] | None]] = {
    "full disk": (("file", "write"), lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    "broken disk": (("file", "write"), lambda: OSError(errno.EIO, os.strerror(errno.EIO))),
    "no memory": (("memory",), MemoryError),
    "torch without memory": (
        ("memory",),
        lambda: RuntimeError("alloc_cpu: can't allocate memory"),
    ),
    "short write": (("write",), None),
}


@contextmanager
def failing_after(operations: int, fault: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Watch]:
    """Let so many operations work, the next one meet a fault, and the others work."""
    kinds, error = FAULTS[fault]
    with _armed(kinds, operations, error, monkeypatch) as watch:
        yield watch
