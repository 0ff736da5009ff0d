"""What somebody else has put into an output directory is never lost, and nothing is written outside of it."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from eightfold.errors import CheckpointError, OutputError
from eightfold.format.growing import GrowingDirectory
from eightfold.format.journal import JOURNAL_NAME, WORK_NAME, Journal, read_entries, render
from eightfold.format.owned import claimed_files
from eightfold.format.writer import is_mount_point
from eightfold.quant.pipeline import _Job, quantize_checkpoint
from eightfold.quant.recipe import Recipe
from eightfold.scheme import QuantType
from tests.conftest import tiny_config, write_model
from tests.refusal import snapshot

pytestmark = pytest.mark.usefixtures("one_thread")

STEM = "quant_model_weight_w8a16"


@pytest.fixture
def source(tmp_path):
    model = write_model(tmp_path / "float", tiny_config("Qwen2ForCausalLM", num_hidden_layers=3), tokenizer=False)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    (model / "tokenizer_config.json").write_text("{}")
    return model


def quantize(source, target, kind=QuantType.W8A16, **options):
    return quantize_checkpoint(source, target, Recipe(kind), **options)


def begin(source, out, monkeypatch, step="layer 1"):
    """Leave what a run leaves that is killed just before a step, or the closing line, is written down."""
    append = Journal.append

    def kill(self, entry):
        if step in (entry.get("step"), *entry):
            raise KeyboardInterrupt
        append(self, entry)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Journal, "append", kill)
        patched.setattr(GrowingDirectory, "__exit__", lambda self, *_: self._unlock())
        quantize(source, out)


def refusal(source, out, kind=QuantType.W8A16, **options):
    """Quantize to where that must be refused without a trace; return the message."""
    before = snapshot(out.parent)
    with pytest.raises(OutputError) as error:
        quantize(source, out, kind, **options)
    assert snapshot(out.parent) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
        (folder / name).chmod(0o644)
    return {name: snapshot(folder / name) for name in names}


# --- beside what was begun


@pytest.mark.parametrize("step", ["embedding", "layer 1"])
@pytest.mark.parametrize("ends", ["well", "badly", "overwritten"])
def test_files_beside_what_was_begun_stay_as_they_are(tmp_path, source, monkeypatch, step, ends):
    out = tmp_path / "out"
    quantize(source, tmp_path / "whole")
    begin(source, out, monkeypatch, step)
    assert (out / f"{STEM}.safetensors").exists()
    names = ["model.safetensors", f"{STEM}-00001-of-00002.safetensors", "README.md", "mine/config.json"]
    mine = put(out, *names, "quant_model_weight_w8a8.safetensors")
    whole = tmp_path / "whole"
    if ends == "badly":
        monkeypatch.setattr("eightfold.quant.run.require_finite", bad_input)
        monkeypatch.setattr("eightfold.quant.layer.QuantizedLayer.tensors", bad_input)
        monkeypatch.setattr("eightfold.quant.tensor_writer.TensorWriter.copy", bad_input)
        with pytest.raises(CheckpointError):
            quantize(source, out)
        assert {name.split("/")[0] for name in mine} == {path.name for path in out.iterdir()}
    elif ends == "overwritten":
        quantize(source, out, QuantType.W8A8_DYNAMIC, overwrite=True)
        quantize(source, whole, QuantType.W8A8_DYNAMIC, overwrite=True)
    else:
        quantize(source, out)
    assert {name: snapshot(out / name) for name in mine} == mine
    if ends != "badly":
        made = {name: entry for name, entry in snapshot(out).items() if name not in mine and name != "mine"}
        assert made == snapshot(whole)


def bad_input(*_, **__):
    raise CheckpointError("bad input")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "additional_chat_templates/rag.jinja"])
def test_a_file_of_a_name_that_is_going_to_be_written_is_refused_at_once(tmp_path, source, monkeypatch, name):
    out = tmp_path / "out"
    begin(source, out, monkeypatch)
    put(out, name)
    assert refusal(source, out) == (
        f"output directory {out}: got files that `eightfold quantize` did not write ({name}), expected none of these "
        "names. Move them elsewhere and run the same command again, or choose another directory."
    )
    (out / name).unlink()
    assert quantize(source, out).layers_resumed == 1


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer_config.json", "additional_chat_templates", f"{STEM}.safetensors", WORK_NAME, "notes"],
)
@pytest.mark.parametrize("options", [{}, {"overwrite": True}])
def test_links_in_what_was_begun_are_refused(tmp_path, source, monkeypatch, name, options):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    begin(source, out, monkeypatch)
    if (out / name).exists():
        (out / name).rename(elsewhere)
    elif name == "additional_chat_templates":
        elsewhere.mkdir()
    else:
        elsewhere.write_text("mine")
    (out / name).symlink_to(elsewhere)
    for kind in (QuantType.W8A16, *([QuantType.W8A8_DYNAMIC] if options else [])):
        assert refusal(source, out, kind, **options) == (
            f"output directory {out}: got symbolic links in what was begun there ({name}), expected files of its own. "
            "Remove the links, or choose another directory."
        )


def test_a_journal_that_is_a_link_is_refused(tmp_path, source, monkeypatch):
    out = tmp_path / "out"
    begin(source, out, monkeypatch)
    (out / JOURNAL_NAME).rename(tmp_path / "journal")
    (out / JOURNAL_NAME).symlink_to(tmp_path / "journal")
    assert "got a symbolic link (eightfold_journal.jsonl)" in refusal(source, out)


# --- a journal that came from elsewhere


@pytest.mark.parametrize("is_complete", [False, True])
@pytest.mark.parametrize("kind", [QuantType.W8A16, QuantType.W8A8_DYNAMIC])
@pytest.mark.parametrize("options", [{}, {"overwrite": True}])
def test_a_copied_journal_makes_no_directory_ours(tmp_path, source, monkeypatch, is_complete, kind, options):
    made, out = tmp_path / "made", tmp_path / "out"
    quantize(source, made) if is_complete else begin(source, made, monkeypatch)
    shutil.copytree(source, out)
    shutil.copy(made / JOURNAL_NAME, out)
    message = refusal(source, out, kind, **options)
    if options:
        assert message == (
            f"output directory {out}: got a journal without the files that it tells of, expected both of one run. "
            "Choose another directory, or remove eightfold_journal.jsonl if the other files are yours."
        )


def forget_claims(out):
    """Make a journal one of the versions that did not say which files they were going to write."""
    entries = [entry for entry in read_entries(out) if "files" not in entry]
    (out / JOURNAL_NAME).write_bytes(b"".join(map(render, entries)))


@pytest.mark.parametrize("step", ["layer 1", "complete"])
@pytest.mark.parametrize("has_work", [True, False])
def test_what_an_older_version_has_begun_is_begun_anew_only_with_overwrite(
    tmp_path, source, monkeypatch, step, has_work
):
    out = tmp_path / "out"
    begin(source, out, monkeypatch, step)
    forget_claims(out)
    mine = put(out, "README.md", "mine/config.json")
    if not has_work:
        shutil.rmtree(out / WORK_NAME)
    for kind, more in ((QuantType.W8A16, ""), (QuantType.W8A8_DYNAMIC, "--scheme: w8a16 -> w8a8-dynamic; ")):
        assert refusal(source, out, kind) == (
            f"output directory {out}: got a model begun otherwise ({more}version of eightfold: one whose journal does "
            "not name its files), expected the same recipe and source. "
            "Choose another directory, or start over with --overwrite."
        )
    outcome = quantize(source, out, overwrite=True)
    assert not outcome.already_complete and not outcome.layers_resumed
    assert {name: snapshot(out / name) for name in mine} == mine
    quantize(source, tmp_path / "whole")
    made = {name: entry for name, entry in snapshot(out).items() if name not in mine and name != "mine"}
    assert made == snapshot(tmp_path / "whole")


def test_a_model_that_an_older_version_has_completed_is_complete(tmp_path, source):
    quantize(source, tmp_path / "out")
    forget_claims(tmp_path / "out")
    assert quantize(source, tmp_path / "out").already_complete


def test_names_in_a_journal_lead_nowhere_else(tmp_path):
    names = ["../secret", "/etc/passwd", "a/../../b", "", "config.json", "a/b.jinja"]
    assert claimed_files([{"files": names}, {"complete": {"../c": [1, 2], "d": [1, 2]}}]) == {
        "config.json",
        "a/b.jinja",
        "d",
    }


# --- beside a complete model


@pytest.fixture(params=["plain", "mount"])
def made(request, tmp_path, source, monkeypatch):
    """Return a complete model, in a directory or in a mount point."""
    out = tmp_path / "out"
    if request.param == "mount":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    quantize(source, out)
    return out


@pytest.mark.parametrize("journal", [True, False])
@pytest.mark.parametrize(
    "name", ["README.md", "notes.txt", "mine/a.json", "additional_chat_templates/own.jinja", "link"]
)
def test_overwrite_refuses_to_remove_what_it_has_not_written(tmp_path, source, made, journal, name):
    if not journal:
        (made / JOURNAL_NAME).unlink()
    if name == "link":
        (made / name).symlink_to(tmp_path)
    else:
        put(made, name)
    shown = "mine" if name.startswith("mine") else name
    assert refusal(source, made, QuantType.W8A8_DYNAMIC, overwrite=True) == (
        f"output directory {made}: got files that `eightfold quantize` did not write ({shown}), expected a model and "
        "nothing else, to replace it. Move them elsewhere and run the same command again, or choose another directory."
    )
    shutil.move(made / shown, tmp_path / "moved")
    quantize(source, made, QuantType.W8A8_DYNAMIC, overwrite=True)
    quantize(source, tmp_path / "new", QuantType.W8A8_DYNAMIC)
    assert snapshot(made) == snapshot(tmp_path / "new")


def test_a_file_that_comes_while_the_successor_is_made_is_not_lost(tmp_path, source, made, monkeypatch):
    old, write = snapshot(made), _Job._write_companions

    def meanwhile(*args):
        put(made, "README.md")
        write(*args)

    with monkeypatch.context() as patched, pytest.raises(OutputError) as error:
        patched.setattr(_Job, "_write_companions", meanwhile)
        quantize(source, made, QuantType.W8A8_DYNAMIC, overwrite=True)
    assert "did not write (README.md)" in str(error.value)
    assert {name: entry for name, entry in snapshot(made).items() if "partial" not in name} == {
        **old,
        "README.md": snapshot(made / "README.md")["."],
    }
    (made / "README.md").unlink()
    assert quantize(source, made, QuantType.W8A8_DYNAMIC, overwrite=True).already_complete
    quantize(source, tmp_path / "new", QuantType.W8A8_DYNAMIC)
    assert snapshot(made) == snapshot(tmp_path / "new")


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EBUSY])
def test_a_model_that_cannot_be_renamed_stays_and_so_does_its_successor(tmp_path, source, monkeypatch, number):
    out, rename = tmp_path / "out", Path.rename
    quantize(source, out)
    old = snapshot(out)

    def fail(self, to):
        if self == out:
            raise OSError(number, os.strerror(number))
        return rename(self, to)

    with monkeypatch.context() as patched, pytest.raises(OutputError) as error:
        patched.setattr(Path, "rename", fail)
        quantize(source, out, QuantType.W8A8_DYNAMIC, overwrite=True)
    beside = tmp_path / ".out.partial-quantize"
    assert str(error.value) == (
        f"output directory {out}: got one that cannot be renamed ({os.strerror(number)}), expected that it can change "
        f"places with {beside}, where the new model is complete. Nothing was replaced. "
        "Empty it yourself and run the same command again."
    )
    assert snapshot(out) == old
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial-quantize", "float", "out"]
    for path in out.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert quantize(source, out, QuantType.W8A8_DYNAMIC, overwrite=True).already_complete
    quantize(source, tmp_path / "new", QuantType.W8A8_DYNAMIC)
    assert snapshot(out) == snapshot(tmp_path / "new")


@pytest.fixture
def bound(tmp_path):
    """Return a directory over which another one of the same file system is mounted."""
    disk, target = tmp_path / "disk", tmp_path / "a target\twith \\"
    disk.mkdir()
    target.mkdir()
    if os.getuid() or subprocess.run(["mount", "--bind", disk, target], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield target
    subprocess.run(["umount", target], check=True)


def test_a_bound_directory_is_a_mount_point_and_its_model_is_replaced(tmp_path, source, bound):
    assert not os.path.ismount(bound)
    assert is_mount_point(bound)
    assert not is_mount_point(tmp_path)
    quantize(source, bound)
    quantize(source, bound, QuantType.W8A8_DYNAMIC, overwrite=True)
    quantize(source, tmp_path / "new", QuantType.W8A8_DYNAMIC)
    assert snapshot(bound) == snapshot(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
