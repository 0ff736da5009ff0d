"""export, convert and import take the ids of a hub as quantize does."""

from __future__ import annotations

import json

import pytest

from tests.hub.conftest import files_of
from tests.refusal import error_line

pytest.importorskip("huggingface_hub")


@pytest.fixture
def out(online, hub, tmp_path):
    """An 8-bit directory, published as Org/Int8."""
    made = online("quantize", "Org/Tiny", tmp_path / "out", "--scheme", "w8a16")
    assert made.code == 0, made.err
    hub.add("Org/Int8", files_of(tmp_path / "out"))
    return tmp_path / "out"


@pytest.mark.parametrize("place", ["hf", "modelscope"])
def test_what_is_made_of_an_id_is_what_is_made_of_its_directory(online, hub, out, tmp_path, place):
    if place == "modelscope":
        pytest.importorskip("modelscope_hub")
    there = {"EIGHTFOLD_HUB": place}
    commands = {"ct": ("export", "--to", "compressed-tensors"), "fixed": ("convert", "--for", "vllm-ascend")}
    for name, (command, *options) in commands.items():
        assert online(command, out, tmp_path / name, *options).code == 0
        done = online(command, "Org/Int8", tmp_path / f"{name}-of-id", *options, **there)
        assert done.code == 0, done.err
        assert files_of(tmp_path / f"{name}-of-id") == files_of(tmp_path / name)
    hub.add("Org/Theirs", files_of(tmp_path / "ct"))
    done = online("import", "Org/Theirs", tmp_path / "back", **there)
    assert done.code == 0, done.err
    weights = next(out.glob("*.safetensors")).name
    assert (tmp_path / "back" / weights).read_bytes() == (out / weights).read_bytes()


def test_without_network_the_cache_serves_and_another_commit_is_refused(online, hub, out, tmp_path):
    command = ("export", "Org/Int8", tmp_path / "ct", "--to", "compressed-tensors")
    assert online(*command).code == 0
    again = online(*command, HF_HUB_OFFLINE="1")
    assert (again.code, "already complete" in again.out) == (0, True)
    assert "note: Hugging Face was not asked" in again.err
    files = files_of(out)
    changed = {**json.loads(files["config.json"]), "rope_theta": 20000.0, "rope_parameters": None}
    hub.models["Org/Int8"].commit({**files, "config.json": json.dumps(changed).encode()})
    assert "source: config.json has changed" in error_line(online(*command))


def test_a_gguf_file_has_the_name_of_the_model_and_one_that_is_missing_is_no_id(online, hub, out, tmp_path):
    gguf = pytest.importorskip("gguf")
    from tests.conftest import tiny_config
    from tests.exporters.test_gguf import model_of

    hub.add("Org/Merged", files_of(model_of(tmp_path / "m", tiny_config())))
    done = online("export", "Org/Merged", tmp_path / "x.gguf", "--to", "gguf")
    assert done.code == 0, done.err
    field = gguf.GGUFReader(tmp_path / "x.gguf").fields["general.name"]
    assert field.contents() == "Org/Merged"
    hub.asked.clear()
    assert error_line(online("import", "Org/x.gguf", "back")).startswith("no file Org/x.gguf: ")
    assert hub.asked == []
