"""What passes through the page cache: the same bytes on disk, and none kept in memory."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys

import numpy as np
import pytest

from eightfold.config import DType
from eightfold.format import pagecache
from eightfold.format.pagecache import WriteBehind, drop, whole_pages
from eightfold.format.safetensors import FileWriter, MappedFile, PlannedTensor, read_header

PAGE = mmap.PAGESIZE


def cached_pages(path) -> int:
    """Return how many pages of a file the kernel holds."""
    size = path.stat().st_size
    pages = -(-size // PAGE)
    seen = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), seen) == 0
    return sum(flag & 1 for flag in seen)


@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [
        (0, PAGE, (0, PAGE)),
        (1, PAGE, (PAGE, 0)),
        (1, 3 * PAGE - 1, (PAGE, PAGE)),
        (PAGE, PAGE, (PAGE, 0)),
        (10, 20, (PAGE, 0)),
    ],
)
def test_whole_pages(begin, end, expected):
    assert whole_pages(begin, end) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="the calls are Linux's")
def test_what_is_written_in_windows_is_on_disk_and_not_in_memory(tmp_path):
    path = tmp_path / "file"
    data = np.random.default_rng(0).integers(0, 256, 64 * PAGE, np.uint8).tobytes()
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    behind = WriteBehind(file, window=8 * PAGE)
    for at in range(0, len(data), PAGE):
        os.pwrite(file, data[at : at + PAGE], at)
        behind.wrote(at, at + PAGE)
    held = cached_pages(path)
    os.close(file)
    assert path.read_bytes() == data
    if os.statvfs(tmp_path).f_fsid:  # a file system in memory has no other place for its pages
        assert held <= 16  # the last two of eight windows of 8 pages


def test_writing_goes_on_where_the_system_has_no_such_call(tmp_path, monkeypatch):
    monkeypatch.setattr(pagecache, "_sync_file_range", lambda: None)
    monkeypatch.delattr(os, "posix_fadvise")
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    behind = WriteBehind(file, window=2)
    for at in range(6):
        os.pwrite(file, b"x", at)
        behind.wrote(at, at + 1)
    drop(file, 0, 6)
    os.close(file)
    assert (tmp_path / "file").read_bytes() == b"xxxxxx"


def test_neighbouring_writes_become_one_range_and_windows_turn(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(pagecache, "_sync_file_range", lambda: lambda *words: calls.append(words) or 0)
    behind = WriteBehind(-1, window=100)
    monkeypatch.setattr(pagecache, "drop", lambda *words: calls.append(("drop", *words)))
    for begin, end in ((0, 30), (30, 60), (500, 540)):
        behind.wrote(begin, end)
    assert calls == [(-1, 0, 60, 2), (-1, 500, 40, 2)]
    calls.clear()
    behind.wrote(60, 160)
    assert calls == [
        (-1, 60, 100, 2),
        (-1, 0, 60, 7),
        ("drop", -1, 0, 60),
        (-1, 500, 40, 7),
        ("drop", -1, 500, 540),
    ]


@pytest.mark.parametrize(("error", "raised"), [(errno.ENOSPC, True), (errno.EIO, True), (errno.EINVAL, False)])
def test_an_error_of_the_disk_is_told_and_not_swallowed(tmp_path, monkeypatch, error, raised):
    def fails(*_: int) -> int:
        ctypes.set_errno(error)
        return -1

    monkeypatch.setattr(pagecache, "_sync_file_range", lambda: fails)
    with (tmp_path / "f").open("wb") as file:
        behind = WriteBehind(file.fileno(), window=4)
        if not raised:
            behind.wrote(0, 4)
            return
        with pytest.raises(OSError) as found:
            behind.wrote(0, 4)
        assert found.value.errno == error


def test_a_tensor_in_pieces_is_the_same_file(tmp_path):
    plan = [PlannedTensor("a", DType.F32, (64, 33)), PlannedTensor("b", DType.I8, (5,))]
    values = np.arange(64 * 33, dtype=np.float32).reshape(64, 33)
    whole, pieces = FileWriter(tmp_path / "whole", plan), FileWriter(tmp_path / "pieces", plan)
    whole.write("a", values)
    for at in (0, 7, 63):
        pieces.append("a", values[at : {0: 7, 7: 63, 63: 64}[at]])
    for writer in (whole, pieces):
        writer.write("b", np.ones(5, np.int8))
        writer.close()
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "pieces").read_bytes()


def test_released_pages_are_read_again(tmp_path):
    path = tmp_path / "file"
    writer = FileWriter(path, [PlannedTensor("a", DType.F32, (64, 1024))])
    values = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
    writer.write("a", values)
    writer.sync()
    writer.close()
    info = read_header(path)["a"]
    mapped = MappedFile(path)
    assert np.array_equal(mapped.array(info), values)
    mapped.release(info.begin, info.end)
    if os.statvfs(tmp_path).f_fsid and sys.platform == "linux":
        assert cached_pages(path) <= 2  # those at the ends, which are not wholly the tensor's
    assert np.array_equal(mapped.array(info), values)
