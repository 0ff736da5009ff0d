"""Damaged and lying safetensors files: one line that says what is wrong, and nothing written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hostile import Q_PROJ, shard
from tests.refusal import both_refused, error_line

AGAIN = "The file is damaged; fetch or write it again."
SHAPE = [64, 48]
NBYTES = 64 * 48 * 2


def read_parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return a safetensors file's header and data."""
    blob = path.read_bytes()
    length = int.from_bytes(blob[:8], "little")
    return json.loads(blob[8 : 8 + length]), blob[8 + length :]


def write_parts(path: Path, header: object, data: bytes) -> None:
    """Write a safetensors file with any header: an object, or its bytes."""
    blob = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(blob).to_bytes(8, "little") + blob + data)


@pytest.fixture
def relabel(weights) -> Callable[..., None]:
    """Change the header entry of q_proj (or another tensor) and leave the data."""

    def change(name: str = Q_PROJ, **fields: Any) -> None:
        header, data = read_parts(weights)
        header[name] = {key: value for key, value in {**header[name], **fields}.items() if value is not ...}
        write_parts(weights, header, data)

    return change


# --- files


def test_missing_shards_are_listed(cli, float_model):
    shards = shard(float_model)
    shards[1].unlink()
    assert both_refused(cli, float_model) == (
        f"1 shard is missing of 2 in {float_model}: got no model-00002-of-00002.safetensors, "
        "expected every file that the index names. Fetch the missing files."
    )


@pytest.mark.parametrize("lost", [1, 1000])
def test_a_truncated_shard_is_found_without_reading_it(cli, float_model, lost):
    path = shard(float_model)[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])
    assert both_refused(cli, float_model) == (
        f"{path.name} is truncated in {float_model}: got {len(whole) - lost} bytes, expected {len(whole)}. {AGAIN}"
    )


def test_bytes_after_the_last_tensor_are_refused(cli, float_model, weights):
    whole = weights.read_bytes()
    weights.write_bytes(whole + b"x")
    assert both_refused(cli, float_model) == (
        f"model.safetensors is followed by bytes that belong to no tensor in {float_model}: "
        f"got {len(whole) + 1} bytes, expected {len(whole)}. {AGAIN}"
    )


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_too_short_for_a_header_is_refused(cli, float_model, weights, size):
    weights.write_bytes(b"\x01" * size)
    announced = int.from_bytes(b"\x01" * size, "little")
    assert both_refused(cli, float_model) == (
        f"header in {weights}: got {announced} bytes announced in a file of {size}, "
        f"expected a header inside the file. {AGAIN}"
    )


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 10**9])
def test_a_huge_announced_header_is_refused_without_reading_it(cli, float_model, weights, length):
    data = weights.read_bytes()[8:]
    weights.write_bytes(length.to_bytes(8, "little") + data)
    assert both_refused(cli, float_model) == (
        f"header in {weights}: got {length} bytes announced in a file of {8 + len(data)}, "
        f"expected a header inside the file. {AGAIN}"
    )


def test_a_header_above_the_limit_is_refused_though_the_file_is_that_long(cli, float_model, weights):
    with weights.open("r+b") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)  # sparse: takes no space on disk
    assert error_line(cli("inspect", float_model)) == (
        f"header in {weights}: got 100000001 bytes announced in a file of 200000000, "
        f"expected at most 67108864 bytes. {AGAIN}"
    )


@pytest.mark.parametrize("shift", [-40, -1, 1, 40])
def test_a_header_length_that_is_a_little_off_is_refused(cli, float_model, weights, shift):
    blob = weights.read_bytes()
    length = int.from_bytes(blob[:8], "little") + shift
    weights.write_bytes(length.to_bytes(8, "little") + blob[8:])
    message = both_refused(cli, float_model)
    assert message.startswith((f"header in {weights}: got ", "model.safetensors is "))
    assert re.search(rf"in {re.escape(str(float_model))}.*: got .*, expected .*again\.$", message)


@pytest.mark.parametrize("blob", [b"", b"   ", b"{", b"{'a': 1}", b"\xff" * 16, b"PK\x03\x04", b"[" * 100_000])
def test_a_header_that_is_no_json_is_refused(cli, float_model, weights, blob):
    write_parts(weights, blob, b"")
    message = both_refused(cli, float_model)
    assert message.startswith(f"header in {weights}: got ")
    assert message.endswith(", expected a JSON object. Fetch the file again.")


@pytest.mark.parametrize(("blob", "kind"), [(b"[]", "list"), (b"null", "NoneType"), (b"3", "int")])
def test_a_header_that_is_no_object_is_refused(cli, float_model, weights, blob, kind):
    write_parts(weights, blob, b"")
    assert (
        both_refused(cli, float_model)
        == f"header in {weights}: got a {kind}, expected a JSON object. Fetch the file again."
    )


def test_a_directory_in_the_place_of_a_file_is_refused(cli, float_model, weights):
    weights.unlink()
    weights.mkdir()
    assert both_refused(cli, float_model) == (
        f"model.safetensors in {float_model}: got a directory, expected a regular file"
    )


def test_a_link_to_nowhere_is_refused(cli, float_model, weights):
    weights.unlink()
    weights.symlink_to("gone")
    assert both_refused(cli, float_model) == (
        f"model.safetensors in {float_model}: got a link to gone, which is not there, expected a regular file. "
        "Fetch the model again."
    )


def test_no_weights_at_all_are_refused(cli, float_model, weights):
    weights.unlink()
    assert both_refused(cli, float_model) == (
        f"weights in {float_model}: got no *.safetensors, expected safetensors files"
    )


def test_pickles_are_never_read(cli, float_model, weights):
    weights.unlink()
    (float_model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    assert both_refused(cli, float_model) == (
        f"weights in {float_model}: got only pytorch_model.bin, expected safetensors files. "
        "Pickles can run code and are not read. "
        "Load it with transformers' AutoModelForCausalLM and write it with save_pretrained."
    )


# --- headers that lie


def test_a_tensor_twice_in_one_header_is_refused(cli, float_model, weights):
    header, data = read_parts(weights)
    text = json.dumps(header)
    write_parts(weights, (text[:-1] + f', "{Q_PROJ}": {json.dumps(header[Q_PROJ])}}}').encode(), data)
    assert both_refused(cli, float_model) == (f'key "{Q_PROJ}" in {weights}: got two values, expected one. Remove one.')


def test_overlapping_tensors_are_refused(cli, float_model, weights, relabel):
    header, _ = read_parts(weights)
    victim = header[Q_PROJ]["data_offsets"][0]
    assert victim > 0
    relabel(data_offsets=[victim - 2, victim - 2 + NBYTES])
    message = both_refused(cli, float_model)
    assert re.fullmatch(
        rf"data_offsets of {re.escape(Q_PROJ)} in {re.escape(str(weights))}: got a place that overlaps its neighbour, "
        rf"expected offset {victim}\. {re.escape(AGAIN)}",
        message,
    )


def test_two_tensors_in_the_same_place_are_refused(cli, float_model, weights, relabel):
    k_proj = read_parts(weights)[0]["model.layers.0.self_attn.o_proj.weight"]["data_offsets"]
    relabel("model.layers.1.self_attn.o_proj.weight", data_offsets=k_proj)
    message = both_refused(cli, float_model)
    assert "got a place that overlaps its neighbour, expected offset " in message
    assert f".self_attn.o_proj.weight in {weights}: " in message


def test_a_hole_between_tensors_is_refused(cli, float_model, weights):
    header, data = read_parts(weights)
    at = header[Q_PROJ]["data_offsets"][0]
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][0] >= at:
            entry["data_offsets"] = [offset + 2 for offset in entry["data_offsets"]]
    write_parts(weights, header, data[:at] + b"xx" + data[at:])
    assert both_refused(cli, float_model) == (
        f"data_offsets of {Q_PROJ} in {weights}: got a place that leaves a hole before it, "
        f"expected offset {at}. {AGAIN}"
    )


def test_a_hole_before_the_first_tensor_is_refused(cli, float_model, weights):
    write_parts(weights, {"a": {"dtype": "I8", "shape": [1], "data_offsets": [1, 2]}}, b"xy")
    assert both_refused(cli, float_model) == (
        f"data_offsets of a in {weights}: got a place that leaves a hole before it, expected offset 0. {AGAIN}"
    )


@pytest.mark.parametrize("end", [2, 10**6, 2**63 - 1])
def test_a_tensor_that_reaches_beyond_the_file_is_refused(cli, float_model, weights, end):
    write_parts(weights, {"a": {"dtype": "I8", "shape": [end], "data_offsets": [0, end]}}, b"x")
    size = weights.stat().st_size
    assert both_refused(cli, float_model) == (
        f"model.safetensors is truncated in {float_model}: got {size} bytes, expected {size - 1 + end}. {AGAIN}"
    )


@pytest.mark.parametrize(
    "offsets", [[-2, NBYTES - 2], [False, NBYTES], [0.0, NBYTES], ["0", "2"], [0], [0, 1, 2], [], None, {}, "ab"]
)
def test_offsets_that_are_no_two_sizes_are_refused(cli, float_model, weights, relabel, offsets):
    relabel(data_offsets=offsets)
    assert both_refused(cli, float_model) == (
        f"data_offsets of {Q_PROJ} in {weights}: got {offsets!r}, expected two byte offsets below 2^63. {AGAIN}"
    )


@pytest.mark.parametrize("offsets", [[0, 2], [0, 0], [NBYTES, 0]])
def test_offsets_that_do_not_fit_the_shape_are_refused(cli, float_model, weights, relabel, offsets):
    relabel(data_offsets=offsets)
    assert both_refused(cli, float_model) == (
        f"data_offsets of {Q_PROJ} in {weights}: got {offsets[1] - offsets[0]} bytes, "
        f"expected {NBYTES} for BF16 {SHAPE}. {AGAIN}"
    )


@pytest.mark.parametrize("shape", [[64, -48], [64, True], [64, 48.0], ["64", 48], 3072, None, {}])
def test_a_shape_that_is_no_list_of_sizes_is_refused(cli, float_model, weights, relabel, shape):
    relabel(shape=shape)
    assert both_refused(cli, float_model) == (
        f"shape of {Q_PROJ} in {weights}: got {shape!r}, expected a list of sizes below 2^63. {AGAIN}"
    )


@pytest.mark.parametrize(
    ("shape", "end", "message"),
    [
        ([10**4000] * 400, 1, f"shape of a in {{}}: got [1{'0' * 55}..., expected a list of sizes below 2^63"),
        ([0, 2**63], 1, "shape of a in {}: got [0, 9223372036854775808], expected a list of sizes below 2^63"),
        ([1] * 9, 1, "shape of a in {}: got 9 dimensions, expected at most 8"),
        ([1], 2**63, "data_offsets of a in {}: got [0, 9223372036854775808], expected two byte offsets below 2^63"),
        ([2**62] * 8, 1, f"data_offsets of a in {{}}: got 1 bytes, expected {2**496} for I8 {[2**62] * 8}"),
    ],
)
def test_sizes_that_no_file_has_are_refused(cli, float_model, weights, shape, end, message):
    write_parts(weights, {"a": {"dtype": "I8", "shape": shape, "data_offsets": [0, end]}}, b"x")
    found = both_refused(cli, float_model)
    assert found.startswith(message.format(weights)[:300])
    assert found.endswith(AGAIN)
    assert len(found) < 1000


@pytest.mark.parametrize("dtype", ["F128", "bf16", 2, None, ["BF16"]])
def test_an_unknown_element_type_is_refused(cli, float_model, weights, relabel, dtype):
    relabel(dtype=dtype)
    assert both_refused(cli, float_model) == (
        f"dtype of {Q_PROJ} in {weights}: got {dtype!r}, expected a safetensors type name. {AGAIN}"
    )


@pytest.mark.parametrize("entry", [None, 3, [], "BF16"])
def test_an_entry_that_is_no_object_is_refused(cli, float_model, weights, entry):
    header, data = read_parts(weights)
    write_parts(weights, {**header, Q_PROJ: entry}, data)
    assert both_refused(cli, float_model) == (
        f"header entry of {Q_PROJ} in {weights}: got {entry!r}, "
        f"expected an object with dtype, shape and data_offsets. {AGAIN}"
    )


@pytest.mark.parametrize("missing", ["dtype", "shape", "data_offsets"])
def test_an_entry_without_one_of_its_fields_is_refused(cli, float_model, weights, relabel, missing):
    relabel(**{missing: ...})
    message = both_refused(cli, float_model)
    assert message.startswith(f"{missing} of {Q_PROJ} in {weights}: got None, expected ")


def test_control_characters_of_a_header_do_not_break_the_line(cli, float_model, weights):
    write_parts(weights, {"a\nb\r\u2028c\x85d": {"dtype": "BF16", "shape": "x\ny", "data_offsets": [0, 0]}}, b"")
    assert both_refused(cli, float_model) == (
        f"shape of a b c d in {weights}: got 'x\\ny', expected a list of sizes below 2^63. {AGAIN}"
    )
