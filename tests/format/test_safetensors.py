"""The safetensors container against the reference library, in both directions."""

from __future__ import annotations

import json
import mmap
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from eightfold import machine
from eightfold.config import DType
from eightfold.errors import CheckpointError
from eightfold.format.safetensors import MappedFile, numpy_dtype, read_header
from eightfold.format.shards import PlannedTensor, ShardedWriter

TORCH = {
    DType.F32: torch.float32,
    DType.F16: torch.float16,
    DType.BF16: torch.bfloat16,
    DType.I64: torch.int64,
    DType.I32: torch.int32,
    DType.I8: torch.int8,
    DType.F8_E4M3: torch.float8_e4m3fn,
}

# The property test of the container: name, dtype, shape, and a seed for the bytes.
PLANS = st.lists(
    st.tuples(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
            lambda n: n != "__metadata__"
        ),
        st.sampled_from(list(DType)),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda tensor: tensor[0],
)


def random_array(dtype: DType, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    count = int(np.prod(shape)) * dtype.itemsize
    return np.random.default_rng(seed).integers(0, 256, count, np.uint8).view(numpy_dtype(dtype)).reshape(shape)


def write(path: Path, arrays: dict[str, tuple[DType, np.ndarray]], order: list[str] | None = None) -> None:
    plan = [PlannedTensor(name, dtype, array.shape) for name, (dtype, array) in arrays.items()]
    writer = ShardedWriter(path.parent, path.stem, plan)
    for name in order or list(arrays):
        writer.write(name, arrays[name][1])
    writer.close()


def read(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    file = MappedFile(path)
    return {n: (info.dtype, info.shape, file.array(info).tobytes()) for n, info in read_header(path).items()}


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", list(DType))
def test_a_tensor_that_the_library_wrote_reads_back(tmp_path, dtype):
    tensor = torch.from_numpy(random_array(DType.I64, (3, 10))).view(TORCH[dtype])
    save_file({"w": tensor}, str(tmp_path / "f.safetensors"), metadata={"format": "pt"})
    assert read(tmp_path / "f.safetensors") == {"w": (dtype.value, tuple(tensor.shape), raw_bytes(tensor))}


@pytest.mark.parametrize("dtype", list(DType))
def test_the_library_reads_what_the_writer_wrote(tmp_path, dtype):
    array = random_array(dtype, (3, 5))
    write(tmp_path / "f.safetensors", {"w": (dtype, array)})
    (name, tensor), *rest = load_file(str(tmp_path / "f.safetensors")).items()
    assert (name, tensor.dtype, tuple(tensor.shape), rest) == ("w", TORCH[dtype], (3, 5), [])
    assert raw_bytes(tensor) == array.tobytes()


def test_bfloat16_arrays_are_the_bit_patterns(tmp_path):
    save_file({"w": torch.tensor([1.0, -2.0], dtype=torch.bfloat16)}, str(tmp_path / "f.safetensors"))
    (info,) = read_header(tmp_path / "f.safetensors").values()
    array = MappedFile(tmp_path / "f.safetensors").array(info)
    assert array.dtype == np.uint16
    assert array.tolist() == [0x3F80, 0xC000]


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 4, 2), (1,)])
def test_scalars_and_empty_tensors_survive_both_ways(tmp_path, shape):
    arrays = {"before": (DType.I8, random_array(DType.I8, (3,))), "odd": (DType.F32, random_array(DType.F32, shape))}
    write(tmp_path / "ours.safetensors", arrays)
    theirs = load_file(str(tmp_path / "ours.safetensors"))
    assert tuple(theirs["odd"].shape) == shape
    save_file(theirs, str(tmp_path / "theirs.safetensors"))
    assert read(tmp_path / "theirs.safetensors") == read(tmp_path / "ours.safetensors")
    assert read(tmp_path / "ours.safetensors")["odd"] == ("F32", shape, arrays["odd"][1].tobytes())


@pytest.mark.parametrize("name", ["层.0.权重", "a b\tc", 'quote"back\\slash', "emoji \N{GRINNING FACE}", "\x00"])
def test_any_name_survives_both_ways(tmp_path, name):
    write(tmp_path / "ours.safetensors", {name: (DType.I8, random_array(DType.I8, (2,)))})
    theirs = load_file(str(tmp_path / "ours.safetensors"))
    assert list(theirs) == [name]
    save_file(theirs, str(tmp_path / "theirs.safetensors"))
    assert list(read_header(tmp_path / "theirs.safetensors")) == [name]


def test_every_tensor_starts_at_a_multiple_of_its_element_size(tmp_path):
    order = [DType.I8, DType.F32, DType.BF16, DType.I64, DType.I8, DType.F16, DType.I32]
    path = tmp_path / "f.safetensors"
    write(path, {f"t{i}": (dtype, random_array(dtype, (3,))) for i, dtype in enumerate(order)})
    infos = read_header(path)
    assert len(infos) == len(order)
    assert [info.name for info in infos.values() if info.begin % DType(info.dtype).itemsize] == []


def test_tensors_of_whole_cache_lines_start_at_one(tmp_path):
    sizes = [1, 64, 3, 128, 5, 192]
    path = tmp_path / "f.safetensors"
    write(path, {f"t{i}": (DType.I8, random_array(DType.I8, (size,))) for i, size in enumerate(sizes)})
    begins = {info.name: info.begin for info in read_header(path).values()}
    assert [begins[f"t{i}"] % 64 for i in (1, 3, 5)] == [0, 0, 0]


@pytest.mark.parametrize("extra", range(0, 64, 9))
def test_the_header_is_padded_with_spaces_to_a_cache_line(tmp_path, extra):
    path = tmp_path / "f.safetensors"
    write(path, {"n" * (1 + extra): (DType.I8, random_array(DType.I8, (3,)))})
    blob = path.read_bytes()
    length = int.from_bytes(blob[:8], "little")
    assert (8 + length) % 64 == 0
    assert len(blob) == 8 + length + 3
    header = blob[8 : 8 + length]
    assert header.rstrip(b" ").endswith(b"}")
    assert len(header) - len(header.rstrip(b" ")) < 64


def test_the_header_has_no_metadata_unless_given(tmp_path):
    write(tmp_path / "f.safetensors", {"w": (DType.I8, random_array(DType.I8, (1,)))})
    assert b"__metadata__" not in (tmp_path / "f.safetensors").read_bytes()


def test_metadata_reaches_the_library_and_is_no_tensor_to_the_reader(tmp_path):
    ShardedWriter(tmp_path, "f", [], metadata={"format": "pt"}).close()
    with safe_open(str(tmp_path / "f.safetensors"), "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert read_header(tmp_path / "f.safetensors") == {}


@settings(max_examples=60, deadline=None)
@given(plan=PLANS, random=st.randoms())
def test_whatever_is_planned_is_read_back_by_us_and_by_the_library(plan, random):
    arrays = {name: (dtype, random_array(dtype, shape, seed)) for seed, (name, dtype, shape) in enumerate(plan)}
    order = list(arrays)
    random.shuffle(order)
    expected = {name: (dtype.value, array.shape, array.tobytes()) for name, (dtype, array) in arrays.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "f.safetensors")
        write(path, arrays, order)
        assert read(path) == expected
        theirs = load_file(str(path))
    types = {TORCH[dtype]: dtype.value for dtype in DType}
    assert {n: (types[t.dtype], tuple(t.shape), raw_bytes(t)) for n, t in theirs.items()} == expected


@settings(max_examples=150, deadline=None)
@given(cut=st.integers(0, 400), at=st.integers(0, 200), junk=st.binary(max_size=12))
def test_a_damaged_file_is_refused_or_still_lies_inside_itself(cut, at, junk):
    arrays = {"a": (DType.F32, random_array(DType.F32, (2, 3))), "b": (DType.I8, random_array(DType.I8, (5,)))}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "f.safetensors")
        write(path, arrays)
        blob = path.read_bytes()
        blob = (blob[:at] + junk + blob[at + len(junk) :])[: cut or None]
        path.write_bytes(blob)
        try:
            infos = read_header(path)
        except CheckpointError as error:
            assert path.name in str(error)
        else:
            assert all(8 <= info.begin <= info.end <= len(blob) for info in infos.values())


def test_a_mapped_array_can_be_changed_and_the_file_cannot(tmp_path):
    path = tmp_path / "f.safetensors"
    write(path, {"w": (DType.I8, random_array(DType.I8, (5,)))})
    before = path.read_bytes()
    path.chmod(0o400)
    array = MappedFile(path).array(read_header(path)["w"])
    array += 1
    assert path.read_bytes() == before


def test_a_released_tensor_reads_the_same_again(tmp_path):
    path = tmp_path / "f.safetensors"
    stored = random_array(DType.I32, (3 * mmap.PAGESIZE,))
    write(path, {"pad": (DType.I8, random_array(DType.I8, (5,))), "w": (DType.I32, stored)})
    file, info = MappedFile(path), read_header(path)["w"]
    array = file.array(info)
    assert np.array_equal(array, stored)
    file.release(info.begin, info.end)
    assert np.array_equal(array, stored)
    assert np.array_equal(file.array(info), stored)


def test_release_lets_go_of_the_tensor_and_of_no_byte_of_its_neighbours(tmp_path):
    path = tmp_path / "f.safetensors"
    write(path, {n: (DType.I8, random_array(DType.I8, (2 * mmap.PAGESIZE + 100,), i)) for i, n in enumerate("abc")})
    file, infos = MappedFile(path), read_header(path)
    # Changes live only in memory: a page that is let go of shows the file's bytes again.
    for name in "abc":
        file.array(infos[name])[:] = 7
    file.release(infos["b"].begin, infos["b"].end)
    assert {int(value) for name in "ac" for value in np.unique(file.array(infos[name]))} == {7}
    assert (file.array(infos["b"]) != 7).sum() > mmap.PAGESIZE // 2


def test_a_transposed_array_is_written_in_its_own_order(tmp_path):
    array = random_array(DType.I32, (3, 4)).T
    write(tmp_path / "f.safetensors", {"w": (DType.I32, array)})
    assert load_file(str(tmp_path / "f.safetensors"))["w"].tolist() == array.tolist()


def test_tensors_come_in_the_order_of_the_header(tmp_path):
    header = {n: {"dtype": "I8", "shape": [1], "data_offsets": [i, i + 1]} for n, i in (("z", 1), ("a", 0))}
    blob = json.dumps(header).encode()
    (tmp_path / "f.safetensors").write_bytes(len(blob).to_bytes(8, "little") + blob + b"xy")
    infos = read_header(tmp_path / "f.safetensors")
    assert list(infos) == ["z", "a"]
    assert [info.begin - 8 - len(blob) for info in infos.values()] == [1, 0]


def test_a_file_larger_than_all_memory_is_mapped(tmp_path):
    path, size = tmp_path / "f", 4 * (machine.total_bytes() or 1 << 34)
    with path.open("wb") as file:
        file.truncate(size)  # it takes no room on the disk
    assert MappedFile(path).raw(size - 2, size).tolist() == [0, 0]
