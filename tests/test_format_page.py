"""docs/format.md says what scheme.py says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from eightfold.scheme import FA_TENSORS, KV_TENSORS, LINEAR_TENSORS

SCRIPT = Path(__file__).parent.parent / "docs" / "make_format.py"


@pytest.fixture(scope="module")
def make_format() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_format", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_up_to_date(make_format: ModuleType) -> None:
    assert make_format.check(), "run: python docs/make_format.py"


def test_check_sees_a_changed_table(make_format: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "format.md"
    text = make_format.PAGE.read_text(encoding="utf-8")
    page.write_text(text.replace("| `deq_scale` |", "| `deq_scales` |"), encoding="utf-8")
    assert not make_format.check(page)
    page.write_text(make_format.fill(page.read_text(encoding="utf-8")), encoding="utf-8")
    assert page.read_text(encoding="utf-8") == text


def test_tables_name_every_tensor(make_format: ModuleType) -> None:
    lines = make_format.tables().splitlines()
    for specs in (*LINEAR_TENSORS.values(), FA_TENSORS, KV_TENSORS):
        for spec in specs:
            assert any(line.startswith(f"| `{spec.suffix}` |") and spec.meaning in line for line in lines), spec


def test_page_without_markers_is_refused(make_format: ModuleType) -> None:
    with pytest.raises(ValueError, match="got 0, expected 1"):
        make_format.fill("# Format\n")
