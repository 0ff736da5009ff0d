"""docs/format.md says what scheme.py says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from make_format import CHINESE_PAGE, PAGE, tables

from eightfold.scheme import FA_TENSORS, KV_TENSORS, LINEAR_TENSORS


def test_page_is_up_to_date() -> None:
    assert PAGE.is_up_to_date() and CHINESE_PAGE.is_up_to_date(), "run: python docs/make_format.py"


def test_check_sees_a_changed_table(tmp_path: Path) -> None:
    page = tmp_path / "format.md"
    text = PAGE.path.read_text(encoding="utf-8")
    page.write_text(text.replace("| `deq_scale` |", "| `deq_scales` |"), encoding="utf-8")
    assert not replace(PAGE, path=page).is_up_to_date()
    page.write_text(PAGE.fill(page.read_text(encoding="utf-8")), encoding="utf-8")
    assert page.read_text(encoding="utf-8") == text


def test_tables_name_every_tensor() -> None:
    lines = tables().splitlines()
    for specs in (*LINEAR_TENSORS.values(), FA_TENSORS, KV_TENSORS):
        for spec in specs:
            assert any(line.startswith(f"| `{spec.suffix}` |") and spec.meaning in line for line in lines), spec


def test_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="got 0, expected 1"):
        PAGE.fill("# Format\n")
