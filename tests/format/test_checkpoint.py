"""Opening a model directory: files, shards, indexes, the tied head, the description."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from eightfold.config import DType
from eightfold.errors import CheckpointError
from eightfold.format import stored
from eightfold.format.checkpoint import Checkpoint
from eightfold.scheme import QuantType
from tests.conftest import FAMILIES, tiny_config, write_model

Q_PROJ = "model.layers.0.self_attn.q_proj"


def shard(directory: Path, parts: int = 2) -> dict[str, str]:
    """Split model.safetensors as transformers does; return the weight map."""
    tensors = load_file(str(directory / "model.safetensors"))
    weight_map = {name: f"model-{1 + i % parts:05d}-of-{parts:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, str(directory / file))
    (directory / "model.safetensors").unlink()
    write_index(directory, {"metadata": {"total_size": 1}, "weight_map": weight_map})
    return weight_map


def write_index(directory: Path, content: Any, name: str = "model.safetensors.index.json") -> None:
    (directory / name).write_text(json.dumps(content))


def bits(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {name: checkpoint.array(name).tobytes() for name in sorted(checkpoint.tensors)}


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(directory)
    return str(error.value)


# --- single file


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_stored_tensor_can_be_read(tmp_path, architecture, dtype):
    source = write_model(tmp_path / "m", tiny_config(architecture, torch_dtype=dtype), tokenizer=False)
    checkpoint = Checkpoint.open(source)
    stored = load_file(str(source / "model.safetensors"))
    assert bits(checkpoint) == {name: stored[name].view(torch.uint8).numpy().tobytes() for name in sorted(stored)}
    assert checkpoint.dtype.value == {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    assert not checkpoint.is_quantized
    assert checkpoint.quant_type(Q_PROJ) is QuantType.FLOAT


def test_opening_reads_no_weight(float_model, monkeypatch):
    def refuse(path: Path) -> None:
        raise AssertionError(f"{path} was mapped")

    monkeypatch.setattr(stored, "MappedFile", refuse)
    checkpoint = Checkpoint.open(float_model)
    with pytest.raises(AssertionError, match="was mapped"):
        checkpoint.array(f"{Q_PROJ}.weight")


def test_a_config_without_dtype_has_that_of_the_embedding(tmp_path):
    config = tiny_config(torch_dtype="float16")
    source = write_model(tmp_path / "m", config, tokenizer=False)
    del config["torch_dtype"]
    (source / "config.json").write_text(json.dumps(config))
    assert Checkpoint.open(source).dtype is DType.F16


def test_the_configs_dtype_wins_over_the_embeddings(tmp_path):
    source = write_model(tmp_path / "m", tokenizer=False)
    (source / "config.json").write_text(json.dumps(tiny_config(torch_dtype="float16")))
    checkpoint = Checkpoint.open(source)
    assert checkpoint.tensors["model.embed_tokens.weight"].dtype == "BF16"
    assert checkpoint.dtype is DType.F16


def test_a_second_copy_under_the_publishers_own_name_is_ignored(float_model):
    (float_model / "consolidated.safetensors").write_bytes(b"not even a safetensors file")
    checkpoint = Checkpoint.open(float_model)
    assert {info.file.name for info in checkpoint.tensors.values()} == {"model.safetensors"}


def test_a_file_of_any_name_is_the_model_when_it_is_the_only_one(float_model):
    (float_model / "model.safetensors").rename(float_model / "weights.safetensors")
    assert {info.file.name for info in Checkpoint.open(float_model).tensors.values()} == {"weights.safetensors"}


def test_hidden_files_and_hidden_indexes_are_ignored(float_model):
    expected = bits(Checkpoint.open(float_model))
    (float_model / ".old.safetensors").write_bytes(b"")
    (float_model / "._model.safetensors.index.json").write_bytes(b"\x00\x05")
    assert bits(Checkpoint.open(float_model)) == expected


def test_tensors_that_the_model_does_not_need_do_not_disturb(float_model):
    tensors = load_file(str(float_model / "model.safetensors"))
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, str(float_model / "model.safetensors"))
    assert len(Checkpoint.open(float_model).tensors) == len(tensors)


# --- shards


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_a_sharded_model_holds_the_same_tensors(float_model, parts):
    expected = bits(Checkpoint.open(float_model))
    weight_map = shard(float_model, parts)
    checkpoint = Checkpoint.open(float_model)
    assert bits(checkpoint) == expected
    assert {name: info.file.name for name, info in checkpoint.tensors.items()} == weight_map


def test_shards_without_an_index_are_read_together(float_model):
    expected = bits(Checkpoint.open(float_model))
    shard(float_model, 3)
    (float_model / "model.safetensors.index.json").unlink()
    assert bits(Checkpoint.open(float_model)) == expected


def test_a_file_that_the_index_does_not_name_is_ignored(float_model):
    weight_map = shard(float_model)
    (float_model / "consolidated.safetensors").write_bytes(b"broken")
    checkpoint = Checkpoint.open(float_model)
    assert {info.file.name for info in checkpoint.tensors.values()} == set(weight_map.values())


def test_a_shard_may_hold_more_than_the_index_says(float_model):
    weight_map = shard(float_model)
    weight_map.pop("lm_head.weight")
    write_index(float_model, {"weight_map": weight_map})
    assert "lm_head.weight" in Checkpoint.open(float_model).tensors


def copy_of(directory: Path, index: str, weight_map: dict[str, str]) -> None:
    """Put zeros beside a model, in shards with their own index."""
    tensors = load_file(str(directory / "model.safetensors"))
    for file in set(weight_map.values()):
        save_file({n: torch.zeros_like(tensors[n]) for n in weight_map if weight_map[n] == file}, str(directory / file))
    write_index(directory, {"weight_map": weight_map}, index)


def test_the_whole_file_comes_first_then_its_index_then_others_and_a_note_says_so(float_model):
    """The order of transformers, for each set of weights that is found when the one before it is removed."""
    expected, names = bits(Checkpoint.open(float_model)), list(Checkpoint.open(float_model).tensors)
    copy_of(float_model, "model.safetensors.index.json", dict.fromkeys(names, "model-00001-of-00001.safetensors"))
    copy_of(float_model, "consolidated.safetensors.index.json", dict.fromkeys(names, "consolidated.00.safetensors"))
    copy_of(float_model, "other.safetensors.index.json", dict.fromkeys(names, "other-1.safetensors"))
    assert bits(Checkpoint.open(float_model)) == expected
    for index, shards, left in (
        (None, "model.safetensors", 6),
        ("model.safetensors.index.json", "model-00001-of-00001.safetensors", 4),
        ("other.safetensors.index.json", "other-1.safetensors", 2),
        ("consolidated.safetensors.index.json", "consolidated.00.safetensors", 0),
    ):
        checkpoint = Checkpoint.open(float_model)
        assert {info.file.name for info in checkpoint.tensors.values()} == {shards}
        notes = [note.partition(" and ")[0] for note in checkpoint.notes]
        assert [note.startswith(f"weights are read from {index or shards}; not read: ") for note in notes] == (
            [True] if left else []
        )
        for name in (index, shards):
            if name:
                (float_model / name).unlink()


@pytest.mark.parametrize("shards", ["model-00001-of-00009.safetensors", "../elsewhere.safetensors"])
def test_a_stale_index_beside_a_whole_file_is_not_read(float_model, shards):
    expected = bits(Checkpoint.open(float_model))
    write_index(float_model, {"weight_map": {"lm_head.weight": shards}})
    checkpoint = Checkpoint.open(float_model)
    assert bits(checkpoint) == expected
    assert checkpoint.notes == [
        "weights are read from model.safetensors; not read: model.safetensors.index.json",
    ]


def test_shards_without_an_index_are_one_whole_set(float_model):
    names = list(shard(float_model, 3))
    (float_model / "model.safetensors.index.json").unlink()
    for stray in ("consolidated.safetensors", "notes.safetensors"):
        save_file({"tok_embeddings.weight": torch.zeros(1)}, str(float_model / stray))
    checkpoint = Checkpoint.open(float_model)
    assert set(checkpoint.tensors) == set(names)
    assert checkpoint.notes == [
        "weights are read from model-00001-of-00003.safetensors, model-00002-of-00003.safetensors and 1 more; "
        "not read: consolidated.safetensors, notes.safetensors"
    ]
    (float_model / "model-00002-of-00003.safetensors").rename(float_model / "model-00001-of-00002.safetensors")
    assert refusal(float_model) == (
        f"weights in {float_model}: got shards of 2 sets (model-00001-of-00002.safetensors, "
        "model-00001-of-00003.safetensors), expected one set, or an index. "
        "Remove those that do not belong to this model."
    )
    (float_model / "model-00001-of-00002.safetensors").unlink()
    assert refusal(float_model) == (
        f"1 shard is missing of 3 in {float_model}: got no model-00002-of-00003.safetensors, "
        "expected every file of model. Fetch the missing files."
    )


def test_two_other_indexes_are_refused(float_model):
    names = list(shard(float_model))
    for stem in ("a", "b"):
        write_index(float_model, {"weight_map": dict.fromkeys(names, "x")}, f"{stem}.safetensors.index.json")
    (float_model / "model.safetensors.index.json").unlink()
    assert refusal(float_model) == (
        f"shard indexes in {float_model}: got a.safetensors.index.json, b.safetensors.index.json, "
        "expected at most one. Remove the one that does not belong to this model."
    )


def test_config_json_may_name_the_weights(float_model):
    expected = bits(Checkpoint.open(float_model))
    (float_model / "model.safetensors").rename(float_model / "own.safetensors")
    save_file({"a": torch.zeros(1)}, str(float_model / "model.safetensors"))
    (float_model / "config.json").write_text(json.dumps(tiny_config(transformers_weights="own.safetensors")))
    assert bits(Checkpoint.open(float_model)) == expected


def test_missing_tensors_are_told_together_with_the_choice(float_model):
    save_file({"model.embed_tokens.weight": torch.zeros(1)}, str(float_model / "model.safetensors"))
    save_file({"a": torch.zeros(1)}, str(float_model / "old.safetensors"))
    assert refusal(float_model).endswith(
        "Fetch or write the directory again. weights are read from model.safetensors; not read: old.safetensors"
    )


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ({}, "null"),
        ({"weight_map": ["a"]}, '["a"]'),
        ({"weight_map": {"a": 1}}, '{"a": 1}'),
        ({"weight_map": {"a" * 100: 1}}, '{"' + "a" * 55 + "..."),
    ],
)
def test_an_index_without_a_map_is_refused(float_model, content, got):
    shard(float_model)
    write_index(float_model, content)
    assert refusal(float_model) == (
        f'"weight_map" in {float_model}/model.safetensors.index.json: got {got}, expected tensor name -> file name. '
        "Fetch the file again."
    )


@pytest.mark.parametrize("name", ["../m.safetensors", "/etc/passwd", "sub/m.safetensors"])
def test_an_index_cannot_point_outside_the_directory(float_model, name):
    weight_map = shard(float_model)
    write_index(float_model, {"weight_map": {**weight_map, "lm_head.weight": name}})
    assert refusal(float_model) == (
        f"shard name in {float_model}/model.safetensors.index.json: got {name}, expected a file in the same directory. "
        "Fetch the file again."
    )


@pytest.mark.parametrize("name", ["..", ".", "", "nul\0"])
def test_an_index_cannot_name_what_is_no_file(float_model, name):
    weight_map = shard(float_model)
    write_index(float_model, {"weight_map": {**weight_map, "lm_head.weight": name}})
    assert refusal(float_model).startswith(("1 shard is missing of 3", "shard name"))


def test_an_index_that_names_the_wrong_shard_is_refused(float_model):
    weight_map = shard(float_model)
    other = {"lm_head.weight": next(f for f in weight_map.values() if f != weight_map["lm_head.weight"])}
    write_index(float_model, {"weight_map": {**weight_map, **other}})
    assert refusal(float_model) == (
        f"1 tensors are not in the shard that the index names in {float_model}/model.safetensors.index.json: "
        "got lm_head.weight, expected an index that fits its files. Fetch the directory again."
    )


# --- tied head, sizes


def test_an_untied_head_is_its_own_tensor(float_model):
    checkpoint = Checkpoint.open(float_model)
    assert checkpoint.head_weight() == "lm_head.weight"
    assert checkpoint.resident_bytes() == sum(info.nbytes for info in checkpoint.tensors.values())


@pytest.mark.parametrize("stored", [False, True])
def test_a_tied_head_is_the_embedding_and_its_copy_is_not_counted(tmp_path, stored):
    source = write_model(tmp_path / "m", tiny_config(tie_word_embeddings=True), tokenizer=False)
    tensors = load_file(str(source / "model.safetensors"))
    assert "lm_head.weight" not in tensors
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    if stored:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, str(source / "model.safetensors"))
    checkpoint = Checkpoint.open(source)
    assert ("lm_head.weight" in checkpoint.tensors) == stored
    assert checkpoint.head_weight() == "model.embed_tokens.weight"
    assert checkpoint.resident_bytes() == nbytes


def test_the_copy_of_a_tied_head_may_be_of_any_kind(tmp_path):
    source = write_model(tmp_path / "m", tiny_config(tie_word_embeddings=True), tokenizer=False)
    tensors = load_file(str(source / "model.safetensors"))
    tensors["lm_head.weight"] = torch.zeros(3, dtype=torch.int32)
    save_file(tensors, str(source / "model.safetensors"))
    assert Checkpoint.open(source).head_weight() == "model.embed_tokens.weight"


# --- memory


def test_released_tensors_read_the_same_again(tmp_path):
    source = write_model(tmp_path / "m", tiny_config(vocab_size=10 * mmap.PAGESIZE // 96), tokenizer=False)
    checkpoint = Checkpoint.open(source)
    assert checkpoint.tensors["model.embed_tokens.weight"].nbytes > 9 * mmap.PAGESIZE
    before = bits(checkpoint)
    checkpoint.release(checkpoint.tensors)
    assert bits(checkpoint) == before


def test_release_lets_go_of_what_was_read(tmp_path):
    source = write_model(tmp_path / "m", tiny_config(vocab_size=10 * mmap.PAGESIZE // 96), tokenizer=False)
    checkpoint = Checkpoint.open(source)
    name = "model.embed_tokens.weight"
    before = checkpoint.array(name).copy()
    checkpoint.array(name)[:] = 0  # only in memory: gone with the pages that hold it
    checkpoint.release([name])
    assert np.mean(checkpoint.array(name) == before) > 0.8


def test_a_file_that_became_shorter_since_it_was_opened_is_named(float_model):
    checkpoint = Checkpoint.open(float_model)
    weights = float_model / "model.safetensors"
    for size in (0, 5000):
        weights.write_bytes(bytes(size))
        with pytest.raises(
            CheckpointError, match=rf"^model\.safetensors is truncated in .*: got {size} bytes, expected "
        ):
            Checkpoint.array(checkpoint, max(checkpoint.tensors, key=lambda name: checkpoint.tensors[name].end))
        checkpoint._maps.clear()


def test_releasing_what_was_never_read_opens_nothing(float_model, monkeypatch):
    checkpoint = Checkpoint.open(float_model)
    monkeypatch.setattr(stored, "MappedFile", None)
    checkpoint.release(checkpoint.tensors)


def test_layer_tensors_are_those_of_one_layer(tmp_path):
    source = write_model(tmp_path / "m", tiny_config(num_hidden_layers=11), tokenizer=False)
    names = Checkpoint.open(source).layer_tensors("model.layers.1.")
    assert len(names) == 9
    assert all(name.startswith("model.layers.1.") for name in names)


# --- quantized directories


@pytest.fixture
def quantized(cli, tmp_path, float_model) -> Path:
    assert cli("quantize", float_model, tmp_path / "q", "--scheme", "w8a16").code == 0
    return tmp_path / "q"


def test_a_description_makes_a_directory_quantized(quantized):
    checkpoint = Checkpoint.open(quantized)
    assert checkpoint.is_quantized
    assert checkpoint.quant_type(Q_PROJ) is QuantType.W8A16
    assert checkpoint.quant_type("lm_head") is QuantType.FLOAT


def test_float_weights_beside_quantized_ones_are_not_read(quantized, float_model):
    (quantized / "model.safetensors").write_bytes((float_model / "model.safetensors").read_bytes())
    checkpoint = Checkpoint.open(quantized)
    assert checkpoint.quant_type(Q_PROJ) is QuantType.W8A16
    assert checkpoint.notes == [
        "weights are read from quant_model_weight_w8a16.safetensors; not read: model.safetensors",
    ]


def test_a_suffixed_description_is_found(quantized):
    (quantized / "quant_model_description.json").rename(quantized / "quant_model_description_w8a16.json")
    checkpoint = Checkpoint.open(quantized)
    assert checkpoint.description is not None
    assert checkpoint.description.path.name == "quant_model_description_w8a16.json"
    assert checkpoint.quant_type(Q_PROJ) is QuantType.W8A16


def test_the_short_description_wins_over_suffixed_ones(quantized):
    for suffix in ("w8a8", "w8a16"):
        (quantized / f"quant_model_description_{suffix}.json").write_text("broken")
    assert Checkpoint.open(quantized).quant_type(Q_PROJ) is QuantType.W8A16


def test_two_suffixed_descriptions_are_refused(quantized):
    text = (quantized / "quant_model_description.json").read_text()
    (quantized / "quant_model_description.json").unlink()
    for suffix in ("w8a8", "w8a16"):
        (quantized / f"quant_model_description_{suffix}.json").write_text(text)
    assert refusal(quantized) == (
        f"description in {quantized}: got quant_model_description_w8a16.json, quant_model_description_w8a8.json, "
        "expected one, or quant_model_description.json. Keep the one that belongs to the weights."
    )


def rewrite(path: Path, **changes: torch.Tensor) -> None:
    """Change tensors of the first layer's q_proj, by suffix."""
    path.chmod(0o600)
    tensors = load_file(str(path))
    save_file({**tensors, **{f"{Q_PROJ}.{suffix}": t for suffix, t in changes.items()}}, str(path))


def test_scales_may_be_stored_flat_and_in_any_float_type(quantized):
    weights = quantized / "quant_model_weight_w8a16.safetensors"
    rewrite(
        weights, weight_scale=torch.ones(64, dtype=torch.float16), weight_offset=torch.ones(64, dtype=torch.bfloat16)
    )
    assert Checkpoint.open(quantized).tensors[f"{Q_PROJ}.weight_scale"].shape == (64,)


@pytest.mark.parametrize("shape", [(1, 64), (64, 2), (63, 1), ()])
def test_scales_of_another_shape_are_refused(quantized, shape):
    weights = quantized / "quant_model_weight_w8a16.safetensors"
    rewrite(weights, weight_scale=torch.ones(shape))
    assert refusal(quantized) == (
        f"shape of {Q_PROJ}.weight_scale in {weights}: got {list(shape)}, expected [64, 1]. "
        "config.json and the weights belong to different models."
    )


def test_an_int8_weight_of_another_type_is_refused(quantized):
    weights = quantized / "quant_model_weight_w8a16.safetensors"
    rewrite(weights, weight=torch.ones(64, 48, dtype=torch.int32))
    assert refusal(quantized) == (
        f"dtype of {Q_PROJ}.weight in {weights}: got I32, expected I8. Write the directory again."
    )


def test_integer_scales_are_refused(quantized):
    weights = quantized / "quant_model_weight_w8a16.safetensors"
    rewrite(weights, weight_scale=torch.ones(64, 1, dtype=torch.int8))
    assert refusal(quantized) == (
        f"dtype of {Q_PROJ}.weight_scale in {weights}: got I8, expected F32, F16 or BF16. Write the directory again."
    )


@pytest.mark.parametrize(("dtype", "stored", "other"), [("bfloat16", "F32", "I64"), ("float16", "I64", "F32")])
def test_the_models_dtype_alone_decides_how_deq_scale_is_packed(cli, tmp_path, dtype, stored, other):
    source = write_model(tmp_path / "m", tiny_config(torch_dtype=dtype))
    assert cli("quantize", source, tmp_path / "q", "--scheme", "w8a8", "--calib-texts", "hello").code == 0
    assert Checkpoint.open(tmp_path / "q").tensors[f"{Q_PROJ}.deq_scale"].dtype == stored
    weights = tmp_path / "q" / "quant_model_weight_w8a8.safetensors"
    rewrite(weights, deq_scale=torch.ones(64, dtype={"F32": torch.float32, "I64": torch.int64}[other]))
    short = {"bfloat16": "BF16", "float16": "F16"}[dtype]
    assert refusal(tmp_path / "q") == (
        f"dtype of {Q_PROJ}.deq_scale in {weights}: got {other}, expected {stored} in a {short} model. "
        "Write the directory again."
    )
