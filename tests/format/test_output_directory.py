"""A model directory that appears whole: targets, modes, what is replaced and what is refused."""

from __future__ import annotations

import os
import stat
import zlib
from pathlib import Path

import pytest

from eightfold.errors import OutputError
from eightfold.format.journal import JOURNAL_NAME, read_entries
from tests.conftest import write_model
from tests.format import HEAD, make, output, siblings
from tests.refusal import quantize_refused, refused, snapshot

W8A16 = ["--scheme", "w8a16"]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- the directory when all goes well


def test_the_target_appears_only_at_the_end(tmp_path):
    target = tmp_path / "out"
    with output(target) as made:
        (made.path / "config.json").write_text("{}")
        assert not target.exists()
        assert made.path == tmp_path / ".out.partial"
        made.finish({})
    assert sorted(path.name for path in target.iterdir()) == ["config.json", JOURNAL_NAME]
    assert siblings(target) == []


def test_nothing_is_open_to_others_and_weights_are_read_only(tmp_path):
    with output(tmp_path / "out") as made:
        (made.path / "additional_chat_templates").mkdir(mode=0o777)
        for name in ("w.safetensors", "config.json", "merges.txt", "additional_chat_templates/tools.jinja"):
            (made.path / name).touch()
            (made.path / name).chmod(0o666)
        made.finish({"w.safetensors": 0})
    out = tmp_path / "out"
    assert {str(path.relative_to(tmp_path)): mode(path) for path in [out, *out.rglob("*")]} == {
        "out": 0o750,
        "out/additional_chat_templates": 0o750,
        "out/additional_chat_templates/tools.jinja": 0o600,
        "out/w.safetensors": 0o400,
        "out/config.json": 0o600,
        "out/merges.txt": 0o600,
        f"out/{JOURNAL_NAME}": 0o600,
    }


def test_the_closing_line_lists_every_file(tmp_path):
    with output(tmp_path / "out") as made:
        (made.path / "folder").mkdir()
        for name in ("a.json", "folder/b.txt", "w.safetensors"):
            (made.path / name).write_text(name)
        made.finish({"w.safetensors": 7})
    (head, last) = read_entries(tmp_path / "out")
    assert head == HEAD
    assert last == {
        "complete": {
            "a.json": [6, zlib.crc32(b"a.json")],
            "folder/b.txt": [12, zlib.crc32(b"folder/b.txt")],
            "w.safetensors": [13, 7],
        }
    }


def test_quantize_leaves_the_source_as_it_was_and_the_modes_of_the_reference(cli, tmp_path, float_model):
    before = snapshot(float_model)
    assert cli("quantize", float_model, tmp_path / "out", *W8A16).code == 0
    assert snapshot(float_model) == before
    modes = {path.suffix: mode(path) for path in (tmp_path / "out").iterdir()}
    assert modes == {".safetensors": 0o400, ".json": 0o600, ".jsonl": 0o600, ".jinja": 0o600}
    assert mode(tmp_path / "out") == 0o750


@pytest.mark.parametrize("target", ["out", "a/b/out", "name with space", "out[1]*?", "-"])
def test_a_target_that_does_not_exist_is_made_with_its_parents(tmp_path, target):
    make(tmp_path / target)
    assert (tmp_path / target / "config.json").read_text() == "new"
    assert siblings(tmp_path / target) == []


def test_an_empty_target_is_taken(tmp_path):
    (tmp_path / "out").mkdir(mode=0o777)
    make(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "new"
    assert mode(tmp_path / "out") == 0o750


def test_overwrite_replaces_what_the_command_has_made(tmp_path):
    target = tmp_path / "out"
    make(target, "old")
    with pytest.raises(OutputError, match="a directory that is not empty"):
        make(target)
    make(target, overwrite=True)
    assert (target / "config.json").read_text() == "new"
    assert siblings(target) == []


# --- targets that are refused


def test_a_target_with_files_is_refused_without_overwrite(cli, float_model):
    target = write_model(float_model.parent / "out")
    assert quantize_refused(cli, float_model) == (
        f"output directory {target}: got a directory that is not empty, expected a new or empty one. "
        "Choose another, or replace it with --overwrite."
    )


@pytest.mark.parametrize("name", ["thesis.tex", "config.json", "model.safetensors", "folder/thesis.tex"])
def test_overwrite_does_not_replace_what_quantize_has_not_written(cli, float_model, name):
    target = float_model.parent / "out"
    (target / name).parent.mkdir(parents=True)
    (target / name).write_text("years of work")
    assert quantize_refused(cli, float_model, "--overwrite") == (
        f"output directory {target}: got files that `eightfold quantize` did not write ({name}), expected a model and "
        "nothing else, to replace it. Move them elsewhere and run the same command again, or choose another directory."
    )


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_a_target_that_is_a_link_is_refused(cli, tmp_path, float_model, options, is_there):
    if is_there:
        (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    message = refused(cli, "quantize", float_model, tmp_path / "out", *W8A16, *options, within=tmp_path)
    assert message == (
        f"output directory {tmp_path}/out: got a symbolic link, expected a new or empty directory. "
        f"Name the directory that it points to: {tmp_path}/disk"
    )


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_a_target_that_is_a_file_is_refused(cli, float_model, options):
    target = float_model.parent / "out"
    target.write_text("mine")
    assert quantize_refused(cli, float_model, *options) == (
        f"output directory {target}: got a file, expected a new or empty directory. "
        "Name another directory, or move the file away."
    )


@pytest.mark.parametrize("relation", ["equal", "dots", "inside", "around", "below a link"])
@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_a_target_in_the_place_of_the_source_is_refused(cli, tmp_path, relation, options):
    source = write_model(tmp_path / "models" / "float")
    (source.parent / "config.json").write_text("{}")  # so that --overwrite would take the parent for a model
    (tmp_path / "link").symlink_to(source.parent)
    target = {
        "equal": source,
        "dots": source.parent / "x" / ".." / "float",
        "inside": source / "out",
        "around": source.parent,
        "below a link": tmp_path / "link" / "float",
    }[relation]
    message = refused(cli, "quantize", source, target, *W8A16, *options, within=tmp_path)
    assert message == (
        f"output directory {os.path.realpath(target)}: got the source {source} in the same place, "
        "expected a place outside of it. Choose another output directory."
    )


def test_a_target_below_a_file_is_refused(cli, float_model):
    (float_model.parent / "file").touch()
    target = float_model.parent / "file" / "out"
    message = refused(cli, "quantize", float_model, target, *W8A16, within=float_model.parent)
    assert message == f"cannot write to {target}: Not a directory. Choose a directory you may write to."


def test_a_mount_point_is_refused(cli, float_model, monkeypatch):
    target = float_model.parent / "out"
    target.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == target)
    assert quantize_refused(cli, float_model) == (
        f"output directory {target}: got a mount point, which cannot be renamed, expected a directory. "
        f"Choose a directory inside it, such as {target}/model."
    )
