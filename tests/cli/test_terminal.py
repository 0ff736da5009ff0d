"""What a terminal obeys never comes from a model, a file or an error; answers for programs keep every byte."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from eightfold import progress
from eightfold.cli import console, main

# Sets the title, clears the screen; the same as one character each; turns the direction of what follows.
TITLE, CLEAR, TURN = "\x1b]0;TITLE\x07", "\x9b2J", "\u202egpj"
NASTY = TITLE + CLEAR + TURN + "\r\x08\x7f"
SHOWN = "]0;TITLE2Jgpj"


def on_terminal(*words: object) -> str:
    """Return what a terminal is given by a command."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "eightfold", *map(str, words)]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, close_fds=True)
    os.close(slave)
    shown = b""
    while True:
        try:
            piece = os.read(master, 4096)
        except OSError:
            break
        shown += piece
    process.wait(timeout=60)
    os.close(master)
    return shown.decode().replace("\r\n", "\n")


def obeyed(text: str) -> set[str]:
    return {character for character in text if ord(character) in progress.CONTROLS}


@pytest.fixture(scope="module")
def nasty(small, tmp_path_factory) -> Path:
    """A model whose every token is what a terminal obeys, as its name and its files are."""
    model = tmp_path_factory.mktemp("nasty") / f"model{NASTY}"
    shutil.copytree(small.directory, model)
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    replaced = {"type": "Replace", "pattern": {"Regex": ".+"}, "content": NASTY}
    path.write_text(json.dumps({**tokenizer, "decoder": {"type": "Sequence", "decoders": [replaced]}}))
    return model


def test_a_terminal_does_not_obey_an_answer(nasty):
    shown = on_terminal("run", nasty, "--prompt", "hi", "--max-new-tokens", 3, "--ignore-eos", "--threads", 1)
    assert shown.startswith(SHOWN)
    assert obeyed(shown) == set()


def test_a_program_gets_every_byte_of_an_answer(cli, nasty):
    words = ("run", nasty, "--prompt", "hi", "--max-new-tokens", 3, "--ignore-eos", "--threads", 1)
    assert cli(*words).out.startswith(NASTY)
    result = cli(*words, "--json")
    assert obeyed(result.out) == set()
    assert result.json()["text"].startswith(NASTY)


@pytest.mark.parametrize("command", ["inspect", "check", "run --prompt x", "quantize --scheme w8a16", "eval"])
def test_nor_an_error_a_name_or_a_finding(cli, small, tmp_path, command):
    model = tmp_path / f"model{NASTY}"
    shutil.copytree(small.directory, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": [NASTY], NASTY: NASTY}))
    name, *options = command.split()
    target = [tmp_path / f"out{NASTY}"] if name == "quantize" else []
    result = cli(name, model, *target, *options)
    assert obeyed(result.out + result.err) == set()
    assert SHOWN in result.out + result.err


def test_nor_what_stands_in_an_option(cli, nasty):
    for words in (("inspect", NASTY), (NASTY,), ("run", nasty, f"--{NASTY}"), ("run", nasty, "--seed", NASTY)):
        result = cli(*words)
        assert (result.code, obeyed(result.err)) == (2, set())
        assert SHOWN in result.err


def test_nor_a_traceback(cli, monkeypatch):
    """Of a fault in the program, and of an error that --debug explains."""
    assert obeyed(cli("--debug", "inspect", NASTY).err) == set()

    def fault(name):
        raise ValueError(NASTY)

    monkeypatch.setattr(main, "command_type", fault)
    result = cli("env")
    assert (result.code, obeyed(result.err)) == (1, set())
    assert result.err.startswith("Traceback (most recent call last):")
    assert f"ValueError: {SHOWN}" in result.err


def test_nor_what_a_bar_says(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with progress.filtered(keeps_stdout=False), console.bars("work", 2, "step") as task:
        task.at(f"a{TITLE}b{CLEAR}c{TURN}[/]")
        task.advance()
        print(NASTY, file=sys.stderr)
    shown = capsys.readouterr().err
    assert SHOWN in shown
    assert "\x1b]0;" not in shown
    assert obeyed(shown) <= {"\x1b", "\r"}  # the bar's own


def test_a_closed_stream_is_nobodys_fault():
    command = [sys.executable, "-m", "eightfold", "--version"]
    closed = subprocess.run(["bash", "-c", 'exec "$@" >&-', "x", *command], capture_output=True, text=True)
    assert (closed.returncode, closed.stderr) == (0, "")
