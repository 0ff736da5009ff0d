"""The notebook that compares schemes: executed on a tiny model, and kept with its outputs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.conftest import tiny_config, write_model
from tests.examples.conftest import ROOT, bash

FOLDER = ROOT / "examples" / "notebooks"


def printed(file: Path) -> list[str]:
    """Return what each code cell printed."""
    nbformat = pytest.importorskip("nbformat")
    cells = [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
    return ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]


def test_the_notebook_runs(tmp_path):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    model = write_model(tmp_path / "float", tiny_config(max_position_embeddings=1024, head_dim=32))
    command = f"{sys.executable} {FOLDER}/refresh.py {tmp_path}/done.ipynb"
    done = bash(command, MODEL=str(model), WORK=str(tmp_path / "compared"), CHUNKS="1")
    assert done.returncode == 0, done.stderr
    _, made, measured, answers = printed(tmp_path / "done.ipynb")
    assert made.split("\n")[:2] == ["made w8a8-dynamic", "made w8a16"]
    assert [line.split()[0] for line in measured.splitlines()] == ["scheme", "w8a8-dynamic", "w8a16"]
    assert answers.startswith("w8a8-dynamic: ")


def test_the_committed_notebook_has_outputs():
    _, *outputs = printed(FOLDER / "compare_schemes.ipynb")
    assert len(outputs) == 3 and all(outputs)
    assert "Deep learning" in outputs[-1]
