"""Ids of hubs in the place of directories: what is fetched, kept, refused, and said."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import cast

import pytest

from eightfold.errors import CapacityError, ConfigError
from eightfold.hub.choice import chosen_hub
from eightfold.hub.clients import Hub, Listing
from eightfold.hub.fetch import fetched, model_files
from eightfold.hub.names import HubId, id_of, origin_of, parse_id, title_of
from tests.hub.fake_hub import FakeHub
from tests.refusal import error_line

pytest.importorskip("huggingface_hub")

NOWHERE = "http://127.0.0.1:9"  # the port of `discard`, where nobody listens


def test_only_what_a_model_is_read_from_is_fetched_and_once(online, hub, model_files):
    shown = online("inspect", "Org/Tiny", "--json")
    assert shown.code == 0, shown.err
    assert hub.fetched() == sorted([*model_files, "LICENSE"])
    hub.asked.clear()
    assert online("inspect", "Org/Tiny", "--json").json() == shown.json()
    assert hub.fetched() == []


def test_without_network_the_cache_serves_and_a_note_says_so(online, hub):
    assert online("inspect", "Org/Tiny").code == 0
    hub.asked.clear()
    for variables in ({"HF_HUB_OFFLINE": "1"}, {"at": NOWHERE}):
        shown = online("inspect", "Org/Tiny", **variables)
        assert shown.code == 0
        assert "note: Hugging Face was not asked" in shown.err
    assert hub.asked == []
    message = error_line(online("inspect", "Org/Other", at=NOWHERE))
    assert message.startswith("no directory Org/Other here, and Hugging Face cannot be asked for it: got ")


@pytest.mark.parametrize(
    ("name", "variables", "expected"),
    [
        ("Org/None", {}, "model Org/None on Hugging Face: got none of this name"),
        ("Org/Tiny@nope", {}, "model Org/Tiny@nope on Hugging Face: got no revision nope"),
        ("Org/Gated", {}, "model Org/Gated on Hugging Face: got a gated one"),
        ("Org/Secret", {}, "Check the name, and set HF_TOKEN if it is private."),
        ("Org/Tiny", {"HF_TOKEN": "hf_wrongSecret"}, "got a token that is refused (status 401)"),
        ("Org/Gguf", {}, "got no config.json among 2 files (a.gguf, config.txt)"),
        ("Org/Pickled", {}, "got no safetensors among 2 files (config.json, pytorch_model.bin)"),
        ("Org/Tiny", {"EIGHTFOLD_HUB": "other"}, "EIGHTFOLD_HUB: got other, expected hf or modelscope"),
    ],
)
def test_what_cannot_be_had_is_said_in_one_line(online, hub, model_files, name, variables, expected):
    hub.add("Org/Gated", model_files, is_gated=True)
    hub.add("Org/Secret", model_files, needs_token=True)
    hub.add("Org/Gguf", {"a.gguf": b"", "config.txt": b""})
    hub.add("Org/Pickled", {"config.json": b"{}", "pytorch_model.bin": b""})
    message = error_line(online("inspect", name, **variables))
    assert expected in message
    assert "wrongSecret" not in message


def test_a_token_of_the_environment_opens_what_is_private(online, hub, model_files):
    hub.add("Org/Secret", model_files, needs_token=True)
    assert online("inspect", "Org/Secret", HF_TOKEN="hf_right").code == 0


def test_a_cut_connection_goes_on_where_it_stopped(online, hub, model_files):
    hub.breaks_after = 1000
    shown = online("inspect", "Org/Tiny")
    assert shown.code == 0, shown.err
    assert hub.breaks_after is None
    assert any(span.endswith("-") and span != "bytes=0-" for span in hub.ranges)


def test_a_revision_that_changes_while_quantize_stands_still_is_refused(online, hub, model_files, tmp_path):
    repository = hub.models["Org/Tiny"]
    first = repository.branches["main"]
    command = ("quantize", "Org/Tiny", "out", "--scheme", "w8a16")
    made = online(*command)
    assert made.code == 0, made.err
    head = json.loads((tmp_path / "out" / "eightfold_journal.jsonl").read_text().splitlines()[0])
    assert head["origin"] == f"Org/Tiny@{first}"
    assert "already complete" in online(*command).out

    weights = bytearray(model_files["model.safetensors"])
    weights[-2] ^= 1
    changed = {**repository.commits[0][1], "model.safetensors": bytes(weights)}
    second = repository.commit(changed)
    message = error_line(online(*command))
    expected = f"source: Org/Tiny@{first[:12]} -> Org/Tiny@{second[:12]}; source: model.safetensors has changed"
    assert expected in message
    assert "already complete" in online("quantize", f"Org/Tiny@{first}", *command[2:]).out
    assert online(*command, "--overwrite").code == 0

    repository.commit({**changed, "README.md": b"only this is new"})
    assert "already complete" in online(*command).out


def test_modelscope_is_asked_where_the_environment_says_so(online, hub, model_files):
    pytest.importorskip("modelscope_hub")
    shown = online("inspect", "Org/Tiny", "--json", EIGHTFOLD_HUB="modelscope")
    assert shown.code == 0, shown.err
    assert hub.fetched() == sorted([*model_files, "LICENSE"])
    offline = online("inspect", "Org/Tiny", EIGHTFOLD_HUB="modelscope", HF_HUB_OFFLINE="1")
    assert offline.code == 0
    assert "note: ModelScope was not asked" in offline.err
    message = error_line(online("inspect", "Org/None", EIGHTFOLD_HUB="modelscope"))
    assert message.startswith("model Org/None on ModelScope: got none of this name")


def test_each_command_of_a_process_asks_the_modelscope_of_its_own_environment(online):
    pytest.importorskip("modelscope_hub")
    assert online("inspect", "Org/Tiny", EIGHTFOLD_HUB="modelscope").code == 0
    other = FakeHub()
    other.add("Org/Tiny", {})
    message = error_line(online("inspect", "Org/Tiny", EIGHTFOLD_HUB="modelscope", at=other.address))
    other.close()
    assert "no config.json among 0 files" in message


def test_the_client_that_is_missing_is_named(online, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = error_line(online("inspect", "Org/Tiny"))
    assert message.startswith("a hub id needs huggingface_hub: got none installed")


class FullDisk:
    """A hub whose cache lacks more than any disk has."""

    title = "Hugging Face"

    def listing(self, model):
        return Listing("a" * 40, {"config.json": 1, "model.safetensors": 10**18})

    def space(self, model, listing, names):
        return Path("/nowhere/hub"), sum(listing.sizes[name] for name in names)


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte():
    with pytest.raises(CapacityError, match=r"the disk of /nowhere/hub is too small.*expected 1000000000\.00 GB"):
        fetched(HubId("Org/Tiny"), cast(Hub, FullDisk()))


def test_shards_and_their_index_are_fetched_and_an_only_layout_is_taken():
    shards = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    listed = [*shards, "model.safetensors.index.json", "original/model.safetensors", "../config.json", ".env"]
    assert model_files(listed) == sorted([*shards, "model.safetensors.index.json"])
    assert model_files(["config.json", "consolidated.safetensors"]) == ["config.json", "consolidated.safetensors"]
    ours = ["config.json", "eightfold_journal.jsonl", "quant_model_description.json", "quant_model_weight.safetensors"]
    assert model_files(ours) == ours


def test_paths_that_exist_are_never_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert id_of(Path("Org/Tiny@v1.0")) == HubId("Org/Tiny", "v1.0")
    Path("Org/.Tiny.partial").mkdir(parents=True)
    for path in ("Org/Tiny", "Org", "/Org/Tiny", "a/b/c", "../Tiny", "Org/..", "-x/y"):
        assert id_of(Path(path)) is None
    with pytest.raises(ConfigError, match="hub id: got nothing, expected ORG/NAME"):
        parse_id("nothing")
    with pytest.raises(ConfigError, match="`hub`: got other"):
        chosen_hub("other")


def test_a_model_in_a_cache_is_called_by_its_name_on_the_hub(tmp_path):
    commit = "0" * 40
    for place in (f"models--Org--My--Tiny/snapshots/{commit}", f"models/Org--My--Tiny/snapshots/{commit}"):
        (tmp_path / place).mkdir(parents=True)
        assert origin_of(tmp_path / place) == HubId("Org/My--Tiny", commit)
        assert title_of(tmp_path / place) == "Org/My--Tiny"
    assert origin_of(tmp_path) is None
    assert title_of(tmp_path) == tmp_path.name
