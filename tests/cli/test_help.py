"""What the program says of itself: its help names everything it takes; version and environment."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from eightfold import __version__
from eightfold.cli.main import COMMANDS, FIRST_HOUR, command_type
from eightfold.cli.options import options_of, parse
from tests.conftest import Result


def test_no_command_at_all_shows_the_first_hour(cli):
    result = cli()
    assert (result.code, result.err) == (2, "")
    assert "eightfold quantize HuggingFaceTB/SmolLM2-135M-Instruct smollm2 --scheme w8a8-dynamic\n" in result.out
    commands = [words.split() for words, _ in FIRST_HOUR]
    assert [words[1] for words in commands] == ["quantize", "chat", "serve"]
    for _, name, *rest in commands:
        assert parse(command_type(name), rest, "eightfold") is not None
    assert "eightfold doctor" in result.out
    assert "eightfold --help" in result.out


def test_the_help_of_quantize_begins_with_the_five_options_that_matter_first(cli):
    _, _, behind = cli("quantize", "--help").out.partition("The options that matter first:\n")
    first, _, rest = behind.partition("\n\n")
    assert re.findall(r"^  (--[a-z-]+)", first, re.MULTILINE) == [
        "--scheme",
        "--target",
        "--max-kl",
        "--calib",
        "--plan",
    ]
    assert not re.search(r"^  --(scheme|target|max-kl|calib|plan) ", rest, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_every_option_and_argument(cli, monkeypatch, command, flag):
    monkeypatch.setenv("COLUMNS", "200")
    result = cli(command, flag)
    assert (result.code, result.err) == (0, "")
    known = options_of(command_type(command))
    assert known
    names = [name for option in known for name in ([option.title] if option.is_argument else option.flags)]
    assert [name for name in names if name not in result.out] == []
    assert all(option.row["help"].split(".")[0] in " ".join(result.out.split()) for option in known)


def test_the_help_names_every_command_and_a_way_to_start(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = cli("--help")
    assert (result.code, result.err) == (0, "")
    assert [name for name in (*COMMANDS, "--version", "--debug") if name not in result.out] == []
    assert "eightfold quantize FLOAT_DIR OUT --scheme w8a8-dynamic" in result.out


def test_help_before_a_command_is_on_all(cli):
    assert cli("--help", "run").out == cli("--help").out


def test_a_launcher_that_is_not_torchrun_is_in_nobodys_way(cli, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert cli("env").code == 0


def test_version_is_the_packages(cli):
    assert cli("--version") == Result(0, f"eightfold {__version__}\n", "")


def test_env_as_json_is_one_line_with_what_a_bug_report_needs(cli):
    result = cli("env", "--json")
    assert (result.code, result.err) == (0, "")
    assert result.out.count("\n") == 1
    found = json.loads(result.out)
    assert found["eightfold"] == __version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["packages"]["numpy"] is not None
    assert isinstance(found["isa"], list)
    assert found["threads"] >= 1
    assert found["memory_bytes"] > found["memory_available_bytes"] > 0


def test_env_for_people_has_a_line_for_each_fact(cli):
    result = cli("env")
    assert (result.code, result.err) == (0, "")
    keys = [line.partition(":")[0] for line in result.out.splitlines()]
    assert keys[:3] == ["eightfold", "python", "system"]
    assert {"cpu", "isa", "threads", "memory", "memory_available", "packages"} <= set(keys)


def test_the_package_runs_as_a_module_and_as_a_program():
    programs = [[sys.executable, "-m", "eightfold"]]
    script = shutil.which("eightfold", path=str(Path(sys.executable).parent))
    programs += [[script]] if script else []
    for command in programs:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"eightfold {__version__}\n", "")


@pytest.mark.parametrize("command", [["quantize"], ["run", "--nope"], ["nope"], ["check", "x", "--for", "y"]])
def test_a_usage_error_names_the_program_however_it_was_started(command):
    done = subprocess.run([sys.executable, "-m", "eightfold", *command], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    path = "eightfold" if command == ["nope"] else f"eightfold {command[0]}"
    assert done.stderr.startswith("eightfold: ")
    assert done.stderr.endswith(f" Try: {path} --help\n")


def test_the_help_names_the_program_however_it_was_started():
    done = subprocess.run([sys.executable, "-m", "eightfold", "env", "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[:3] == ["Usage:", "eightfold", "env"]
