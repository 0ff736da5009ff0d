"""A model directory that appears whole: targets, modes, what is replaced and what is refused."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from eightfold.errors import OutputError
from eightfold.format.writer import OutputDirectory
from tests.conftest import write_model
from tests.format import make, siblings
from tests.refusal import quantize_refused, refused, snapshot

W8A16 = ["--scheme", "w8a16"]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- the directory when all goes well


def test_the_target_appears_only_at_the_end(tmp_path, float_model):
    target = tmp_path / "out"
    with OutputDirectory(target, source=float_model) as output:
        (output.path / "config.json").write_text("{}")
        assert not target.exists()
        assert output.path.parent == tmp_path
        assert output.path.name.startswith(".out.partial-")
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert siblings(target) == []


def test_nothing_is_open_to_others_and_weights_are_read_only(tmp_path, float_model):
    with OutputDirectory(tmp_path / "out", source=float_model) as output:
        (output.path / "additional_chat_templates").mkdir(mode=0o777)
        for name in ("w.safetensors", "config.json", "merges.txt", "additional_chat_templates/tools.jinja"):
            (output.path / name).touch()
            (output.path / name).chmod(0o666)
    out = tmp_path / "out"
    assert {str(path.relative_to(tmp_path)): mode(path) for path in [out, *out.rglob("*")]} == {
        "out": 0o750,
        "out/additional_chat_templates": 0o750,
        "out/additional_chat_templates/tools.jinja": 0o600,
        "out/w.safetensors": 0o400,
        "out/config.json": 0o600,
        "out/merges.txt": 0o600,
    }


def test_quantize_leaves_the_source_as_it_was_and_the_modes_of_the_reference(cli, tmp_path, float_model):
    before = snapshot(float_model)
    assert cli("quantize", float_model, tmp_path / "out", *W8A16).code == 0
    assert snapshot(float_model) == before
    modes = {path.suffix: mode(path) for path in (tmp_path / "out").iterdir()}
    assert modes == {".safetensors": 0o400, ".json": 0o600, ".jsonl": 0o600, ".jinja": 0o600}
    assert mode(tmp_path / "out") == 0o750


@pytest.mark.parametrize("target", ["out", "a/b/out", "name with space", "out[1]*?", "-"])
def test_a_target_that_does_not_exist_is_made_with_its_parents(tmp_path, float_model, target):
    make(tmp_path / target, float_model)
    assert (tmp_path / target / "config.json").read_text() == "new"
    assert siblings(tmp_path / target) == []


def test_an_empty_target_is_taken(tmp_path, float_model):
    (tmp_path / "out").mkdir(mode=0o777)
    make(tmp_path / "out", float_model)
    assert (tmp_path / "out" / "config.json").read_text() == "new"
    assert mode(tmp_path / "out") == 0o750


def test_overwrite_replaces_every_file_of_the_old_model(tmp_path, float_model):
    target = write_model(tmp_path / "out")
    make(target, float_model, overwrite=True)
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert siblings(target) == []


def test_a_symlinked_target_stays_a_link_and_its_destination_becomes_the_model(tmp_path, float_model):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    make(tmp_path / "link", float_model)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "config.json").read_text() == "new"
    assert siblings(tmp_path / "disk") == siblings(tmp_path / "link") == []


# --- targets that are refused


def test_a_target_with_files_is_refused_without_overwrite(cli, float_model):
    target = write_model(float_model.parent / "out")
    assert quantize_refused(cli, float_model) == (
        f"output directory {target}: got a directory that is not empty, expected a new or empty one. "
        "Choose another, or replace it with --overwrite."
    )


@pytest.mark.parametrize("name", ["thesis.tex", "config.json", "model.safetensors"])
def test_overwrite_does_not_replace_what_quantize_has_not_written(cli, float_model, name):
    target = float_model.parent / "out"
    target.mkdir()
    (target / name).write_text("years of work")
    assert quantize_refused(cli, float_model, "--overwrite") == (
        f"output directory {target}: got files that `eightfold quantize` did not write, expected a model that it made. "
        "Choose another, or empty it yourself."
    )


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_a_target_that_is_a_file_is_refused(cli, float_model, options):
    target = float_model.parent / "out"
    target.write_text("mine")
    assert quantize_refused(cli, float_model, *options) == (
        f"output directory {target}: got a file, expected a new or empty directory"
    )


@pytest.mark.parametrize("relation", ["equal", "dots", "inside", "around", "link"])
@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_a_target_in_the_place_of_the_source_is_refused(cli, tmp_path, relation, options):
    source = write_model(tmp_path / "models" / "float")
    (source.parent / "config.json").write_text("{}")  # so that --overwrite would take the parent for a model
    (tmp_path / "link").symlink_to(source)
    target = {
        "equal": source,
        "dots": source.parent / "x" / ".." / "float",
        "inside": source / "out",
        "around": source.parent,
        "link": tmp_path / "link",
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


# --- a mount point, which cannot be renamed


@pytest.fixture
def mount(tmp_path, monkeypatch) -> Path:
    """Return an empty directory that passes for a mount point."""
    target = tmp_path / "mount"
    target.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == target)
    return target


def test_a_mount_point_is_filled_from_inside_and_config_json_comes_last(mount, float_model, monkeypatch):
    moved = []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: (moved.append(self.name), rename(self, to))[1])
    inode = mount.stat().st_ino
    with OutputDirectory(mount, source=float_model) as output:
        assert output.path.parent == mount
        for name in ("a.json", "config.json", "z.json"):
            (output.path / name).touch()
    assert moved == ["a.json", "z.json", "config.json"]
    assert sorted(path.name for path in mount.iterdir()) == ["a.json", "config.json", "z.json"]
    assert mount.stat().st_ino == inode


def test_a_mount_point_with_a_model_is_emptied_only_with_overwrite(mount, float_model):
    write_model(mount)
    (mount / "more").mkdir()
    before = snapshot(mount)
    with pytest.raises(OutputError, match="not empty"):
        make(mount, float_model)
    assert snapshot(mount) == before
    make(mount, float_model, overwrite=True)
    assert [path.name for path in mount.iterdir()] == ["config.json"]


def test_what_a_killed_run_left_in_a_mount_point_does_not_count_and_goes(mount, float_model):
    path = mount / ".mount.partial-1"
    path.mkdir()
    (path / ".lock").touch()
    make(mount, float_model)
    assert [path.name for path in mount.iterdir()] == ["config.json"]


def test_the_second_of_two_writers_into_a_mount_point_loses(mount, float_model):
    with (
        pytest.raises(OutputError, match="files that another process put there meanwhile"),
        OutputDirectory(mount, source=float_model) as second,
    ):
        (second.path / "config.json").write_text("second")
        make(mount, float_model, "first")
    assert [path.name for path in mount.iterdir()] == ["config.json"]
    assert (mount / "config.json").read_text() == "first"
