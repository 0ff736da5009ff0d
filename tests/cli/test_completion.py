"""Completion in a shell, asked as bash asks."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from tests.refusal import error_line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["quanti"], ["quantize"]),
        (["quantize", "--sch"], ["--scheme"]),
        (["quantize", "--scheme", "w8a1"], ["w8a16"]),
        (["completion", "f"], ["fish"]),
    ],
)
def test_bash_completes_commands_options_and_values(cli, tmp_path, words, expected):
    pytest.importorskip("shtab")
    if not (bash := shutil.which("bash")):
        pytest.skip("no bash")
    script = cli("completion", "bash")
    assert script.code == 0, script.err
    asked = (
        f"COMP_WORDS=(eightfold {' '.join(words)}); COMP_CWORD={len(words)}; _shtab_eightfold; echo ${{COMPREPLY[@]}}"
    )
    done = subprocess.run([bash, "-c", f"{script.out}\n{asked}"], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == expected, done.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_every_command(cli, shell):
    pytest.importorskip("shtab")
    out = cli("completion", shell).out
    assert all(name in out for name in ("quantize", "import-gguf", "doctor", "max-kl"))


def test_what_is_missing_is_named(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert error_line(cli("completion", "bash")).endswith("Install it: pip install 'eightfold[completion]'")


def test_another_shell_is_refused(cli):
    assert error_line(cli("completion", "csh")).startswith("SHELL: got csh, expected bash, zsh or fish.")
