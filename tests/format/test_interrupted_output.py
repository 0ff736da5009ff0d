"""Every way to be cut short, and other runs to the same place."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from eightfold.errors import OutputError
from eightfold.format.journal import layers_done, read_entries
from eightfold.format.writer import OutputDirectory
from tests.conftest import Result, tiny_config, token_samples, write_model
from tests.format import make, siblings
from tests.refusal import error_line, quantize_refused, refused, snapshot

EIGHTFOLD = [sys.executable, "-m", "eightfold"]
W8A16 = ["--scheme", "w8a16"]


# --- failures on the way


def test_a_failure_leaves_nothing_and_keeps_the_old_model(tmp_path, float_model):
    target = write_model(tmp_path / "out")
    before = snapshot(tmp_path)
    with (
        pytest.raises(ZeroDivisionError),
        OutputDirectory(target, source=float_model, overwrite=True) as output,
    ):
        (output.path / "config.json").write_text("half")
        raise ZeroDivisionError
    assert snapshot(tmp_path) == before


def test_a_quantization_that_fails_in_the_last_layer_keeps_the_old_model(cli, float_model):
    assert cli("quantize", float_model, float_model.parent / "out", *W8A16).code == 0
    weights = load_file(str(float_model / "model.safetensors"))
    weights["lm_head.weight"][3, 4] = float("nan")
    save_file(weights, str(float_model / "model.safetensors"))
    assert quantize_refused(cli, float_model, "--overwrite") == (
        f"lm_head.weight[3, 4] in {float_model}/model.safetensors: got nan, expected a finite number. "
        "The weights are damaged; fetch the model again."
    )


def failing_rename(monkeypatch: pytest.MonkeyPatch, to: Path, error: BaseException) -> None:
    rename = Path.rename

    def fail_once(self: Path, target: Path) -> Path:
        if target == to and ".partial-" in self.name:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)


@pytest.mark.parametrize("error", [OSError(errno.EBUSY, "busy"), KeyboardInterrupt()])
def test_an_old_model_survives_a_replacement_that_fails_at_the_last_step(tmp_path, float_model, monkeypatch, error):
    target = write_model(tmp_path / "out")
    before = snapshot(tmp_path)
    failing_rename(monkeypatch, target, error)
    with pytest.raises(type(error)):
        make(target, float_model, overwrite=True)
    assert snapshot(tmp_path) == before


def set_aside(target):
    """Leave a model as a run leaves it that is killed between its two renames."""
    aside = target.parent / f".{target.name}.replaced-abc"
    aside.mkdir()
    target.rename(aside / "old")
    return aside


def test_an_old_model_set_aside_by_a_killed_run_is_put_back(tmp_path, float_model):
    target = write_model(tmp_path / "out")
    before = snapshot(target)
    aside = set_aside(target)
    with pytest.raises(OutputError, match="a directory that is not empty"):
        OutputDirectory(target, source=float_model)
    assert snapshot(target) == before
    assert not aside.exists()


def test_an_old_model_set_aside_is_removed_once_there_is_a_new_one(tmp_path, float_model):
    target = tmp_path / "out"
    aside = set_aside(write_model(target))
    write_model(target)
    make(target, float_model, overwrite=True)
    assert not aside.exists()


def test_too_little_space_is_known_before_anything_is_written(cli, float_model, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=20_000_000))
    assert quantize_refused(cli, float_model) == (
        f"disk space for {float_model.parent}/out: got 0.02 GB free, expected 0.07 GB. "
        "Free some space, or choose another disk."
    )


def fill_disk_after(monkeypatch: pytest.MonkeyPatch, writes: int, number: int = errno.ENOSPC) -> None:
    write, written = os.pwrite, []

    def fill(fd: int, data: bytes, at: int) -> int:
        written.append(len(data))
        if len(written) > writes:
            raise OSError(number, os.strerror(number))
        return write(fd, data, at)

    monkeypatch.setattr(os, "pwrite", fill)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "No space left on device. Free some space, or choose another disk;"),
        (errno.EDQUOT, "Disk quota exceeded. Your disk quota is used up;"),
    ],
)
def test_a_disk_that_fills_up_before_a_step_is_finished_leaves_nothing(cli, float_model, monkeypatch, number, message):
    fill_disk_after(monkeypatch, 2, number)
    assert quantize_refused(cli, float_model) == f"{message} nothing was left half-written."


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fills_up_in_the_middle_leaves_what_is_finished(cli, float_model, monkeypatch, number):
    target = float_model.parent / "out"
    command = ("quantize", float_model, target, *W8A16)
    with monkeypatch.context() as full:
        fill_disk_after(full, 45, number)
        message = error_line(cli(*command))
    assert message.startswith(os.strerror(number))
    assert message.endswith(f"1 of 2 layers are finished in {target}. Run the same command to go on there.")
    assert cli(*command, "--json").json()["layers_resumed"] == 1
    assert cli("quantize", float_model, target.parent / "whole", *W8A16).code == 0
    assert snapshot(target) == snapshot(target.parent / "whole")


@pytest.mark.parametrize("writes", [0, 3, 20, 45])
def test_no_file_stays_open_after_a_failure(cli, float_model, monkeypatch, writes):
    fill_disk_after(monkeypatch, writes)
    assert cli("quantize", float_model, float_model.parent / "out", *W8A16, "--part-size-gb", 1e-5).code == 2
    open_files = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert [path for path in open_files if str(float_model.parent / "out") in path] == []


# --- other runs to the same place


def leftover(target: Path, number: int = 1) -> Path:
    """Make what a killed run leaves."""
    path = target.parent / f".{target.name}.partial-{number}"
    path.mkdir()
    (path / ".lock").touch()
    (path / "model.safetensors").write_bytes(b"x" * 1000)
    return path


@pytest.mark.parametrize("name", ["out", "out[1]", "o*t"])
def test_what_killed_runs_left_is_removed_by_the_next(tmp_path, float_model, name):
    leftover(tmp_path / name, 1)
    leftover(tmp_path / name, 2)
    make(tmp_path / name, float_model)
    assert siblings(tmp_path / name) == []
    assert (tmp_path / name / "config.json").read_text() == "new"


def test_what_a_living_run_writes_is_kept(tmp_path, float_model):
    living = leftover(tmp_path / "out")
    with (living / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = snapshot(living)
        make(tmp_path / "out", float_model)
        assert snapshot(living) == before
    assert (tmp_path / "out" / "config.json").read_text() == "new"


def test_hidden_siblings_of_other_names_or_without_a_lock_are_kept(tmp_path, float_model):
    other = leftover(tmp_path / "out2")
    bare = tmp_path / ".out.partial-mine"
    bare.mkdir()
    (tmp_path / ".out.partial-file").touch()
    make(tmp_path / "out", float_model)
    assert (other / "model.safetensors").exists()
    assert bare.exists()
    assert (tmp_path / ".out.partial-file").exists()


def test_the_second_of_two_writers_loses_and_the_first_result_stays_whole(tmp_path, float_model):
    target = tmp_path / "out"
    with (
        pytest.raises(OutputError) as error,
        OutputDirectory(target, source=float_model) as second,
    ):
        (second.path / "config.json").write_text("second")
        make(target, float_model, "first")
    assert str(error.value) == (
        f"output directory {target}: got files that another process put there meanwhile, expected an empty one. "
        "Nothing was replaced; run again with another directory."
    )
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert (target / "config.json").read_text() == "first"
    assert siblings(target) == []


def test_the_second_of_two_writers_replaces_the_first_with_overwrite(tmp_path, float_model):
    target = tmp_path / "out"
    with OutputDirectory(target, source=float_model, overwrite=True) as second:
        (second.path / "config.json").write_text("second")
        make(target, float_model, "first")
    assert (target / "config.json").read_text() == "second"
    assert siblings(target) == []


# --- real processes


@pytest.fixture(scope="module")
def long_job(tmp_path_factory) -> Callable[[Path], list[str]]:
    """Return how to start a quantization that runs for many seconds."""
    folder = tmp_path_factory.mktemp("long")
    source = write_model(folder / "float", tiny_config(num_hidden_layers=150), tokenizer=False)
    samples = [(sample * 40)[:128] for sample in token_samples(200)]
    (folder / "ids").write_text("\n".join(map(json.dumps, samples)))
    return lambda out: [*EIGHTFOLD, "quantize", source, out, "--scheme", "w8a8", "--calib-ids", folder / "ids"]


def hear_signals() -> None:
    """Undo what the tests' own caller may ignore: under nohup a hang-up is, and a child inherits that."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start_and_wait(command: list[str], target: Path, layers: int = 2) -> subprocess.Popen[str]:
    """Start a quantization and wait until so many layers are finished."""
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=target.parent,
        preexec_fn=hear_signals,
    )
    deadline = time.monotonic() + 60
    while layers_done(read_entries(target) or []) < layers:
        assert process.poll() is None, process.communicate()  # not refused, not done
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.parametrize(
    ("number", "word"),
    [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated"), (signal.SIGHUP, "terminated")],
    ids=["SIGINT", "SIGTERM", "SIGHUP"],
)
def test_a_signal_ends_a_run_in_one_line_that_says_how_to_go_on(tmp_path, long_job, number, word):
    target = tmp_path / "out"
    process = start_and_wait(long_job(target), target)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    message = error_line(Result(process.returncode, out, err))
    done = layers_done(read_entries(target))
    assert message == f"{word}: {done} of 150 layers are finished in {target}. Run the same command to go on there."
    assert out == ""
    assert 2 <= done < 150


def test_a_second_process_is_refused_and_an_unfinished_model_by_what_would_read_it(cli, tmp_path, long_job):
    target = tmp_path / "out"
    command = long_job(target)
    process = start_and_wait(command, target)
    for options in ((), ("--overwrite",)):
        assert error_line(cli(*command[3:], *options)) == (
            f"output directory {target}: got another process that is writing there, expected none. "
            "Wait for it, or choose another directory."
        )
    assert process.poll() is None
    process.kill()
    process.communicate(timeout=60)
    done = layers_done(read_entries(target))
    for words in (["inspect"], ["check"], ["eval"], ["run", "--prompt", "a"], ["bench"]):
        message = refused(cli, words[0], target, *words[1:], within=target)
        assert message == (
            f"unfinished model {target}: got {done} of 150 layers, expected all of them, the head and the closing line "
            "of its journal. Run the `eightfold quantize` command that began it again: it goes on where it stopped."
        )


def test_a_file_size_limit_ends_a_run_in_one_line_and_leaves_nothing(tmp_path, float_model):
    before = snapshot(tmp_path)
    command = [*EIGHTFOLD, "quantize", float_model, tmp_path / "out", *W8A16]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert error_line(Result(done.returncode, done.stdout, done.stderr)) == (
        "File too large. The file size limit is too small; nothing was left half-written."
    )
    assert snapshot(tmp_path) == before
