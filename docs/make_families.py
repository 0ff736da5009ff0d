"""Write the tables of docs/families.md and families.zh.md, between two marks, from src/eightfold/layouts.py.

    python docs/make_families.py

`--check` writes nothing and fails when the page is not up to date with the table of the code.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pages import Page, table

from eightfold.architectures import FAMILIES
from eightfold.layouts import ROWS, Layout, engine_names


def names(row: Layout, *, stays_float: bool) -> str:
    """Return the patterns of a row's linears that are quantized, or that stay float."""
    return ", ".join(f"`{rule.pattern}`" for rule in row.rules if rule.stays_float is stays_float) or "-"


def extras(row: Layout) -> str:
    """Say what a row adds to the description and to config.json, and what it takes apart."""
    found = [f"`{name}` into two" for name in row.halves or ()]
    if row.experts is not None and row.experts.needs_entry:
        found.append(f"entry `{row.experts.module}.weight`")
    found += [f"entry `{name}.weight`" for name in row.joined or ()]
    found += [f"architecture `{row.published}`"] if row.published not in ("", row.architecture) else []
    return ", ".join([*found, *(f"`{key}`" for key in row.mindie_keys)]) or "-"


def tables() -> str:
    """Return the families with an engine, the other dense ones, and those with experts."""
    dense, sparse = ([row for row in ROWS if (row.experts is None) is is_dense] for is_dense in (True, False))
    sections = (
        ("Dense, also run by Eightfold", [row for row in dense if row.architecture in FAMILIES]),
        ("Dense", [row for row in dense if row.architecture not in FAMILIES]),
        ("Mixtures of experts, also run by Eightfold", [row for row in sparse if row.architecture in FAMILIES]),
        ("Mixtures of experts", [row for row in sparse if row.architecture not in FAMILIES]),
    )
    lines: list[str] = []
    head = ("`model_type`", "architecture", "int8", "stays float", "beside that", "loaders of W8A8_DYNAMIC")
    for title, rows in sections:
        lines += [f"### {title}", ""]
        lines += table(
            head,
            (
                (
                    f"`{row.model_type}`",
                    f"`{row.architecture}`",
                    names(row, stays_float=False),
                    names(row, stays_float=True),
                    extras(row),
                    engine_names(row),
                )
                for row in rows
            ),
        )
    return "\n".join(lines)


CHINESE = {
    "Dense, also run by Eightfold": "稠密模型，Eightfold 也能推理",
    "Dense": "稠密模型",
    "Mixtures of experts, also run by Eightfold": "MoE 模型，Eightfold 也能推理",
    "Mixtures of experts": "MoE 模型",
    "architecture": "架构",
    "stays float": "保持浮点",
    "beside that": "其他",
    "loaders of W8A8_DYNAMIC": "可加载 W8A8_DYNAMIC 的引擎",
}
PAGE = Page(Path(__file__).parent / "families.md", tables)
CHINESE_PAGE = Page(Path(__file__).parent / "families.zh.md", tables, CHINESE)

if __name__ == "__main__":
    sys.exit(max(page.main(str(__doc__)) for page in (PAGE, CHINESE_PAGE)))
