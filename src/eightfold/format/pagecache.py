"""Large files pass through the page cache without filling it.

A kernel keeps what is read and written until memory is short. For files larger than memory that is of no use to anyone,
and finding new pages was measured to take longer than the disk does (docs/scale.md). So what has been used is dropped,
and what is written goes to the disk at once, a window behind the writer. Where a system has no such calls nothing
happens.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
from collections.abc import Callable

# Written bytes are handed to the disk in windows of this size. Smaller ones cost seeks, larger ones memory: three are
# on their way at most.
WINDOW = 64 << 20

# Of fcntl.h: wait for what is being written, begin to write, wait again.
_BEGIN, _FINISH = 2, 7


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    function = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
    if function is None:
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    call: Callable[[int, int, int, int], int] = function
    return call


def whole_pages(begin: int, end: int) -> tuple[int, int]:
    """Return the begin and the length of the pages that lie wholly between two offsets."""
    first, last = -(-begin // mmap.PAGESIZE), end // mmap.PAGESIZE
    return first * mmap.PAGESIZE, max(0, last - first) * mmap.PAGESIZE


def drop(file: int, begin: int, end: int) -> None:
    """Let the kernel forget what it holds of an open file, in whole pages; what is not on disk yet stays."""
    at, length = whole_pages(begin, end)
    if length and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, at, length, os.POSIX_FADV_DONTNEED)


def _require(result: int) -> None:
    """Raise what a call has failed with, unless the system cannot do it with such a file."""
    error = ctypes.get_errno()
    if result < 0 and error not in (errno.ENOSYS, errno.EINVAL, errno.ESPIPE, errno.EPERM, errno.EINTR):
        raise OSError(error, os.strerror(error))


class WriteBehind:
    """Sends what is written to the disk a window behind the writer, and drops it from memory.

    An error of the disk is raised here: whoever waits for writing is told of it, and fsync then is not told again.
    """

    def __init__(self, file: int, window: int = WINDOW) -> None:
        self._file, self._window = file, window
        self._open: list[tuple[int, int]] = []  # (begin, end) of what was written since the last window
        self._begun: list[tuple[int, int]] = []  # the window before
        self._nbytes = 0

    def wrote(self, begin: int, end: int) -> None:
        """Take note of bytes that were written."""
        if self._open and self._open[-1][1] == begin:
            self._open[-1] = self._open[-1][0], end
        else:
            self._open.append((begin, end))
        self._nbytes += end - begin
        if self._nbytes >= self._window:
            self._turn()

    def _turn(self) -> None:
        sync = _sync_file_range()
        if sync is not None:
            for begin, end in self._open:
                _require(sync(self._file, begin, end - begin, _BEGIN))
            for begin, end in self._begun:
                _require(sync(self._file, begin, end - begin, _FINISH))
                drop(self._file, begin, end)
        self._open, self._begun, self._nbytes = [], self._open, 0
