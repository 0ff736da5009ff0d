"""Write the tables of docs/format.md and format.zh.md, between two marks, from src/eightfold/scheme.py.

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


CHINESE = {
    "Schemes and file names": "量化方式与文件名",
    "A linear, left as it was": "线性层，保持浮点",
    "A linear, `W8A8`": "线性层，`W8A8`",
    "A linear, `W8A8_DYNAMIC`": "线性层，`W8A8_DYNAMIC`",
    "A linear, `W8A8_MIX`": "线性层，`W8A8_MIX`",
    "A linear, `W8A16`": "线性层，`W8A16`",
    "Quantized attention, below the attention module": "Attention 量化，位于 attention 模块之下",
    "The int8 cache, below `k_proj` and below `v_proj`": "KV Cache 量化，位于 `k_proj` 与 `v_proj` 之下",
    "A norm": "norm",
    "type": "类型",
    "needs calibration data": "需要校准集",
    "weight file, without its ending": "权重文件（不含扩展名）",
    "description": "权重描述文件",
    "description, second name": "权重描述文件的第二名称",
    "yes": "是",
    "no": "否",
    "suffix": "后缀",
    "entry": "描述记录",
    "present": "何时存在",
    "meaning": "含义",
    "the model's": "同模型",
    "as in the float checkpoint": "同浮点权重",
    "float32 for bfloat16 models, otherwise int64 holding the float32 bit pattern": (
        "bfloat16 模型为 float32，否则为存放 float32 位模式的 int64"
    ),
    "float16 for float16 models, otherwise float32": "float16 模型为 float16，否则为 float32",
    "int8; some writers store a float dtype": "int8；部分工具存为浮点",
    "always": "总是",
    "always, optional to readers": "总是，读取方可不用",
    "with a bias": "有 bias 时",
    "with a bias, optional to readers": "有 bias 时，读取方可不用",
    "after outlier suppression": "离群值抑制之后",
    "older writers, after outlier suppression": "旧版工具，离群值抑制之后",
    "the scheme's name": "量化方式名称",
    "float weight": "浮点权重",
    "float bias": "浮点 bias",
    "symmetric, per output channel, in [-127, 127]": "对称，per-channel，取值 [-127, 127]",
    "per output channel, symmetric or asymmetric": "per-channel，对称或非对称",
    "zeros": "全零",
    "zeros, or integers in [-128, 127]": "全零，或 [-128, 127] 内的整数",
    "zeros, or integers in [-128, 127], stored as floats": "全零，或 [-128, 127] 内的整数，以浮点存放",
    "an integer in [-128, 127], stored as a float": "[-128, 127] 内的整数，以浮点存放",
    "already inside quant_bias": "已包含在 quant_bias 中",
    "as in W8A8, for generated tokens": "同 W8A8，用于 decode 阶段",
    "for prompt tokens": "用于 prefill 阶段",
    "query after RoPE = stored * scale, by head": "RoPE 之后的 query = 存储值 * scale，按 head",
    "key after RoPE = stored * scale, by head": "RoPE 之后的 key = 存储值 * scale，按 head",
    "value = stored * scale, by head": "value = 存储值 * scale，按 head",
    "cached = (stored - offset) * scale, by channel": "缓存值 = (存储值 - offset) * scale，按通道",
    "gain": "增益",
    "the gain once more": "增益的副本",
    "added after the gain; zeros": "乘增益之后相加；全零",
}
PAGE = Page(Path(__file__).parent / "format.md", tables)
CHINESE_PAGE = Page(Path(__file__).parent / "format.zh.md", tables, CHINESE)

if __name__ == "__main__":
    sys.exit(max(page.main(str(__doc__)) for page in (PAGE, CHINESE_PAGE)))
