"""Write the tables of docs/format.md, between `<!-- tables -->` and `<!-- /tables -->`, from src/eightfold/scheme.py.

    python docs/make_format.py

`--check` writes nothing and fails when the page is not up to date with the table of the code.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from eightfold.scheme import (
    BIAS,
    FA_TENSORS,
    KV_TENSORS,
    LINEAR_TENSORS,
    NEEDS_CALIBRATION,
    NORM_BIAS,
    NORM_WEIGHT,
    SCHEMES,
    WEIGHT,
    QuantType,
    TensorSpec,
    description_names,
    legacy_norm,
    weight_file_stem,
)

PAGE = Path(__file__).parent / "format.md"

_MARKED = re.compile(r"(<!-- tables -->\n).*?(<!-- /tables -->)", re.DOTALL)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table and an empty one."""
    cells = list(head)
    yield f"| {' | '.join(cells)} |"
    yield "|" + "---|" * len(cells)
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def presence(spec: TensorSpec) -> str:
    """Say when a tensor is there, and whether readers can do without it."""
    words = ["with a bias"] if spec.with_bias_only else ["always"]
    return ", ".join([*words, *(["optional to readers"] if spec.optional else [])])


def spec_rows(specs: Iterable[TensorSpec]) -> Iterator[tuple[str, ...]]:
    """Yield one row for each tensor."""
    for spec in specs:
        shape = ", ".join(map(str, spec.shape))
        meaning = spec.meaning.replace("|", r"\|")
        yield f"`{spec.suffix}`", spec.dtype.value, f"[{shape}]", f"`{spec.tag.value}`", presence(spec), meaning


def spec_table(title: str, specs: Iterable[TensorSpec]) -> Iterator[str]:
    """Yield a heading and the table of a module's tensors."""
    yield from (f"### {title}", "")
    yield from table(("suffix", "dtype", "shape", "entry", "present", "meaning"), spec_rows(specs))


def scheme_rows() -> Iterator[tuple[str, ...]]:
    """Yield one row for each scheme of the command line."""
    for name, kind in SCHEMES.items():
        needs = "yes" if kind in NEEDS_CALIBRATION else "no"
        short, suffixed = description_names(kind, legacy=True)
        assert description_names(kind, legacy=False) == (short,)
        yield f"`{name}`", f"`{kind.value}`", needs, f"`{weight_file_stem(kind)}`", f"`{short}`", f"`{suffixed}`"


def norm_rows() -> Iterator[tuple[str, ...]]:
    """Yield the tensors of a norm, and where older writers repeat them."""
    for suffix, dtype, shape, entry, present, meaning in spec_rows((NORM_WEIGHT, NORM_BIAS)):
        yield suffix, dtype, shape, entry, "after outlier suppression" if suffix == f"`{BIAS}`" else present, meaning
    module = legacy_norm("").removeprefix(".")
    old = "older writers, after outlier suppression"
    yield f"`{module}.{WEIGHT}`", NORM_WEIGHT.dtype.value, "[E]", "the scheme's name", old, "the gain once more"
    yield f"`{module}.{BIAS}`", NORM_BIAS.dtype.value, "[E]", "the scheme's name", old, NORM_BIAS.meaning


def tables() -> str:
    """Return all tables."""
    columns = ("`--scheme`", "type", "needs calibration data", "weight file, without its ending", "description")
    lines = ["### Schemes and file names", ""]
    lines += table((*columns, "description, second name"), scheme_rows())
    for kind, specs in LINEAR_TENSORS.items():
        title = "left as it was" if kind is QuantType.FLOAT else f"`{kind.value}`"
        lines += spec_table(f"A linear, {title}", specs)
    lines += spec_table("Quantized attention, below the attention module", FA_TENSORS)
    lines += spec_table("The int8 cache, below `k_proj` and below `v_proj`", KV_TENSORS)
    lines += ["### A norm", "", *table(("suffix", "dtype", "shape", "entry", "present", "meaning"), norm_rows())]
    return "\n".join(lines)


def fill(text: str) -> str:
    """Return the page with its tables made anew.

    Raises:
        ValueError: the page has not exactly one marked place.
    """
    filled, places = _MARKED.subn(lambda match: f"{match[1]}\n{tables()}\n{match[2]}", text)
    if places != 1:
        raise ValueError(f"marked places in {PAGE.name}: got {places}, expected 1")
    return filled


def check(page: Path = PAGE) -> bool:
    """Return whether the page is up to date."""
    text = page.read_text(encoding="utf-8")
    return fill(text) == text


def main() -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the page is out of date")
    if parser.parse_args().check:
        return int(not check())
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
