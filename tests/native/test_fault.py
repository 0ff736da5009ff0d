"""Weights that are cut short while they are used: one line that names the file, whoever reads."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from eightfold.model import native
from tests.conftest import write_model

needs_the_extension = pytest.mark.skipif(
    not native.is_built() or not hasattr(native.require(), "watch_mapping"), reason="the extension is not built"
)


def python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=120)


def line(path: Path) -> str:
    return (
        f"eightfold: weights in {path}: got a file that was cut short while it was in use, expected it as it was. "
        "Fetch or write it again.\n"
    )


@needs_the_extension
@pytest.mark.parametrize("kept", [0, 1, 4096])
def test_reading_what_is_no_longer_there_names_the_file(tmp_path, kept):
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from eightfold.format.safetensors import MappedFile\n"
        "from eightfold.model.native import name_cut_files\n"
        "name_cut_files()\n"
        "paths = [Path(sys.argv[1], name) for name in ('a', 'b\\n', 'c')]\n"
        "maps = [MappedFile(path) for path in paths]\n"
        "del maps[0]\n"
        "os.truncate(paths[1], int(sys.argv[2]))\n"
        "print(maps[0].raw(0, 8200)[-1])\n"
    )
    for name in ("a", "b\n", "c"):
        (tmp_path / name).write_bytes(bytes(8200))
    done = python(code, tmp_path, kept)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line(tmp_path / "b"))


@needs_the_extension
def test_another_bus_error_is_left_to_the_system(tmp_path):
    code = (
        "import mmap, os, sys\n"
        "from pathlib import Path\n"
        "from eightfold.format.safetensors import MappedFile\n"
        "from eightfold.model.native import name_cut_files\n"
        "name_cut_files()\n"
        "kept = MappedFile(Path(sys.argv[1]))\n"
        "gone = MappedFile(Path(sys.argv[1]))\n"
        "del gone\n"
        "file = os.open(sys.argv[2], os.O_RDONLY)\n"
        "other = mmap.mmap(file, 0, access=mmap.ACCESS_READ)\n"
        "os.truncate(sys.argv[2], 0)\n"
        "other[0]\n"
    )
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(10))
    done = python(code, tmp_path / "a", tmp_path / "b")
    assert (done.returncode, done.stderr) == (-signal.SIGBUS, "")


@needs_the_extension
def test_an_engine_whose_weights_are_cut_short_says_so(tmp_path):
    source = write_model(tmp_path / "m")
    code = (
        "import os, sys\n"
        "from eightfold import LLM, SamplingParams\n"
        "llm = LLM(sys.argv[1])\n"
        "ask = lambda: llm.generate(['a'], SamplingParams(max_tokens=2))\n"
        "ask()\n"
        "os.chmod(sys.argv[2], 0o600)\n"
        "os.truncate(sys.argv[2], 0)\n"
        "ask()\n"
    )
    weights = source / "model.safetensors"
    done = python(code, source, weights)
    assert (done.returncode, done.stderr.splitlines(keepends=True)[-1]) == (1, line(weights))
