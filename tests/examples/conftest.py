"""Commands as a person types them into bash, from the root of the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import eightfold

ROOT = Path(__file__).resolve().parents[2]

# Writes its arguments down and succeeds; what generate_quant_weight.sh asks with -c, it answers.
_STUB = """#!/bin/sh
if [ "$1" = -c ]; then exec "{python}" "$@"; fi
printf '%s\\0' "${{0##*/}}" "$@" > "{record}"
"""


def environment(**changes: str) -> dict[str, str]:
    """Return the environment of a user of the checkout, who has installed eightfold; this interpreter is first on PATH.

    PYTHONPATH has the package under test and nothing else, in case that it is not installed, or that another folder of
    its name is.
    """
    clean = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    clean["PYTHONPATH"] = str(Path(eightfold.__file__).parents[1])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**clean, "PATH": path, "ATB_SPEED_HOME_PATH": str(ROOT), **changes}


def bash(command: str, cwd: Path = ROOT, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run a command line in bash."""
    return subprocess.run(["bash", "-c", command], cwd=cwd, env=environment(**changes), capture_output=True, text=True)


@pytest.fixture
def typed(tmp_path: Path) -> Callable[..., list[str]]:
    """Return what `python` or `torchrun` is given when a command line is typed into bash, the program first."""
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    stubs, record = tmp_path / "stubs", tmp_path / "record"
    stubs.mkdir()
    for name in ("python", "torchrun"):
        stub = stubs / name
        stub.write_text(_STUB.format(python=sys.executable, record=record))
        stub.chmod(0o755)

    def run(command: str, cwd: Path = ROOT, **changes: str) -> list[str]:
        done = bash(command, cwd, PATH=f"{stubs}{os.pathsep}{os.environ['PATH']}", **changes)
        assert done.returncode == 0, done.stderr
        return record.read_bytes().decode().split("\0")[:-1]

    return run
