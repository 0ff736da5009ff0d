"""A quantization that meets a full disk, a broken one or the end of memory at any moment: one line, nothing lost."""

from __future__ import annotations

import json

import pytest

from eightfold.format.journal import partial_path
from tests.conftest import tiny_config, token_samples, write_model
from tests.quant.killing import FAULTS, failing_after
from tests.refusal import error_line, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {
    "m4 fa level": ("--scheme", "w8a8", "--anti-outlier", "m4", "--fa-quant", "--disable-level", "L1"),
    "w8a16": ("--scheme", "w8a16"),
    "kv mix": ("--scheme", "w8a8-mix", "--kv-int8", "--part-size-gb", "0.00005"),
}
WORDS = {
    "full disk": "No space left on device",
    "broken disk": "Input/output error",
    "no memory": "out of memory",
    "torch without memory": "out of memory",
}

ADVICE = (
    "Free some space, or choose another disk",
    "see the system's log; ",
    "Choose a directory you may write to.",
    "Run the same command to go on there.",
    "run the same command again.",
    "Close other programs, or use a smaller model.",
)


class Place:
    """A float model, what it becomes, and something of the user's beside it."""

    def __init__(self, folder, cli, monkeypatch, options):
        self.folder, self._cli, self._monkeypatch = folder, cli, monkeypatch
        self.source = write_model(folder / "float", tiny_config(num_hidden_layers=2), tokenizer=False)
        (folder / "mine.txt").write_text("mine")
        (folder / "ids.jsonl").write_text("".join(f"{json.dumps(ids)}\n" for ids in token_samples(3)))
        self.out = folder / "out"
        calib = () if "w8a16" in options else ("--calib-ids", folder / "ids.jsonl")
        self.command = ("quantize", self.source, self.out, *options, *calib)
        self.untouched = self.others()

    def others(self):
        """Return everything that is not made here."""
        names = sorted(path.name for path in self.folder.iterdir())
        return {name: snapshot(self.folder / name) for name in names if name not in ("out", ".out.partial")}

    def make(self, *options):
        made = self._cli(*self.command, *options)
        assert made.code == 0, made.err
        return snapshot(self.out)

    def meet(self, at, fault, expected, earlier=None, options=()):
        """Run with a fault at one operation, and then without; return whether there were so many operations."""
        with failing_after(at, fault, self._monkeypatch) as watch:
            met = self._cli(*self.command, *options)
        if met.code == 0:
            assert "Traceback" not in met.err
        else:
            message = error_line(met)
            assert WORDS[fault] in message, message
            assert any(advice in message for advice in ADVICE), message
            assert len(message) < 600 + 3 * len(str(self.folder)), message
            assert snapshot(self.out) in ([{}] if earlier is None else [earlier, expected]), (at, message)
        assert self.others() == self.untouched, at
        assert self.make(*options) == expected, at
        assert not partial_path(self.out).exists(), at
        return watch.seen > at


@pytest.fixture
def place(tmp_path, cli, monkeypatch):
    return lambda options: Place(tmp_path, cli, monkeypatch, OPTIONS[options])


def remove(path):
    for entry in sorted(path.rglob("*"), reverse=True):
        entry.rmdir() if entry.is_dir() else entry.unlink()
    path.rmdir()


def meet_each(place, fault, step, begin=0):
    """Meet a fault at every `step`-th operation of a run that makes a new directory."""
    expected = place.make()
    remove(place.out)
    at = begin
    while place.meet(at, fault, expected):
        remove(place.out)
        at += step
    assert at > begin
    return at


@pytest.mark.parametrize(("fault", "step"), [("full disk", 13), ("broken disk", 17), ("no memory", 97)])
def test_some_faults(place, fault, step):
    meet_each(place("m4 fa level"), fault, step)


def test_every_write_may_be_cut_short(place):
    meet_each(place("w8a16"), "short write", 1)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault(place, options, fault):
    meet_each(place(options), fault, 1)


def replace_each(place, fault, step):
    """Meet a fault at every `step`-th operation of a run that replaces an earlier output."""
    options = ("--overwrite", "--save-dtype", "float32")
    earlier = place.make()
    expected = place.make(*options)
    place.make("--overwrite")
    at = 0
    while place.meet(at, fault, expected, earlier, options):
        place.make("--overwrite")
        at += step


@pytest.mark.parametrize("fault", ["full disk"])
def test_some_faults_while_an_output_is_replaced(place, fault):
    replace_each(place("w8a16"), fault, 11)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_while_an_output_is_replaced(place, fault):
    replace_each(place("w8a16"), fault, 1)


@pytest.mark.parametrize(("fault", "step"), [("full disk", 23), ("no memory", 97)])
def test_a_plan_that_meets_a_fault_leaves_nothing(place, fault, step, cli, monkeypatch):
    it, at, is_met = place("m4 fa level"), 0, True
    while is_met:
        with failing_after(at, fault, monkeypatch) as watch:
            met = cli(*it.command, "--plan")
        if met.code:
            message = error_line(met)
            assert WORDS[fault] in message, message
            assert any(advice in message for advice in ADVICE), message
        if ".out.plan" in it.others():  # it could not be removed
            assert cli(*it.command, "--plan").code == 0
        assert it.others() == it.untouched, at
        assert not it.out.exists()
        is_met, at = watch.seen > at, at + step
