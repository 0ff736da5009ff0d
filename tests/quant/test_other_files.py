"""What somebody else has put into an output directory is never lost."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from eightfold.errors import OutputError
from eightfold.format.journal import JOURNAL_NAME, Journal
from eightfold.format.output import Output
from eightfold.quant import pipeline
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.recipe import Recipe
from eightfold.scheme import QuantType
from eightfold.synth.checkpoint import synthesize
from tests.conftest import tiny_config, write_model
from tests.refusal import snapshot

pytestmark = pytest.mark.usefixtures("one_thread")


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
        patched.setattr(Output, "__exit__", lambda self, *_: self._journal.close())
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
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
        (folder / name).chmod(0o644)
    return {name: snapshot(folder / name) for name in names}


# --- beside what was begun


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_that_come_where_the_model_is_going_to_be_are_not_lost(tmp_path, source, monkeypatch, overwrite):
    out = tmp_path / "out"
    begin(source, out, monkeypatch)
    put(out, "config.json", "mine/model.safetensors")
    message = refusal(source, out, overwrite=overwrite)
    if overwrite:
        assert "got files that `eightfold quantize` did not write (config.json, mine/model.safetensors)" in message
    else:
        assert "got a directory that is not empty, expected a new or empty one" in message
    shutil.rmtree(out)
    assert quantize(source, out, overwrite=overwrite).layers_resumed == 1


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_a_hidden_sibling_of_somebody_else_is_left_alone(tmp_path, source, kind):
    out, beside = tmp_path / "out", tmp_path / ".out.partial"
    if kind == "link":
        (tmp_path / "mine").mkdir()
        beside.symlink_to(tmp_path / "mine")
    else:
        put(beside, "thesis.txt")
    assert refusal(source, out, overwrite=True) == (
        f"{beside}, where the output grows: got files that eightfold did not write, expected nothing there. "
        "Move them elsewhere and run the same command again."
    )


def test_a_journal_that_is_a_link_is_refused(tmp_path, source, monkeypatch):
    out, journal = tmp_path / "out", tmp_path / ".out.partial" / JOURNAL_NAME
    begin(source, out, monkeypatch)
    journal.rename(tmp_path / "journal")
    journal.symlink_to(tmp_path / "journal")
    assert refusal(source, out).startswith(f"{journal}, which a run has begun: got a link, expected a file that has ")


# --- a journal that came from elsewhere


@pytest.mark.parametrize("is_complete", [False, True])
@pytest.mark.parametrize("kind", [QuantType.W8A16, QuantType.W8A8_DYNAMIC])
@pytest.mark.parametrize("options", [{}, {"overwrite": True}])
def test_a_copied_journal_makes_no_directory_ours(tmp_path, source, monkeypatch, is_complete, kind, options):
    made, out = tmp_path / "made", tmp_path / "out"
    quantize(source, made) if is_complete else begin(source, made, monkeypatch)
    shutil.copytree(source, out)
    shutil.copy((made if is_complete else tmp_path / ".made.partial") / JOURNAL_NAME, out)
    message = refusal(source, out, kind, **options)
    if options:
        assert "got files that `eightfold quantize` did not write (additional_chat_templates/rag.jinja, " in message


def test_the_model_of_another_command_is_not_replaced(tmp_path, source):
    out = tmp_path / "out"
    quantize(source, out)
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match=r"`eightfold synth` did not write \(additional_chat_templates/rag.jinja, "):
        synthesize("llama3.2-1b", out, layers=1, overwrite=True)
    assert snapshot(tmp_path) == before


# --- beside a complete model


@pytest.fixture
def made(tmp_path, source):
    """Return a complete model."""
    quantize(source, tmp_path / "out")
    return tmp_path / "out"


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
    assert refusal(source, made, QuantType.W8A8_DYNAMIC, overwrite=True) == (
        f"output directory {made}: got files that `eightfold quantize` did not write ({name}), expected a model and "
        "nothing else, to replace it. Move them elsewhere and run the same command again, or choose another directory."
    )
    shutil.move(made / name, tmp_path / "moved")
    quantize(source, made, QuantType.W8A8_DYNAMIC, overwrite=True)
    quantize(source, tmp_path / "new", QuantType.W8A8_DYNAMIC)
    assert snapshot(made) == snapshot(tmp_path / "new")


def test_a_file_that_comes_while_the_successor_is_made_is_not_lost(tmp_path, source, made, monkeypatch):
    old, write = snapshot(made), pipeline._write_companions

    def meanwhile(*args):
        put(made, "README.md")
        write(*args)

    with monkeypatch.context() as patched, pytest.raises(OutputError) as error:
        patched.setattr(pipeline, "_write_companions", meanwhile)
        quantize(source, made, QuantType.W8A8_DYNAMIC, overwrite=True)
    assert "did not write (README.md)" in str(error.value)
    assert snapshot(made) == {
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
    beside = tmp_path / ".out.partial"
    assert str(error.value) == (
        f"output directory {out}: got one that cannot be renamed ({os.strerror(number)}), expected that it can change "
        f"places with {beside}, where the new model is complete. Nothing was replaced. "
        "Empty it yourself and run the same command again."
    )
    assert snapshot(out) == old
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "float", "out"]
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


def test_a_mount_point_is_refused_before_any_work(tmp_path, source, bound):
    assert not os.path.ismount(bound)  # of the same file system
    for options in ({}, {"overwrite": True}):
        assert refusal(source, bound, **options) == (
            f"output directory {shown(bound)}: got a mount point, which cannot be renamed, expected a directory. "
            f"Choose a directory inside it, such as {shown(bound)}/model."
        )
    quantize(source, bound / "model")
    quantize(source, tmp_path / "new")
    assert snapshot(bound / "model") == snapshot(tmp_path / "new")


def shown(path):
    """Return a path as it is in a message of one line."""
    return " ".join(str(path).split())
