"""The readers read what random inputs are made from, and the driver notices what it is there to notice."""

from __future__ import annotations

import json
import random

import pytest

from eightfold.errors import InputError
from tests.fuzz import driver
from tests.fuzz.__main__ import main
from tests.fuzz.mutate import mutate, mutate_bytes
from tests.fuzz.targets import TARGETS

SLOW = {"gguf", "checkpoint", "forms", "template"}  # to make, or to end


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_read(tmp_path, name):
    target = TARGETS[name]
    seeds = target.seeds(tmp_path)
    read = target.make(tmp_path)
    assert seeds
    for seed in seeds:
        read(seed)


@pytest.mark.parametrize("name", sorted(TARGETS.keys() - SLOW))
def test_a_few_mutated_inputs(tmp_path, name):
    """Always the same ones; `python -m tests.fuzz` tries others."""
    (tmp_path / "work").mkdir()
    run = driver.Run(name, tmp_path)
    driver.without_atheris(run, 0, 100, seed=1)
    assert run.state["crashes"] == []
    assert run.state["read"] < run.state["inputs"] == 100


class TwoLinesError(InputError):
    """An error that does not keep to one line."""

    def __str__(self) -> str:
        return "two\nlines"


def fails_as(what):
    def read(data: bytes) -> None:
        if isinstance(what, BaseException):
            raise what

    return read


@pytest.mark.parametrize(
    ("what", "found"),
    [
        (None, None),
        (InputError("as it should be"), None),
        (TwoLinesError("x"), "a message of "),
        (KeyError("x"), "KeyError at the target"),
        (RecursionError("deep"), "RecursionError at the target"),
        (MemoryError(), "MemoryError at the target"),
    ],
)
def test_what_counts_as_a_failure(tmp_path, what, found):
    (tmp_path / "work").mkdir()
    run = driver.Run("config", tmp_path)
    run.read = fails_as(what)
    run.one(b"input")
    crashes = run.state["crashes"]
    assert [crash[0].startswith(found) for crash in crashes] == [True] * (found is not None)
    assert all((tmp_path / "crash-1").read_bytes() == b"input" for _ in crashes)


def test_slow_and_large_inputs_are_failures(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    run = driver.Run("config", tmp_path)
    monkeypatch.setattr(driver, "SECONDS", -1)
    monkeypatch.setattr(driver, "BYTES", -1)
    run.read = fails_as(None)
    run.one(b"input")
    assert [crash[0][:6] for crash in run.state["crashes"]] == ["takes ", "memory"]


def test_memory_is_what_a_reader_takes_for_its_inputs(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    run = driver.Run("config", tmp_path)
    peaks = iter((100, 130, 5000, 5000, 6000, 6010))
    monkeypatch.setattr(driver, "_peak_bytes", lambda: next(peaks))
    run.read = fails_as(None)
    before = run.state["peak"] or run._before
    for _ in range(3):
        run.one(b"input")
    run.write()
    assert run.state["peak"] == before + 30 + 0 + 10


def test_mutations_differ_and_repeat():
    seed = json.dumps({"a": [1, 2, {"b": "text"}]}).encode()
    found = [
        mutate(seed, random.Random(at), 1000, lambda data: mutate_bytes(data, random.Random(1))) for at in range(99)
    ]
    assert found == [
        mutate(seed, random.Random(at), 1000, lambda data: mutate_bytes(data, random.Random(1))) for at in range(99)
    ]
    assert len(set(found)) > 60
    assert all(len(each) <= 1000 for each in found)


def test_the_table_tells_what_each_reader_got(capfd, tmp_path):
    assert main(["config", "journal", "--runs", "100", "--blind", "--out", str(tmp_path / "out")]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["reader", "config", "journal"]
    assert int(lines[3].split()[0]) >= 100
    assert lines[1].endswith("nothing")


def test_an_input_again(capfd, tmp_path):
    path = tmp_path / "input"
    path.write_bytes(b"{}")
    assert main(["config", "--replay", str(path)]) == 0
    assert "config                       1         0" in capfd.readouterr().out
