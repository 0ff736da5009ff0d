"""Weights as shards with their index, and JSON files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from eightfold.config import DType
from eightfold.format.output import write_json
from eightfold.format.safetensors import PlannedTensor, read_header
from eightfold.format.writer import ShardedWriter, split_shards, total_bytes
from tests.refusal import quantize_refused

W8A16 = ["--scheme", "w8a16"]


def tensor(name: str, nbytes: int) -> PlannedTensor:
    return PlannedTensor(name, DType.I8, (nbytes,))


def names(shards: list[list[PlannedTensor]]) -> list[str]:
    return ["".join(tensor.name for tensor in shard) for shard in shards]


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
    assert total_bytes(plan) == 6 * (4 + 2 + 2 + 8 + 4 + 1)


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


# --- JSON


def test_json_is_indented_unescaped_and_ends_with_a_newline(tmp_path):
    write_json(tmp_path / "f.json", {"a": ["é"]})
    assert (tmp_path / "f.json").read_text(encoding="utf-8") == '{\n    "a": [\n        "é"\n    ]\n}\n'


def test_half_a_surrogate_pair_survives_as_an_escape(tmp_path):
    write_json(tmp_path / "f.json", {"a": "\ud800"})
    assert (tmp_path / "f.json").read_bytes() == b'{\n    "a": "\\ud800"\n}\n'
    assert json.loads((tmp_path / "f.json").read_bytes()) == {"a": "\ud800"}
