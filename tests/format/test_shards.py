"""Weights as shards with their index: whole, in pieces, gone on with, and never all in memory."""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from eightfold.config import DType
from eightfold.errors import CheckpointError, OutputError
from eightfold.format import shards
from eightfold.format.safetensors import MappedFile, checksum_of_file, drop, read_header
from eightfold.format.shards import PlannedTensor, ShardedWriter, WriteBehind, split_shards, total_bytes
from tests.refusal import quantize_refused, snapshot

W8A16 = ["--scheme", "w8a16"]
PAGE = mmap.PAGESIZE


def tensor(name: str, nbytes: int) -> PlannedTensor:
    return PlannedTensor(name, DType.I8, (nbytes,))


def names(parts: list[list[PlannedTensor]]) -> list[str]:
    return ["".join(tensor.name for tensor in shard) for shard in parts]


# --- shards


@pytest.mark.parametrize(
    ("sizes", "part_bytes", "expected"),
    [
        ((4, 4, 4), None, ["abc"]),
        ((4, 4, 4), 100, ["abc"]),
        ((4, 4, 4), 12, ["ab", "c"]),  # a shard stays below the limit: reaching it starts a new one
        ((4, 4, 4), 13, ["abc"]),
        ((4, 4, 4), 9, ["ab", "c"]),
        ((4, 4, 4), 8, ["a", "b", "c"]),
        ((9, 1, 1), 5, ["a", "bc"]),  # a tensor above the limit stands alone
        ((1, 9, 1), 5, ["a", "b", "c"]),
        ((4, 4), 1, ["a", "b"]),
        ((0, 4, 0), 4, ["a", "b", "c"]),
        ((4, 1, 4, 1), 5, ["a", "b", "c", "d"]),
    ],
)
def test_a_shard_ends_before_the_tensor_that_would_reach_the_limit(sizes, part_bytes, expected):
    plan = [tensor(name, size) for name, size in zip("abcd", sizes, strict=False)]
    assert names(split_shards(plan, part_bytes)) == expected


def test_total_bytes_adds_up_the_data_of_all_dtypes():
    plan = [PlannedTensor(dtype.value, dtype, (2, 3)) for dtype in DType]
    assert total_bytes(plan) == 6 * (4 + 2 + 2 + 8 + 4 + 1 + 1)


def write_sharded(directory: Path, sizes: dict[str, int], part_bytes: int | None) -> None:
    writer = ShardedWriter(
        directory,
        "model",
        [tensor(name, size) for name, size in sizes.items()],
        part_bytes=part_bytes,
        metadata={"format": "pt"},
    )
    for i, (name, size) in enumerate(sizes.items()):
        writer.write(name, np.full(size, i, np.int8))
    writer.close()


def test_without_a_part_size_there_is_one_file_and_no_index(tmp_path):
    write_sharded(tmp_path, {"a": 3, "b": 5}, None)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert {name: t.tolist() for name, t in load_file(str(tmp_path / "model.safetensors")).items()} == {
        "a": [0] * 3,
        "b": [1] * 5,
    }


def test_shards_are_numbered_and_the_index_names_each_tensors_file(tmp_path):
    write_sharded(tmp_path, {"a": 3, "b": 5, "c": 1}, 7)
    first, second, index = sorted(tmp_path.iterdir())
    assert first.name == "model-00001-of-00002.safetensors"
    assert second.name == "model-00002-of-00002.safetensors"
    assert index.name == "model.safetensors.index.json"
    assert json.loads(index.read_text()) == {
        "metadata": {"total_size": 9},
        "weight_map": {"a": first.name, "b": second.name, "c": second.name},
    }
    assert sorted(read_header(first)) == ["a"]
    assert sorted(read_header(second)) == ["b", "c"]
    for shard in (first, second):
        with safe_open(str(shard), "pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_a_part_size_that_is_never_reached_still_numbers_and_indexes(tmp_path):
    write_sharded(tmp_path, {"a": 3}, 1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    ]


def test_quantize_splits_and_the_result_holds_the_same_tensors(cli, tmp_path, float_model):
    assert cli("quantize", float_model, tmp_path / "one", *W8A16).code == 0
    assert cli("quantize", float_model, tmp_path / "many", *W8A16, "--part-size-gb", 3e-5).code == 0
    parts = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(parts) > 2
    assert parts[0].name == f"quant_model_weight_w8a16-00001-of-{len(parts):05d}.safetensors"
    assert all(sum(info.nbytes for info in read_header(part).values()) < 3e-5 * 2**30 for part in parts)
    joined = {name: t for part in parts for name, t in load_file(str(part)).items()}
    whole = load_file(str(tmp_path / "one" / "quant_model_weight_w8a16.safetensors"))
    assert joined.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(whole[name], joined[name])] == []


@pytest.mark.parametrize("size", ["inf", "1e308"])
def test_a_part_size_without_end_is_refused(cli, float_model, size):
    message = quantize_refused(cli, float_model, "--part-size-gb", size)
    assert message == f"--part-size-gb: got {size}, expected a finite number above 0. Try: eightfold quantize --help"


# --- one file, and going on with it


PLAN = [PlannedTensor("w", DType.I8, (64,)), PlannedTensor("b", DType.F32, (3,)), PlannedTensor("e", DType.I8, (0,))]
ARRAYS: dict[str, np.ndarray] = {
    "w": np.arange(64, dtype=np.int8),
    "b": np.array([1, 2, 3], np.float32),
    "e": np.zeros(0, np.int8),
}


@pytest.mark.parametrize("part_bytes", [None, 20])
@pytest.mark.parametrize("short", [False, True])
def test_files_go_on_where_another_writer_stopped(tmp_path, monkeypatch, part_bytes, short):
    """In pieces, of which the system may write less than it is given."""
    (tmp_path / "whole").mkdir()
    one = ShardedWriter(tmp_path / "whole", "f", PLAN, part_bytes=part_bytes)
    for name, array in ARRAYS.items():
        one.write(name, array)
    one.close()
    (tmp_path / "out").mkdir()
    if short:
        pwrite = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, data[:7], at))
    first = ShardedWriter(tmp_path / "out", "f", PLAN, part_bytes=part_bytes)
    for at in range(0, 64, 10):
        first.append("w", ARRAYS["w"][at : at + 10])
    first.sync()
    first.abandon()
    assert first.checksums == {"w": zlib.crc32(ARRAYS["w"])}  # type: ignore[arg-type]
    second = ShardedWriter(tmp_path / "out", "f", PLAN, part_bytes=part_bytes, resume=True)
    assert second.take_over("w") == first.checksums["w"]
    second.write("b", ARRAYS["b"])
    second.write("e", ARRAYS["e"])
    second.close()
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
    checksums = {path.name: checksum_of_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert second.file_checksums() == one.file_checksums() == checksums


@pytest.mark.parametrize("at", [3, 30, -70, -1])
def test_any_changed_byte_changes_the_checksum_of_a_file_or_is_an_error(tmp_path, at):
    writer = ShardedWriter(tmp_path, "f", PLAN)
    for name, array in ARRAYS.items():
        writer.write(name, array)
    writer.close()
    path = tmp_path / "f.safetensors"
    blob = bytearray(path.read_bytes())
    blob[at] ^= 1
    path.write_bytes(blob)
    try:
        assert checksum_of_file(path) != writer.file_checksums()[path.name]
    except CheckpointError:
        assert at in (3, 30)


@pytest.mark.parametrize(
    ("left", "got"), [(None, "no such file"), (b"", "another header"), (b"x" * 999, "another header")]
)
def test_a_file_of_another_plan_is_not_gone_on_with(tmp_path, left, got):
    path = tmp_path / "f.safetensors"
    if left is not None:
        path.write_bytes(left)
    with pytest.raises(OutputError) as error:
        ShardedWriter(tmp_path, "f", PLAN, resume=True)
    assert str(error.value) == (
        f"weights to go on with in {path}: got {got}, expected what an earlier run has begun. "
        "Delete the directory with this file, and start again."
    )


def test_an_existing_file_is_never_written_over(tmp_path):
    (tmp_path / "f.safetensors").write_text("mine")
    with pytest.raises(FileExistsError):
        ShardedWriter(tmp_path, "f", PLAN)
    assert (tmp_path / "f.safetensors").read_text() == "mine"


def test_a_planned_tensor_that_was_never_written_is_caught_at_the_end(tmp_path):
    writer = ShardedWriter(tmp_path, "f", PLAN)
    with pytest.raises(AssertionError, match=r"never written: \['w', 'b', 'e'\]"):
        writer.close()
    writer.abandon()


@pytest.mark.parametrize("array", [np.zeros(3, np.int8), np.zeros(64, np.int32)])
def test_an_array_that_is_not_as_planned_is_caught(tmp_path, array):
    writer = ShardedWriter(tmp_path, "f", PLAN)
    with pytest.raises(AssertionError, match="w"):
        writer.write("w", array)
    writer.abandon()


# --- what passes through the page cache


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
    monkeypatch.setattr(shards, "_sync_file_range", lambda: None)
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
    monkeypatch.setattr(shards, "_sync_file_range", lambda: lambda *words: calls.append(words) or 0)
    behind = WriteBehind(-1, window=100)
    monkeypatch.setattr(shards, "drop", lambda *words: calls.append(("drop", *words)))
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

    monkeypatch.setattr(shards, "_sync_file_range", lambda: fails)
    with (tmp_path / "f").open("wb") as file:
        behind = WriteBehind(file.fileno(), window=4)
        if not raised:
            behind.wrote(0, 4)
            return
        with pytest.raises(OSError) as found:
            behind.wrote(0, 4)
        assert found.value.errno == error


def test_released_pages_are_read_again(tmp_path):
    writer = ShardedWriter(tmp_path, "f", [PlannedTensor("a", DType.F32, (64, 1024))])
    values = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
    writer.write("a", values)
    writer.sync()
    writer.close()
    path = tmp_path / "f.safetensors"
    info, mapped = read_header(path)["a"], MappedFile(path)
    assert np.array_equal(mapped.array(info), values)
    mapped.release(info.begin, info.end)
    if os.statvfs(tmp_path).f_fsid and sys.platform == "linux":
        assert cached_pages(path) <= 2  # those at the ends, which are not wholly the tensor's
    assert np.array_equal(mapped.array(info), values)
