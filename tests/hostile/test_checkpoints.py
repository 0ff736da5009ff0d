"""Damaged, lying and foreign model directories: one line that says what is wrong, and nothing written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import FAMILIES, tiny_config, write_model
from tests.refusal import both_refused, error_line, quantize_refused, refused

EMBEDDING = "model.embed_tokens.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"
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
def weights(float_model) -> Path:
    return float_model / "model.safetensors"


@pytest.fixture
def relabel(weights) -> Callable[..., None]:
    """Change the header entry of q_proj (or another tensor) and leave the data."""

    def change(name: str = Q_PROJ, **fields: Any) -> None:
        header, data = read_parts(weights)
        header[name] = {key: value for key, value in {**header[name], **fields}.items() if value is not ...}
        write_parts(weights, header, data)

    return change


@pytest.fixture
def replace(weights) -> Callable[..., None]:
    """Change the tensors of the model; None removes one."""

    def change(tensors: dict[str, torch.Tensor | None]) -> None:
        merged = {**load_file(str(weights)), **tensors}
        save_file({name: tensor for name, tensor in merged.items() if tensor is not None}, str(weights))

    return change


@pytest.fixture
def configure(float_model) -> Callable[..., None]:
    """Change config.json."""

    def change(**fields: Any) -> None:
        config = {key: value for key, value in tiny_config(**fields).items() if value is not ...}
        (float_model / "config.json").write_text(json.dumps(config))

    return change


def shard(directory: Path) -> list[Path]:
    """Split the model into two indexed shards; return them."""
    tensors = load_file(str(directory / "model.safetensors"))
    (directory / "model.safetensors").unlink()
    shards = [directory / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {name: shards[name.startswith("model.layers.1.")].name for name in tensors}
    for path in shards:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == path.name}, str(path))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return shards


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
        f"expected a header inside the file. {AGAIN}"
    )


@pytest.mark.parametrize("shift", [-40, -1, 1, 40])
def test_a_header_length_that_is_a_little_off_is_refused(cli, float_model, weights, shift):
    blob = weights.read_bytes()
    length = int.from_bytes(blob[:8], "little") + shift
    weights.write_bytes(length.to_bytes(8, "little") + blob[8:])
    message = both_refused(cli, float_model)
    assert message.startswith((f"header in {weights}: got no JSON (", "model.safetensors is "))
    assert re.search(rf"in {re.escape(str(float_model))}.*: got .*, expected .*\. {re.escape(AGAIN)}$", message)


@pytest.mark.parametrize("blob", [b"", b"   ", b"{", b"{'a': 1}", b"\xff" * 16, b"PK\x03\x04", b"[" * 100_000])
def test_a_header_that_is_no_json_is_refused(cli, float_model, weights, blob):
    write_parts(weights, blob, b"")
    message = both_refused(cli, float_model)
    assert message.startswith(f"header in {weights}: got no JSON (")
    assert message.endswith(f"), expected a JSON object. {AGAIN}")


@pytest.mark.parametrize(("blob", "kind"), [(b"[]", "list"), (b"null", "NoneType"), (b"3", "int")])
def test_a_header_that_is_no_object_is_refused(cli, float_model, weights, blob, kind):
    write_parts(weights, blob, b"")
    assert both_refused(cli, float_model) == f"header in {weights}: got a JSON {kind}, expected an object. {AGAIN}"


def test_a_directory_in_the_place_of_a_file_is_refused(cli, float_model, weights):
    weights.unlink()
    weights.mkdir()
    assert both_refused(cli, float_model) == f"cannot read {weights}: Is a directory"


def test_a_link_to_nowhere_is_refused(cli, float_model, weights):
    weights.unlink()
    weights.symlink_to("gone")
    assert both_refused(cli, float_model) == f"cannot read {weights}: No such file or directory"


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
        "Pickles can run code and are not read; save the model as safetensors first."
    )


# --- headers that lie


def test_a_tensor_twice_in_one_header_is_refused(cli, float_model, weights):
    header, data = read_parts(weights)
    text = json.dumps(header)
    write_parts(weights, (text[:-1] + f', "{Q_PROJ}": {json.dumps(header[Q_PROJ])}}}').encode(), data)
    assert both_refused(cli, float_model) == (
        f"tensor {Q_PROJ} in {weights}: got two entries in the header, expected one. {AGAIN}"
    )


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


@pytest.mark.parametrize("end", [2, 10**6, 2**63, 10**30])
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
        f"data_offsets of {Q_PROJ} in {weights}: got {offsets!r}, expected two byte offsets. {AGAIN}"
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
        f"shape of {Q_PROJ} in {weights}: got {shape!r}, expected a list of sizes. {AGAIN}"
    )


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
        f"shape of a b c d in {weights}: got 'x\\ny', expected a list of sizes. {AGAIN}"
    )


# --- tensors against config.json


@pytest.mark.parametrize("architecture", FAMILIES)
def test_all_missing_tensors_are_listed_together(cli, tmp_path, architecture):
    source = write_model(tmp_path / "float", tiny_config(architecture), tokenizer=False)
    tensors = load_file(str(source / "model.safetensors"))
    gone = ["model.layers.1.input_layernorm.weight", NORM, "model.layers.1.mlp.up_proj.weight"]
    gone += ["model.layers.0.self_attn.k_proj.bias"] if architecture == "Qwen2ForCausalLM" else []
    gone += ["model.layers.0.self_attn.q_norm.weight"] if architecture == "Qwen3ForCausalLM" else []
    save_file({n: t for n, t in tensors.items() if n not in gone}, str(source / "model.safetensors"))
    message = both_refused(cli, source)
    found = re.fullmatch(
        rf"{len(gone)} tensors are missing in {re.escape(str(source))}: got no (.*), "
        rf"expected all {len(tensors)} of {architecture}\. Fetch or write the directory again\.",
        message,
    )
    assert found
    assert sorted(found[1].split(", ")) == sorted(gone)


def test_many_missing_tensors_do_not_flood_the_terminal(cli, float_model, configure):
    configure(num_hidden_layers=100)
    message = both_refused(cli, float_model)
    assert message.startswith(f"882 tensors are missing in {float_model}: got no model.layers.2.input_layernorm.weight")
    assert message.endswith(" and 870 more, expected all 903 of LlamaForCausalLM. Fetch or write the directory again.")
    assert len(message) < 1000


def test_an_untied_model_without_a_head_is_refused(cli, float_model, replace):
    replace({"lm_head.weight": None})
    assert both_refused(cli, float_model) == (
        f"1 tensor is missing in {float_model}: got no lm_head.weight, expected all 21 of LlamaForCausalLM. "
        "Fetch or write the directory again."
    )


@pytest.mark.parametrize(
    ("name", "shape"),
    [(Q_PROJ, (48, 64)), (Q_PROJ, (64, 49)), (Q_PROJ, (64, 48, 1)), (EMBEDDING, (321, 48)), (NORM, (47,)), (NORM, ())],
)
def test_a_shape_that_config_json_does_not_say_is_refused(cli, float_model, weights, replace, name, shape):
    expected = list(load_file(str(weights))[name].shape)
    replace({name: torch.ones(shape, dtype=torch.bfloat16)})
    assert both_refused(cli, float_model) == (
        f"shape of {name} in {weights}: got {list(shape)}, expected {expected}. "
        "config.json and the weights belong to different models."
    )


def test_a_config_json_of_another_model_is_refused(cli, float_model, weights, configure):
    configure(intermediate_size=96)
    assert both_refused(cli, float_model) == (
        f"shape of model.layers.0.mlp.gate_proj.weight in {weights}: got [80, 48], expected [96, 48]. "
        "config.json and the weights belong to different models."
    )


@pytest.mark.parametrize("name", [Q_PROJ, EMBEDDING])
@pytest.mark.parametrize(
    ("dtype", "called"),
    [(torch.int8, "I8"), (torch.int32, "I32"), (torch.uint8, "U8"), (torch.float64, "F64"), (torch.bool, "BOOL")],
)
@pytest.mark.parametrize("said", ["bfloat16", ...], ids=["dtype", "no-dtype"])
def test_weights_of_a_type_no_float_model_has_are_refused(
    cli, float_model, weights, replace, configure, name, dtype, called, said
):
    replace({name: load_file(str(weights))[name].to(dtype)})
    configure(torch_dtype=said)
    assert both_refused(cli, float_model) == (
        f"dtype of {name} in {weights}: got {called}, expected F32, F16 or BF16. "
        "Start from float weights (F32, F16 or BF16)."
    )


def test_one_tensor_in_two_files_is_refused(cli, float_model, weights):
    save_file({Q_PROJ: torch.zeros(64, 48)}, str(float_model / "extra.safetensors"))
    weights.rename(float_model / "main.safetensors")
    assert both_refused(cli, float_model) == (
        f"tensor {Q_PROJ} in {float_model}: got it in extra.safetensors and in main.safetensors, "
        "expected it in one file. Remove the file that does not belong to this model."
    )


def test_one_tensor_in_two_shards_is_refused(cli, float_model):
    first, second = shard(float_model)
    save_file({**load_file(str(second)), Q_PROJ: torch.zeros(64, 48)}, str(second))
    assert both_refused(cli, float_model) == (
        f"tensor {Q_PROJ} in {float_model}: got it in {first.name} and in {second.name}, expected it in one file"
    )


# --- values


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
@pytest.mark.parametrize(
    ("name", "at", "place"),
    [
        (Q_PROJ, (5, 7), "[5, 7]"),
        ("model.layers.1.mlp.down_proj.weight", (47, 79), "[47, 79]"),
        (EMBEDDING, (319, 0), "[319, 0]"),
        (NORM, (7,), "[7, 0]"),
        ("model.layers.1.post_attention_layernorm.weight", (0,), "[0, 0]"),
        ("lm_head.weight", (0, 0), "[0, 0]"),
    ],
)
@pytest.mark.parametrize("value", ["nan", "-inf"])
def test_a_weight_that_is_no_finite_number_is_named(cli, float_model, weights, replace, scheme, name, at, place, value):
    tensor = load_file(str(weights))[name]
    tensor[at] = float(value)
    replace({name: tensor})
    assert cli("inspect", float_model).code == 0  # reads no weights
    options = ["--calib-texts", "hello"] if scheme == "w8a8" else []
    assert quantize_refused(cli, float_model, *options, scheme=scheme) == (
        f"{name}{place} in {weights}: got {value}, expected a finite number. "
        "The weights are damaged; fetch the model again."
    )


def test_a_bias_that_is_no_finite_number_is_named(cli, tmp_path):
    source = write_model(tmp_path / "float", tiny_config("Qwen2ForCausalLM"))
    tensors = load_file(str(source / "model.safetensors"))
    name = "model.layers.1.self_attn.v_proj.bias"
    tensors[name][3] = float("inf")
    save_file(tensors, str(source / "model.safetensors"))
    assert quantize_refused(cli, source) == (
        f"{name}[3, 0] in {source}/model.safetensors: got inf, expected a finite number. "
        "The weights are damaged; fetch the model again."
    )


# --- what is no model directory


def test_a_hub_id_is_recognized(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = (
        "no directory meta-llama/Llama-3.2-1B: got what looks like a hub id, expected a directory on this machine. "
        "Download it first: hf download meta-llama/Llama-3.2-1B --local-dir Llama-3.2-1B"
    )
    for command in (["inspect", "meta-llama/Llama-3.2-1B"], ["quantize", "meta-llama/Llama-3.2-1B", "out"]):
        options = ["--scheme", "w8a16"] if command[0] == "quantize" else []
        assert refused(cli, *command, *options, within=tmp_path) == expected


@pytest.mark.parametrize("name", ["gone", "a/b/gone", "./x/gone"])
def test_a_directory_that_does_not_exist_is_named(cli, tmp_path, name):
    assert both_refused(cli, tmp_path / name) == (
        f"no directory {tmp_path / name}: expected a model directory. Check the path."
    )


def test_a_file_in_the_place_of_a_directory_is_refused(cli, float_model, weights):
    assert both_refused(cli, weights) == (
        f"model in {weights}: got a file, expected a directory with config.json and safetensors files"
    )


def test_a_gguf_file_is_sent_to_its_importer(cli, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert both_refused(cli, tmp_path / "m.gguf") == (
        f"model in {tmp_path}/m.gguf: got a file, expected a directory with config.json and safetensors files. "
        "For a .gguf file run: eightfold import-gguf FILE DIR"
    )


# --- config.json


def test_a_missing_config_json_is_named(cli, float_model):
    (float_model / "config.json").unlink()
    assert both_refused(cli, float_model) == (f"config.json in {float_model}: got no such file, expected a JSON file")


def test_a_config_json_that_is_a_directory_is_refused(cli, float_model):
    (float_model / "config.json").unlink()
    (float_model / "config.json").mkdir()
    assert both_refused(cli, float_model) == f"Is a directory in {float_model}/config.json."


@pytest.mark.parametrize("content", [b"", b"{", b"not json", b"\xff\xfe\xff", b'{"a":' * 50_000])
def test_a_config_json_that_is_no_json_is_refused(cli, float_model, content):
    (float_model / "config.json").write_bytes(content)
    message = both_refused(cli, float_model)
    assert message.startswith(f"JSON in {float_model}/config.json: got ")
    assert message.endswith(", expected a JSON object. Fetch the file again.")


def test_a_config_json_that_is_no_object_is_refused(cli, float_model):
    (float_model / "config.json").write_text("[1, 2]")
    assert both_refused(cli, float_model) == f"JSON in {float_model}/config.json: got a list, expected an object"


def test_a_key_twice_in_config_json_is_refused(cli, float_model):
    text = (float_model / "config.json").read_text()
    (float_model / "config.json").write_text(text[:-1] + ', "num_hidden_layers": 1}')
    assert both_refused(cli, float_model) == (
        f'key "num_hidden_layers" in {float_model}/config.json: got two values, expected one. Remove one.'
    )


def test_a_boolean_layer_count_does_not_drop_layers(cli, float_model, configure):
    configure(num_hidden_layers=True)
    assert both_refused(cli, float_model) == (
        f'"num_hidden_layers" in {float_model}/config.json: got True, expected a valid integer'
    )


def test_a_billion_layers_are_refused_at_once(cli, float_model, configure):
    configure(num_hidden_layers=10**9)
    assert both_refused(cli, float_model) == (
        f'"num_hidden_layers" in {float_model}/config.json: got 1000000000, expected less than or equal to 10000'
    )


def test_fewer_layers_in_the_config_than_in_the_weights_are_refused(cli, float_model, configure):
    configure(num_hidden_layers=1)
    message = both_refused(cli, float_model)
    assert message.startswith(f"layers beyond config.json's 1 in {float_model}: got model.layers.1.")
    assert message.endswith("as many as config.json says. config.json and the weights belong to different models.")


def test_an_odd_head_dim_is_refused(cli, tmp_path):
    source = write_model(tmp_path / "float", tiny_config(head_dim=16), tokenizer=False)
    (source / "config.json").write_text(json.dumps(tiny_config(head_dim=15)))
    assert both_refused(cli, source) == (
        f'"head_dim" in {source}/config.json: got 15, expected an even number, as rotary embedding pairs columns'
    )


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "LlamaModel", "llamaforcausallm", "x\ny"])
def test_an_unknown_architecture_is_refused_with_the_known_ones(cli, float_model, configure, name):
    configure(architectures=[name])
    assert both_refused(cli, float_model) == (
        f"architecture in config.json: got {' '.join(name.split())}, "
        "expected LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM"
    )


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"load_in_8bit": True}, "unknown"),
        ("fp8", "fp8"),
    ],
)
def test_a_model_that_another_tool_quantized_is_refused(cli, float_model, configure, value, got):
    configure(quantization_config=value)
    assert both_refused(cli, float_model) == (
        f'"quantization_config" in {float_model}/config.json: got {got}, expected a float model. '
        "Start from the model's unquantized weights."
    )


@pytest.mark.parametrize("value", [None, {}])
def test_an_empty_quantization_config_is_a_float_model(cli, float_model, configure, value):
    configure(quantization_config=value)
    assert cli("inspect", float_model).code == 0


def test_half_a_surrogate_pair_in_config_json_does_no_harm(cli, tmp_path, float_model, configure):
    configure(_name_or_path="\ud800")
    assert cli("quantize", float_model, tmp_path / "out", "--scheme", "w8a16").code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["_name_or_path"] == "\ud800"


# --- descriptions


@pytest.fixture
def quantized(cli, tmp_path) -> Path:
    source = write_model(tmp_path / "original", tokenizer=False)
    assert cli("quantize", source, tmp_path / "float", "--scheme", "w8a16").code == 0
    return tmp_path / "float"


def describe(directory: Path, **changes: Any) -> Path:
    """Change quant_model_description.json; a key given as ... is left out."""
    path = directory / "quant_model_description.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    return path


def test_a_quantized_model_is_not_quantized_again(cli, quantized):
    assert cli("inspect", quantized).code == 0
    assert quantize_refused(cli, quantized) == (
        f"model in {quantized}: got a quantized one, expected float weights. Start from its float original."
    )


def test_a_description_that_names_absent_tensors_is_refused(cli, quantized):
    describe(quantized, **{"model.layers.9.mlp.up_proj.weight": "W8A16", "a.b": "FLOAT"})
    assert both_refused(cli, quantized) == (
        f"tensors that the description names in {quantized}: got 2 missing (a.b, model.layers.9.mlp.up_proj.weight), "
        "expected every one in a safetensors file. Fetch the directory again."
    )


@pytest.mark.parametrize("name", [Q_PROJ, "model.layers.1.mlp.up_proj.weight_scale", NORM, EMBEDDING])
@pytest.mark.parametrize("value", [..., None, 8])
def test_a_description_without_an_entry_for_a_tensor_is_refused(cli, quantized, name, value):
    path = describe(quantized, **{name: value})
    assert both_refused(cli, quantized) == f"entries in {path}: got none for {name}, expected one for each tensor"


def test_a_scheme_that_is_not_known_is_refused_with_the_known_ones(cli, quantized):
    path = describe(quantized, **{Q_PROJ: "W4A16"})
    assert both_refused(cli, quantized) == (
        f"type of {Q_PROJ} in {path}: got W4A16, expected FLOAT, W8A8, W8A8_DYNAMIC, W8A8_MIX or W8A16"
    )


@pytest.mark.parametrize(("value", "got"), [(..., "nothing"), (None, "nothing"), (7, "7"), (["W8A8"], "['W8A8']")])
def test_a_description_without_its_type_is_refused(cli, quantized, value, got):
    path = describe(quantized, model_quant_type=value)
    assert both_refused(cli, quantized) == (
        f'"model_quant_type" in {path}: got {got}, expected a type such as FLOAT, W8A8, W8A8_DYNAMIC, W8A8_MIX or W8A16'
    )


def test_a_description_that_is_no_json_is_refused(cli, quantized):
    path = quantized / "quant_model_description.json"
    path.write_text("{")
    message = both_refused(cli, quantized)
    assert message.startswith(f"JSON in {path}: got ")
    assert message.endswith(", expected a JSON object. Fetch the file again.")


def test_a_description_that_calls_int8_weights_float_is_refused(cli, quantized):
    describe(quantized, **{Q_PROJ: "FLOAT"})
    assert both_refused(cli, quantized) == (
        f"dtype of {Q_PROJ} in {quantized}/quant_model_weight_w8a16.safetensors: got I8, "
        "expected F32, F16 or BF16. Write the directory again."
    )


def test_a_description_that_calls_one_scheme_another_is_refused(cli, quantized):
    describe(quantized, **{Q_PROJ: "W8A8"})
    message = both_refused(cli, quantized)
    prefix = Q_PROJ.removesuffix("weight")
    assert message.startswith(
        f"4 tensors are missing in {quantized}: got no {prefix}input_scale, {prefix}input_offset, "
        f"{prefix}quant_bias, {prefix}deq_scale, expected all "
    )


def test_a_description_beside_float_weights_is_refused(cli, float_model):
    (float_model / "quant_model_description.json").write_text('{"model_quant_type": "W8A8"}')
    message = both_refused(cli, float_model)
    assert message.startswith(f"entries in {float_model}/quant_model_description.json: got none for lm_head.weight, ")
    assert message.endswith(" and 13 more, expected one for each tensor")
