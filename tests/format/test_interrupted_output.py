"""A model directory that appears not at all: every way to be cut short, and other runs to the same place."""

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
from eightfold.format.writer import OutputDirectory
from tests.conftest import Result, tiny_config, token_samples, write_model
from tests.format import make, siblings
from tests.refusal import error_line, quantize_refused, snapshot

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
    write_model(float_model.parent / "out", seed=1)
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


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "No space left on device. Free some space, or choose another disk;"),
        (errno.EDQUOT, "Disk quota exceeded. Your disk quota is used up;"),
    ],
)
def test_a_disk_that_fills_up_in_the_middle_leaves_nothing(cli, float_model, monkeypatch, number, message):
    write, written = os.pwrite, []

    def fill(fd: int, data: bytes, at: int) -> int:
        written.append(len(data))
        if sum(written) > 100_000:
            raise OSError(number, os.strerror(number))
        return write(fd, data, at)

    monkeypatch.setattr(os, "pwrite", fill)
    assert quantize_refused(cli, float_model) == f"{message} nothing was left half-written."
    assert len(written) > 10


@pytest.mark.parametrize("writes", [0, 3, 20])
def test_no_file_stays_open_after_a_failure(cli, float_model, monkeypatch, writes):
    write, written = os.pwrite, []

    def fill(fd: int, data: bytes, at: int) -> int:
        written.append(len(data))
        if len(written) > writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data, at)

    monkeypatch.setattr(os, "pwrite", fill)
    quantize_refused(cli, float_model, "--part-size-gb", 1e-5)
    open_files = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert [path for path in open_files if ".partial-" in path] == []


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


def start_and_wait_until_it_writes(command: list[str], target: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=target.parent,
        preexec_fn=hear_signals,
    )
    deadline = time.monotonic() + 60
    while not list(target.parent.glob(f".{target.name}.partial-*/*.safetensors")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.parametrize(
    ("number", "word"),
    [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated"), (signal.SIGHUP, "terminated")],
    ids=["SIGINT", "SIGTERM", "SIGHUP"],
)
def test_a_signal_ends_a_run_in_one_line_and_leaves_nothing(tmp_path, long_job, number, word):
    process = start_and_wait_until_it_writes(long_job(tmp_path / "out"), tmp_path / "out")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert error_line(Result(process.returncode, out, err)) == (
        f"{word}: nothing was left half-written. Run the same command to start again."
    )
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_no_target_and_the_next_run_removes_the_rest(cli, tmp_path, long_job):
    target = tmp_path / "out"
    process = start_and_wait_until_it_writes(long_job(target), target)
    process.kill()
    process.communicate(timeout=60)
    assert not target.exists()
    assert len(siblings(target)) == 1
    assert cli("quantize", write_model(tmp_path / "float"), target, *W8A16).code == 0
    assert (target / "quant_model_description.json").is_file()
    assert siblings(target) == []


def test_a_file_size_limit_ends_a_run_in_one_line_and_leaves_nothing(tmp_path, float_model):
    before = snapshot(tmp_path)
    command = [*EIGHTFOLD, "quantize", float_model, tmp_path / "out", *W8A16]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert error_line(Result(done.returncode, done.stdout, done.stderr)) == (
        "File too large. The file size limit is too small; nothing was left half-written."
    )
    assert snapshot(tmp_path) == before
