"""The lock file of the development environment: all of pyproject.toml but torch, each with hashes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOCKED = re.split(r"\n(?=[a-z])", (ROOT / "requirements-dev.lock").read_text(encoding="utf-8"))[1:]


def test_every_package_has_a_version_and_hashes():
    assert len(LOCKED) > 50
    for entry in LOCKED:
        assert re.match(r"[a-z0-9.-]+==\S+ (; .* )?\\\n( +--hash=sha256:[0-9a-f]{64}( \\)?\n)+", entry + "\n"), entry


def test_every_dependency_is_locked_but_torch():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    # Extras that are not in `all` are for environments of their own.
    inside = [*re.findall(r"[a-z-]+", extras["all"][0].partition("[")[2]), "fuzz", "dev"]
    wanted = [*project["dependencies"], *(name for extra in inside for name in extras[extra])]
    names = {re.match(r"[A-Za-z0-9-]+", name)[0].lower() for name in wanted} - {"eightfold", "torch"}
    locked = {entry.partition("==")[0] for entry in LOCKED}
    assert names <= locked, "make lock"
    assert "torch" not in locked
