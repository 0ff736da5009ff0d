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
from eightfold.format.journal import JOURNAL_NAME, layers_done, partial_path, read_entries
from eightfold.format.output import Output
from tests.conftest import Result, tiny_config, token_samples, write_model
from tests.format import make, output, siblings
from tests.refusal import error_line, quantize_refused, refused, snapshot

EIGHTFOLD = [sys.executable, "-m", "eightfold"]
W8A16 = ["--scheme", "w8a16", "--calib", "none"]


# --- failures on the way


def test_a_failure_leaves_nothing_and_keeps_the_old_model(tmp_path):
    make(tmp_path / "out")
    before = snapshot(tmp_path)
    with pytest.raises(ZeroDivisionError), output(tmp_path / "out", overwrite=True) as made:
        (made.path / "config.json").write_text("half")
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


@pytest.mark.parametrize("error", [OSError(errno.EBUSY, "busy"), KeyboardInterrupt()])
def test_an_old_model_survives_a_replacement_that_fails_at_the_last_step(tmp_path, monkeypatch, error):
    target, rename = tmp_path / "out", Path.rename
    make(target, "old")
    before = snapshot(target)

    def fail(self: Path, to: Path) -> Path:
        if self.name == ".out.partial":
            raise error
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt):
        make(target, overwrite=True)
    assert snapshot(target) == before


def test_too_little_space_is_known_before_anything_is_written(cli, float_model, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=20_000_000))
    assert quantize_refused(cli, float_model, "--calib", "none") == (
        f"disk space for {float_model.parent}/out: got 20.0 MB free, expected 67.2 MB. "
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
    grows = partial_path(target)
    assert message.endswith(f"1 of 2 layers are finished in {grows}. Run the same command to go on there.")
    assert cli(*command, "--json").json()["layers_resumed"] == 1
    assert cli("quantize", float_model, target.parent / "whole", *W8A16).code == 0
    assert snapshot(target) == snapshot(target.parent / "whole")


@pytest.mark.parametrize("writes", [0, 3, 20, 45])
def test_no_file_stays_open_after_a_failure(cli, float_model, monkeypatch, writes):
    fill_disk_after(monkeypatch, writes)
    assert cli("quantize", float_model, float_model.parent / "out", *W8A16, "--part-size-gb", 1e-5).code == 2
    open_files = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert [path for path in open_files if str(float_model.parent / ".out") in path] == []


# --- other runs to the same place


@pytest.mark.parametrize("name", ["out", "out[1]", "o*t"])
def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path, name):
    target = tmp_path / name
    left = Output.__exit__
    with pytest.MonkeyPatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(Output, "__exit__", lambda self, *_: self._journal.close())
        with output(target) as killed:
            (killed.path / "model.safetensors").write_bytes(b"x" * 1000)
            (killed.path / "folder").mkdir()
            raise ZeroDivisionError
    assert Output.__exit__ is left
    assert siblings(target) == [f".{name}.partial"]
    make(target)
    assert siblings(target) == []
    assert sorted(path.name for path in target.iterdir()) == ["config.json", JOURNAL_NAME, "model.safetensors"]


def test_the_second_of_two_writers_is_refused_at_once(tmp_path):
    target = tmp_path / "out"
    with output(target) as first:
        with pytest.raises(OutputError) as error:
            make(target, "second", overwrite=True)
        (first.path / "config.json").write_text("first")
        first.finish({})
    assert str(error.value) == (
        f"output directory {target}: got another process that is writing there, expected none. "
        "Wait for it, or choose another directory."
    )
    assert (target / "config.json").read_text() == "first"
    assert siblings(target) == []


@pytest.mark.parametrize("moment", ["locked", "open"])
def test_a_place_that_is_renamed_while_it_is_opened_is_made_anew(tmp_path, monkeypatch, moment):
    """Another process finishes between two looks of this one."""
    target, flock, others = tmp_path / "out", fcntl.flock, []

    def finished_meanwhile(file: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        others.append(file)
        partial_path(target).rename(tmp_path / "elsewhere")
        if moment == "locked":
            flock(file, how)

    monkeypatch.setattr(fcntl, "flock", finished_meanwhile)
    make(target)
    assert others
    assert (target / "config.json").read_text() == "new"


def test_files_that_another_process_puts_there_meanwhile_are_kept(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(OutputError) as error, output(target) as made:
        target.mkdir()
        (target / "config.json").write_text("first")
        made.finish({})
    assert str(error.value) == (
        f"output directory {target}: got files that another process put there meanwhile, expected an empty one. "
        "Nothing was replaced; run again with another directory."
    )
    assert [path.name for path in target.iterdir()] == ["config.json"]


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
    while layers_done(read_entries(partial_path(target)) or []) < layers:
        assert process.poll() is None, process.communicate()  # not refused, not done
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def ended_by(number: int, process: subprocess.Popen[str], target: Path) -> str:
    """Send a signal; return what the run says, without how much is finished and how to go on."""
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    message, grows = error_line(Result(process.returncode, out, err)), partial_path(target)
    done = layers_done(read_entries(grows))
    assert 2 <= done < 150
    assert out == ""
    word, said = message.split(": ", 1)
    assert said == f"{done} of 150 layers are finished in {grows}. Run the same command to go on there."
    return word


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGHUP, "terminated")])
def test_a_signal_ends_a_run_in_one_line_that_says_how_to_go_on(tmp_path, long_job, number, word):
    target = tmp_path / "out"
    assert ended_by(number, start_and_wait(long_job(target), target), target) == word


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
    assert ended_by(signal.SIGTERM, process, target) == "terminated"
    done = layers_done(read_entries(partial_path(target)))
    for words in (["inspect"], ["check"], ["eval"], ["run", "--prompt", "a"], ["bench"]):
        for model in (target, partial_path(target)):
            message = refused(cli, words[0], model, *words[1:], within=partial_path(target))
            assert message == (
                f"unfinished model {model}: got {done} of 150 layers, expected a complete one. "
                "Run the `eightfold quantize` command that began it again."
            )


def test_a_file_size_limit_ends_a_run_in_one_line_and_leaves_nothing(cli, float_model):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        message = quantize_refused(cli, float_model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert message == "File too large. The file size limit is too small; nothing was left half-written."
