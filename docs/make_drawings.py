"""Draw docs/images/way.svg and design.svg, and way.zh.svg and design.zh.svg: the way of the data, outside and inside.

    python docs/make_drawings.py

`--check` writes nothing and fails when a picture is not up to date. Every text stands on a colour of its own, so that
light and dark pages both show it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

IMAGES = Path(__file__).parent / "images"
FONT = "system-ui, -apple-system, 'Segoe UI', 'PingFang SC', 'Microsoft YaHei', 'Noto Sans CJK SC', sans-serif"
GREY, BROWN, GREEN, BLUE, RED, VIOLET = "#64748b", "#b45309", "#0f766e", "#1d4ed8", "#b91c1c", "#6d28d9"
_LINE = "#808a99"
Place = tuple[int, int, int, int]


@dataclass(frozen=True)
class Drawing:
    """Where things are; what they say differs by language."""

    size: tuple[int, int]
    boxes: dict[str, tuple[Place, str]]  # x, y, width, height; colour
    arrows: tuple[Place, ...]  # from x, y to x, y
    texts: dict[str, dict[str, tuple[str, ...]]]  # file -> box or tag -> a title and further lines
    panels: dict[str, Place] = field(default_factory=dict)  # frames around boxes
    tags: dict[str, tuple[int, int, int]] = field(default_factory=dict)  # names of panels and arrows: middle, width
    both: tuple[Place, ...] = ()  # arrows with two heads
    sizes: tuple[float, float] = (17, 14.5)  # of letters: titles, lines


WAY = Drawing(
    size=(1000, 280),
    boxes={
        "float": ((10, 95, 190, 90), GREY),
        "quantize": ((250, 95, 190, 90), BROWN),
        "out": ((490, 95, 190, 90), GREEN),
        "cpu": ((740, 10, 250, 80), BLUE),
        "npu": ((740, 100, 250, 80), RED),
        "others": ((740, 190, 250, 80), VIOLET),
    },
    arrows=(
        (200, 140, 250, 140),
        (440, 140, 490, 140),
        (680, 120, 740, 50),
        (680, 140, 740, 140),
        (680, 160, 740, 230),
    ),
    texts={
        "way.svg": {
            "title": ("The way from a checkpoint to an answer",),
            "float": ("float model", "Hugging Face, ModelScope", "or GGUF; bf16, fp16, FP8"),
            "quantize": ("eightfold quantize", "one layer in memory,", "stops and resumes"),
            "out": ("8-bit directory", "msModelSlim's format:", "int8, scales, description"),
            "cpu": ("CPU: run, chat, serve, eval", "eightfold's C++ core, without torch"),
            "npu": ("Ascend NPU, as it is", "MindIE, vllm-ascend, SGLang"),
            "others": ("others, by plugin or export", "vLLM, transformers, llama.cpp"),
        },
        "way.zh.svg": {
            "title": ("从权重到回答",),
            "float": ("浮点权重", "Hugging Face、魔搭", "或 GGUF，可为 FP8"),
            "quantize": ("eightfold quantize", "逐层量化，内存只放一层", "中断后可续跑"),
            "out": ("8 bit 量化权重目录", "msModelSlim 格式：", "int8、scale、描述文件"),
            "cpu": ("CPU：推理、对话、服务", "C++ 内核，无需 torch"),
            "npu": ("昇腾 NPU：直接加载", "MindIE、vllm-ascend、SGLang"),
            "others": ("其他引擎：插件或导出", "vLLM、transformers、llama.cpp"),
        },
    },
)
DESIGN = Drawing(
    size=(1000, 520),
    panels={"offline": (10, 10, 470, 500), "each": (30, 160, 430, 220), "online": (520, 10, 470, 310)},
    tags={
        "offline": (245, 32, 250),
        "each": (140, 183, 180),
        "online": (755, 32, 250),
        "renamed": (490, 410, 98),
    },
    boxes={
        "source": ((30, 60, 180, 70), GREY),
        "plan": ((240, 60, 220, 70), BROWN),
        "layer": ((260, 205, 180, 62), BROWN),
        "smooth": ((50, 205, 180, 62), BROWN),
        "calibrate": ((260, 300, 180, 62), BROWN),
        "weights": ((50, 300, 180, 62), BROWN),
        "output": ((250, 425, 200, 66), BROWN),
        "out": ((540, 425, 200, 66), GREEN),
        "loaders": ((770, 425, 220, 66), RED),
        "checkpoint": ((540, 342, 200, 62), BLUE),
        "reference": ((770, 342, 220, 62), GREY),
        "layers": ((540, 244, 200, 62), BLUE),
        "native": ((540, 152, 200, 62), BLUE),
        "engine": ((770, 152, 200, 62), BLUE),
        "uses": ((770, 60, 200, 62), BLUE),
    },
    arrows=(
        (210, 95, 240, 95),
        (350, 130, 350, 205),
        (260, 236, 230, 236),
        (140, 267, 140, 300),
        (230, 331, 260, 331),
        (350, 362, 350, 425),
        (450, 458, 540, 458),
        (740, 458, 770, 458),
        (640, 425, 640, 404),
        (640, 342, 640, 306),
        (640, 244, 640, 214),
        (870, 152, 870, 122),
        (740, 290, 800, 342),
    ),
    both=((740, 183, 770, 183),),
    sizes=(14.5, 12.5),
    texts={
        "design.svg": {
            "title": ("The way of the data",),
            "offline": ("offline: quant/, with torch",),
            "each": ("for each layer",),
            "online": ("online: engine/, without torch",),
            "renamed": ("renamed once",),
            "source": ("float directory",),
            "plan": ("recipe, plan", "every name, dtype, shape of OUT"),
            "layer": ("float pass", "ranges of the float model"),
            "smooth": ("smooth", "outliers into weights"),
            "weights": ("integers and scales",),
            "calibrate": ("calibrate", "ranges of quantized layers"),
            "output": ("format/output", ".OUT.partial and its journal"),
            "out": ("OUT", "an 8-bit directory"),
            "checkpoint": ("format/checkpoint", "checked against scheme.py"),
            "layers": ("model/layers", "what a layer consists of"),
            "native": ("model/native", "C++ core, one call a step"),
            "engine": ("engine", "scheduler, blocks, sampling"),
            "uses": ("run, chat, serve, LLM",),
            "reference": ("model/reference", "torch, the oracle"),
            "loaders": ("other loaders", "MindIE, vllm-ascend, SGLang"),
        },
        "design.zh.svg": {
            "title": ("数据流",),
            "offline": ("离线：quant/，使用 torch",),
            "each": ("逐层",),
            "online": ("在线：engine/，不用 torch",),
            "renamed": ("更名一次",),
            "source": ("浮点目录",),
            "plan": ("recipe、规划", "OUT 的全部名称、dtype、形状"),
            "layer": ("浮点计算", "浮点模型的范围"),
            "smooth": ("平滑", "离群值移入权重"),
            "weights": ("整数与 scale",),
            "calibrate": ("校准", "量化层的范围"),
            "output": ("format/output", ".OUT.partial 与 journal"),
            "out": ("OUT", "8 bit 目录"),
            "checkpoint": ("format/checkpoint", "按 scheme.py 检查"),
            "layers": ("model/layers", "一层由什么组成"),
            "native": ("model/native", "C++ 内核，每步一次调用"),
            "engine": ("engine", "调度、块、采样"),
            "uses": ("run、chat、serve、LLM",),
            "reference": ("model/reference", "torch，作为基准"),
            "loaders": ("其他加载器", "MindIE、vllm-ascend、SGLang"),
        },
    },
)
DRAWINGS = {name: drawing for drawing in (WAY, DESIGN) for name in drawing.texts}


def text(x: float, y: float, size: float, words: str, weight: str = "") -> str:
    """Return a text whose middle is at x."""
    return f'<text x="{x}" y="{y}" fill="#fff" font-size="{size}"{weight} text-anchor="middle">{escape(words)}</text>'


def arrow(ends: Place, heads: str) -> str:
    """Return an arrow that keeps clear of the boxes at its ends."""
    x1, y1, x2, y2 = ends
    right = 4 * ((x2 > x1) - (x2 < x1))
    down = 0 if right else 4 * ((y2 > y1) - (y2 < y1))
    place = f'x1="{x1 + right}" y1="{y1 + down}" x2="{x2 - right}" y2="{y2 - down}"'
    return f'<line {place} stroke="{_LINE}" stroke-width="2.5" {heads}/>'


def picture(name: str) -> str:
    """Return one picture."""
    drawing = DRAWINGS[name]
    said, (large, small) = drawing.texts[name], drawing.sizes
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {drawing.size[0]} {drawing.size[1]}" role="img" '
        f'font-family="{FONT}">',
        f"<title>{escape(said['title'][0])}</title>",
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="{_LINE}"/></marker></defs>',
    ]
    for x, y, width, height in drawing.panels.values():
        frame = f'fill="none" stroke="{_LINE}" stroke-width="1.5"'
        lines.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="12" {frame}/>')
    lines += [arrow(ends, 'marker-end="url(#tip)"') for ends in drawing.arrows]
    lines += [arrow(ends, 'marker-start="url(#tip)" marker-end="url(#tip)"') for ends in drawing.both]
    for name, (x, y, width) in drawing.tags.items():
        lines.append(f'<rect x="{x - width / 2}" y="{y - 12}" width="{width}" height="24" rx="6" fill="{GREY}"/>')
        lines.append(text(x, y + 4.5, small, said[name][0]))
    for box, ((x, y, width, height), colour) in drawing.boxes.items():
        lines.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="10" fill="{colour}"/>')
        head, *rest = said[box]
        step = small * 1.5
        middle, top = x + width / 2, y + height / 2 - step / 2 * len(rest) + 5
        lines.append(text(middle, top, large, head, ' font-weight="600"'))
        lines += [text(middle, top + step * i, small, line) for i, line in enumerate(rest, 1)]
    return "\n".join([*lines, "</svg>", ""])


def main() -> int:
    """Write all pictures, or with --check tell whether they are up to date."""
    is_check = "--check" in sys.argv[1:]
    stale = [name for name in DRAWINGS if (IMAGES / name).read_text("utf-8") != picture(name)] if is_check else []
    for name in stale:
        print(f"{IMAGES / name} is not up to date; run: python {sys.argv[0]}", file=sys.stderr)
    for name in () if is_check else DRAWINGS:
        (IMAGES / name).write_text(picture(name), encoding="utf-8")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
