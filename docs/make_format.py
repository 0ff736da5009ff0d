"""Write the tables of docs/format.md, between `<!-- tables -->` and `<!-- /tables -->`, from src/eightfold/scheme.py.

    python docs/make_format.py

`--check` writes nothing and fails when the page is not up to date with the table of the code.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from pages import Page, table

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


PAGE = Page(Path(__file__).parent / "format.md", tables)

if __name__ == "__main__":
    sys.exit(PAGE.main(str(__doc__)))
