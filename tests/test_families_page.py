"""docs/families.md says what layouts.py says."""

from __future__ import annotations

from make_families import CHINESE_PAGE, PAGE, tables

from eightfold.layouts import ROWS


def test_page_is_up_to_date() -> None:
    assert PAGE.is_up_to_date() and CHINESE_PAGE.is_up_to_date(), "run: python docs/make_families.py"
    assert all(f"| `{row.model_type}` | `{row.architecture}` |" in tables() for row in ROWS)
