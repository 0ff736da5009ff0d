"""Draw docs/images/way.svg and way.zh.svg: the way from a float checkpoint to an answer.

python docs/make_way.py
"""

from __future__ import annotations

from html import escape
from pathlib import Path

IMAGES = Path(__file__).parent / "images"
FONT = "system-ui, -apple-system, 'Segoe UI', 'PingFang SC', 'Microsoft YaHei', 'Noto Sans CJK SC', sans-serif"
# Boxes: x, y, width, height, colour; their texts are below, a title and further lines.
BOXES = {
    "float": (10, 95, 190, 90, "#64748b"),
    "quantize": (250, 95, 190, 90, "#b45309"),
    "out": (490, 95, 190, 90, "#0f766e"),
    "cpu": (740, 10, 250, 80, "#1d4ed8"),
    "npu": (740, 100, 250, 80, "#b91c1c"),
    "others": (740, 190, 250, 80, "#6d28d9"),
}
# Arrows: from x, y to x, y.
ARROWS = ((200, 140, 250, 140), (440, 140, 490, 140), (680, 120, 740, 50), (680, 140, 740, 140), (680, 160, 740, 230))
TEXTS = {
    "way.svg": {
        "float": ("float model", "Hugging Face, ModelScope", "or GGUF; bf16, fp16, FP8"),
        "quantize": ("eightfold quantize", "one layer in memory,", "stops and resumes"),
        "out": ("8-bit directory", "msModelSlim's format:", "int8, scales, description"),
        "cpu": ("CPU: run, chat, serve, eval", "eightfold's C++ core, without torch"),
        "npu": ("Ascend NPU, as it is", "MindIE, vllm-ascend, SGLang"),
        "others": ("others, by plugin or export", "vLLM, transformers, llama.cpp"),
    },
    "way.zh.svg": {
        "float": ("浮点权重", "Hugging Face、魔搭", "或 GGUF；bf16、fp16、FP8"),
        "quantize": ("eightfold quantize", "逐层量化，内存只放一层", "中断后可续跑"),
        "out": ("8 bit 量化权重目录", "msModelSlim 格式：", "int8、scale、权重描述文件"),
        "cpu": ("CPU：run、chat、serve、eval", "C++ 内核，无需 torch"),
        "npu": ("昇腾 NPU：直接加载", "MindIE、vllm-ascend、SGLang"),
        "others": ("其他引擎：插件或导出", "vLLM、transformers、llama.cpp"),
    },
}
TITLES = {"way.svg": "The way from a checkpoint to an answer", "way.zh.svg": "从权重到回答"}


def picture(name: str) -> str:
    """Return one picture. Every text stands on a colour of its own, so that light and dark pages both show it."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1000 280" role="img" font-family="{FONT}">',
        f"<title>{escape(TITLES[name])}</title>",
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L10 5L0 10z" fill="#808a99"/></marker></defs>',
    ]
    for x1, y1, x2, y2 in ARROWS:
        ends = f'x1="{x1 + 4}" y1="{y1}" x2="{x2 - 4}" y2="{y2}"'
        lines.append(f'<line {ends} stroke="#808a99" stroke-width="2.5" marker-end="url(#tip)"/>')
    for box, (x, y, width, height, colour) in BOXES.items():
        lines.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="10" fill="{colour}"/>')
        title, *rest = TEXTS[name][box]
        middle, top = x + width / 2, y + height / 2 - 11 * len(rest) + 5
        lines.append(
            f'<text x="{middle}" y="{top}" fill="#fff" font-size="17" font-weight="600" text-anchor="middle">'
            f"{escape(title)}</text>"
        )
        for i, line in enumerate(rest, 1):
            lines.append(
                f'<text x="{middle}" y="{top + 22 * i}" fill="#fff" font-size="14.5" text-anchor="middle">'
                f"{escape(line)}</text>"
            )
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    """Write both pictures."""
    for name in TEXTS:
        (IMAGES / name).write_text(picture(name), encoding="utf-8")


if __name__ == "__main__":
    main()
