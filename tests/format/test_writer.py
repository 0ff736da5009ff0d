"""A model directory that appears whole or not at all: shards, modes, targets, and every way to be cut short."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from eightfold.config import DType
from eightfold.errors import OutputError
from eightfold.format.safetensors import PlannedTensor, read_header
from eightfold.format.writer import OutputDirectory, ShardedWriter, split_shards, total_bytes, write_json
from tests.conftest import Result, tiny_config, token_samples, write_model
from tests.refusal import error_line, quantize_refused, refused, snapshot

EIGHTFOLD = [sys.executable, "-m", "eightfold"]
W8A16 = ["--scheme", "w8a16"]


def tensor(name: str, nbytes: int) -> PlannedTensor:
    return PlannedTensor(name, DType.I8, (nbytes,))


def names(shards: list[list[PlannedTensor]]) -> list[str]:
    return ["".join(tensor.name for tensor in shard) for shard in shards]


def make(target: Path, source: Path, marker: str = "new", *, overwrite: bool = False) -> None:
    """Make a directory that counts as a model and says who wrote it."""
    with OutputDirectory(target, source=source, overwrite=overwrite) as output:
        (output.path / "config.json").write_text(marker)


def siblings(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir() if path.name.startswith(f".{target.name}."))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- shards


@pytest.mark.parametrize(
    ("sizes", "part_bytes", "expected"),
    [
        ((4, 4, 4), None, ["abc"]),
        ((4, 4, 4), 100, ["abc"]),
        ((4, 4, 4), 12, ["ab", "c"]),  # a shard stays below the limit: reaching it starts a new one
        ((4, 4, 4), 13, ["abc"]),
        ((4, 4, 4), 9, ["ab", "c"]),
        ((4, 4, 4), 8, ["a", "b", "c"]),
        ((9, 1, 1), 5, ["a", "bc"]),  # a tensor above the limit stands alone
        ((1, 9, 1), 5, ["a", "b", "c"]),
        ((4, 4), 1, ["a", "b"]),
        ((0, 4, 0), 4, ["a", "b", "c"]),
        ((4, 1, 4, 1), 5, ["a", "b", "c", "d"]),
    ],
)
def test_a_shard_ends_before_the_tensor_that_would_reach_the_limit(sizes, part_bytes, expected):
    plan = [tensor(name, size) for name, size in zip("abcd", sizes, strict=False)]
    assert names(split_shards(plan, part_bytes)) == expected


def test_total_bytes_adds_up_the_data_of_all_dtypes():
    plan = [PlannedTensor(dtype.value, dtype, (2, 3)) for dtype in DType]
    assert total_bytes(plan) == 6 * (4 + 2 + 2 + 8 + 4 + 1)


def write_sharded(directory: Path, sizes: dict[str, int], part_bytes: int | None) -> None:
    writer = ShardedWriter(
        directory,
        "model",
        [tensor(name, size) for name, size in sizes.items()],
        part_bytes=part_bytes,
        metadata={"format": "pt"},
    )
    for i, (name, size) in enumerate(sizes.items()):
        writer.write(name, np.full(size, i, np.int8))
    writer.close()


def test_without_a_part_size_there_is_one_file_and_no_index(tmp_path):
    write_sharded(tmp_path, {"a": 3, "b": 5}, None)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert {name: t.tolist() for name, t in load_file(str(tmp_path / "model.safetensors")).items()} == {
        "a": [0] * 3,
        "b": [1] * 5,
    }


def test_shards_are_numbered_and_the_index_names_each_tensors_file(tmp_path):
    write_sharded(tmp_path, {"a": 3, "b": 5, "c": 1}, 7)
    first, second, index = sorted(tmp_path.iterdir())
    assert first.name == "model-00001-of-00002.safetensors"
    assert second.name == "model-00002-of-00002.safetensors"
    assert index.name == "model.safetensors.index.json"
    assert json.loads(index.read_text()) == {
        "metadata": {"total_size": 9},
        "weight_map": {"a": first.name, "b": second.name, "c": second.name},
    }
    assert sorted(read_header(first)) == ["a"]
    assert sorted(read_header(second)) == ["b", "c"]
    for shard in (first, second):
        with safe_open(str(shard), "pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_a_part_size_that_is_never_reached_still_numbers_and_indexes(tmp_path):
    write_sharded(tmp_path, {"a": 3}, 1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    ]


def test_quantize_splits_and_the_result_holds_the_same_tensors(cli, tmp_path, float_model):
    assert cli("quantize", float_model, tmp_path / "one", *W8A16).code == 0
    assert cli("quantize", float_model, tmp_path / "many", *W8A16, "--part-size-gb", 3e-5).code == 0
    parts = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(parts) > 2
    assert parts[0].name == f"quant_model_weight_w8a16-00001-of-{len(parts):05d}.safetensors"
    assert all(sum(info.nbytes for info in read_header(part).values()) < 3e-5 * 2**30 for part in parts)
    joined = {name: t for part in parts for name, t in load_file(str(part)).items()}
    whole = load_file(str(tmp_path / "one" / "quant_model_weight_w8a16.safetensors"))
    assert joined.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(whole[name], joined[name])] == []


@pytest.mark.parametrize("size", ["inf", "1e308"])
def test_a_part_size_without_end_is_refused(cli, float_model, size):
    message = quantize_refused(cli, float_model, "--part-size-gb", size)
    assert message == f"--part-size-gb: got {float(size)}, expected a finite number"


# --- JSON


def test_json_is_indented_unescaped_and_ends_with_a_newline(tmp_path):
    write_json(tmp_path / "f.json", {"a": ["é"]})
    assert (tmp_path / "f.json").read_text(encoding="utf-8") == '{\n    "a": [\n        "é"\n    ]\n}\n'


def test_half_a_surrogate_pair_survives_as_an_escape(tmp_path):
    write_json(tmp_path / "f.json", {"a": "\ud800"})
    assert (tmp_path / "f.json").read_bytes() == b'{\n    "a": "\\ud800"\n}\n'
    assert json.loads((tmp_path / "f.json").read_bytes()) == {"a": "\ud800"}


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
    assert modes == {".safetensors": 0o400, ".json": 0o600, ".jinja": 0o600}
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


def test_overwrite_does_not_replace_what_is_no_model(cli, float_model):
    target = float_model.parent / "out"
    target.mkdir()
    (target / "thesis.tex").write_text("years of work")
    assert quantize_refused(cli, float_model, "--overwrite") == (
        f"output directory {target}: got files that are no model (there is no config.json), "
        "expected a model directory to replace. Choose another, or empty it yourself."
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
    assert message == f"cannot write to {target}: File exists. Choose a directory you may write to."


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


# --- real processes


@pytest.fixture(scope="module")
def long_job(tmp_path_factory) -> Callable[[Path], list[str]]:
    """Return how to start a quantization that runs for many seconds."""
    folder = tmp_path_factory.mktemp("long")
    source = write_model(folder / "float", tiny_config(num_hidden_layers=150), tokenizer=False)
    samples = [(sample * 40)[:128] for sample in token_samples(200)]
    (folder / "ids").write_text("\n".join(map(json.dumps, samples)))
    return lambda out: [*EIGHTFOLD, "quantize", source, out, "--scheme", "w8a8", "--calib-ids", folder / "ids"]


def start_and_wait_until_it_writes(command: list[str], target: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=target.parent
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
