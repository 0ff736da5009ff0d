"""Put measured figures, from benchmarks/results/*.json, into README.md and pages of docs.


They go between `<!-- NAME -->` and `<!-- /NAME -->`.

    python benchmarks/fill_readme.py [--demo build/demo/rows.json]        # or: make readme

`--demo` first takes over the rows that examples/demo.py has measured, and `--clients` those that the scripts in
tests/clients have printed; what is known of scripts that did not run stays. history.jsonl and its pictures are made up
to date too. `--check` writes nothing and fails when anything is not up to date with the results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import history
from history_picture import picture
from measure import RESULTS, save_results

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
_FILLED = ("README", "docs/speed", "docs/serving", "docs/accuracy")
PAGES = tuple(ROOT / f"{page}{ending}" for page in _FILLED for ending in (".md", ".zh.md"))
# What Chinese pages say instead, the longest first.
CHINESE = {
    "| scheme | on disk | in memory | perplexity | KL to float |": (
        "| 量化方式 | 磁盘占用 | 内存占用 | 困惑度 | 与浮点的 KL |"
    ),
    "| program | prompt, tok/s | answer, tok/s | of read bandwidth | memory |": (
        "| 程序 | 首段（prefill），tok/s | 生成（decode），tok/s | 占读带宽 | 内存 |"
    ),
    "| scheme | KL | same top token | perplexity | tensors |": "| 量化方式 | KL | top-1 一致率 | 困惑度 | 权重大小 |",
    " decode, float = 1 |": " decode，浮点 = 1 |",
    "| reader | takes |": "| 引擎 | 加载方式 |",
    "| what | ratio |": "| 项目 | 比值 |",
    "| memory /": "| 内存 /",
    "| prompts /": "| prefill /",
    "| answers /": "| decode /",
    "| all /": "| 总计 /",
    "| perplexity / float |": "| 困惑度 / 浮点 |",
    "| KL to float |": "| 与浮点的 KL |",
    "| disk / float |": "| 磁盘 / 浮点 |",
    "| time /": "| 时间 /",
    ", first token |": "，首 token |",
    " better |": " 变好 |",
    " worse |": " 变差 |",
    " as before |": " 持平 |",
    "Not measured since ": "未重新测量，沿用 ",
    " tokens in, 128 out, medians of ": " token 输入、128 token 输出，轮流运行 ",
    " rounds in turn. ": " 轮取中位数。",
    "| model | in x out | program |": "| 模型 | 序列 x（输入，输出） | 程序 |",
    "| model | tokens before | program | prompts, tok/s | answers, tok/s | prompts / answers, to llama.cpp |": (
        "| 模型 | 已有上下文（token） | 程序 | prefill，tok/s | decode，tok/s | 与 llama.cpp 之比：prefill / decode |"
    ),
    "| model | program | output, tok/s | first token, median | first token, 99th percentile |": (
        "| 模型 | 程序 | 输出，tok/s | 首 token 时间（中位数） | 首 token 时间（P99） |"
    ),
    " prompts, tok/s | answers, tok/s | all, tok/s | of read bandwidth | memory |": (
        " prefill，tok/s | decode，tok/s | 总计，tok/s | 占读带宽 | 内存 |"
    ),
    "| directory, NPU |": "| 目录（NPU） |",
    "| directory, plugin |": "| 目录（插件） |",
    " ignored |": " 忽略 |",
    "not checked": "未检查",
    " lossy |": " 有损 |",
    " yes |": " 支持 |",
    " no |": " 不支持 |",
    "`benchmarks/readers.py` asks `eightfold check` and `eightfold export`, ": (
        "由 `benchmarks/readers.py` 调用 `eightfold check` 与 `eightfold export` 得出，"
    ),
}
# Columns of the table of clients; what else a program does stands in words.
CAPABILITIES = (
    "chat",
    "stream",
    "nested models",
    "forced tools",
    "automatic tools",
    "structured output",
    "reasoning",
    "errors",
)


def load(name: str) -> dict[str, Any]:
    """Return a results file."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        sys.exit(f"{path} is not there: run `make readme` first")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def machine(record: dict[str, Any]) -> str:
    """Say on what and when a record was measured."""
    vnni = " with AVX-512 VNNI" if "avx512_vnni" in record["isa"] else ""
    where = f"{record['threads']} threads of {record['cpu']}{vnni}"
    torch = f", torch {record['torch']}" if record["torch"] else ""
    return f"{where}{torch}, {record['date']}, commit {record['commit']}"


def accuracy() -> str:
    """Return a table for each model: what every scheme costs on the longest text that was measured."""
    record = load("accuracy")
    blocks = []
    for model in dict.fromkeys(row["model"] for row in record["rows"]):
        own = [row for row in record["rows"] if row["model"] == model]
        longest = max(row["chunks"] for row in own)
        exact = next(row for row in own if row["scheme"] == "float" and row["chunks"] == longest)
        has_speeds = any("decode" in row for row in own)
        lines = [
            f"{model}, {longest} x 512 tokens (float: perplexity {exact['ppl']:.2f}, {exact['nbytes'] / 1e6:,.0f} MB):",
            "",
            "| scheme | KL | same top token | perplexity | tensors |" + " decode, float = 1 |" * has_speeds,
            "|---" * (5 + has_speeds) + "|",
        ]
        for row in own:
            if row["scheme"] != "float" and row["chunks"] == longest:
                speed = f" {row['decode']:.2f} |" if "decode" in row else " |" * has_speeds
                lines.append(
                    f"| {row['scheme']} | {row['kl']:.4f} +- {row['kl_error']:.4f} | {row['top1']:.1%} "
                    f"| {row['ppl']:.2f} ({row['ppl_change']:+.2%}) | {row['nbytes'] / 1e6:,.0f} MB |{speed}"
                )
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, f"({machine(record)})"])


def demo() -> str:
    """Return the sizes and the accuracy that `make demo` has measured."""
    record = load("demo")
    lines = ["| scheme | on disk | in memory | perplexity | KL to float |", "|---|---|---|---|---|"]
    for row in record["rows"]:
        kl = f"{row['kl_mean']:.4f}" if "kl_mean" in row else ""
        sizes = " | ".join(f"{row[key] / 1e6:.0f} MB" for key in ("disk_bytes", "nbytes"))
        lines.append(f"| {row['name']} | {sizes} | {row['ppl']:.2f} | {kl} |")
    return "\n".join([*lines, "", f"`make demo` on {machine(record)}."])


# Reader, what it takes, and its key in results/readers.json.
READERS = (
    ("MindIE", "directory, NPU", "mindie"),
    ("vllm-ascend", "directory, NPU", "vllm-ascend"),
    ("SGLang", "directory, NPU", "sglang"),
    ("vLLM", "directory, plugin", "vllm"),
    ("transformers, vLLM, SGLang", "compressed-tensors", "compressed-tensors"),
    ("llama.cpp, Ollama, OpenVINO", "GGUF", "gguf"),
)
VERDICTS = {
    "loads": "yes",
    "warns": "yes",
    "whole": "yes",
    "lossy": "lossy",
    "ignores": "ignored",
    "unchecked": "not checked",
    "misdecodes": "no",
    "refuses": "no",
}


def readers() -> str:
    """Return the table of readers: what each makes of each scheme."""
    record = load("readers")
    schemes = [row["scheme"] for row in record["rows"]]
    lines = [f"| reader | takes | {' | '.join(schemes)} |", "|---" * (len(schemes) + 2) + "|"]
    for name, takes, key in READERS:
        lines.append(f"| {name} | {takes} | {' | '.join(VERDICTS[row[key]] for row in record['rows'])} |")
    basis = f"`benchmarks/readers.py` asks `eightfold check` and `eightfold export`, {record['date']}"
    return "\n".join([*lines, "", f"{basis}, commit {record['commit']}."])


def versus() -> str:
    """Return one sentence about time and memory against the reference tool."""
    record = load("versus")
    about, seconds, memory = record["rows"]
    spread = f"{min(seconds['ratios']):.2f} to {max(seconds['ratios']):.2f}"
    ours = f"{seconds['ours']:.1f} s and {memory['ours']:.0f} MiB"
    theirs = f"{seconds['rival']:.1f} s and {memory['rival']:.0f} MiB"
    return (
        f"W8A8 of the same model with 50 calibration rows, whole command: {ours}; {about['rival']}: {theirs} "
        f"(medians of {about['runs']} runs in turn; ratio of times {spread}). "
        f"`benchmarks/versus.py` on {machine(record)}."
    )


def native() -> str:
    """Return the table of prompt and answer speed beside other programs, SmolLM2 and one sequence."""
    record = load("native")
    about, *rows = record["rows"]
    rows = [row for row in rows if row["model"].startswith("SmolLM2") and row["shape"] == "1x512x128"]
    rows = [row for row in rows if "W8A16" not in row["program"]]  # all of them are on the page of speed
    lines = ["| program | prompt, tok/s | answer, tok/s | of read bandwidth | memory |", "|---|---|---|---|---|"]
    for row in rows:
        share = f"{row['bandwidth_fraction']:.0%}" if row.get("bandwidth_fraction") else ""
        speeds = f"{row['prefill_tok_s']:.0f} | {row['decode_tok_s']:.0f}"
        lines.append(f"| {row['program']} | {speeds} | {share} | {row['peak_rss_mib']:.0f} MiB |")
    basis = f"512 tokens in, 128 out, medians of {about['rounds']} rounds in turn."
    return "\n".join([*lines, "", f"{basis} `benchmarks/native.py` on {machine(record)}."])


def sizes() -> str:
    """Return the table of every `native*.json`: all models, shapes and programs, and our rates / each peer's."""
    kinds, peers = ("prefill_tok_s", "decode_tok_s", "output_tok_s"), ("llama.cpp", "openvino", "vllm")
    heads = ("prompts, tok/s", "answers, tok/s", "all, tok/s", "of read bandwidth", "memory", *peers)
    lines = [f"| model | in x out | program | {' | '.join(heads)} |", "|---" * (3 + len(heads)) + "|"]
    bases = []
    for path in sorted(RESULTS.glob("native*.json")):
        record = load(path.stem)
        about, *rows = record["rows"]
        bases.append(f"- {path.name}: {about['rounds']} rounds of {about['repeat']}, {machine(record)}")
        for row in rows:
            batch, prompt, new = row["shape"].split("x")
            cells = [row["model"], f"{batch} x ({prompt}, {new})", row["program"]]
            cells += [f"{row[kind]:.0f}" if row[kind] else "" for kind in kinds]
            share = row.get("bandwidth_fraction")
            cells += [f"{share:.0%}" if share and batch == "1" else "", f"{row['peak_rss_mib']:.0f} MiB"]
            ratios = [row.get("ratios", {}).get(peer, {}) for peer in peers]
            cells += [" / ".join(f"{median(of[kind]):.2f}" for kind in kinds if kind in of) for of in ratios]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *bases])


def start() -> str:
    """Return one sentence about the time from a process's start to the first token."""
    record = load("start")
    about, ours, theirs = record["rows"]
    seconds = [median(row["first_byte_s"]) for row in (ours, theirs)]
    ratios = sorted(theirs["ours_to_this"])
    quarters = f"{ratios[len(ratios) // 4]:.2f} to {ratios[-len(ratios) // 4]:.2f}"
    return (
        f"From the start of `eightfold run DIR --prompt ...` to the first token: {seconds[0]:.2f} s; "
        f"{theirs['program']}: {seconds[1]:.2f} s (medians of {about['runs']} in turn; "
        f"ratio {median(ratios):.2f}, quarters {quarters}). `benchmarks/start.py` on {machine(record)}."
    )


def contexts() -> str:
    """Return the table of speeds far into a long context, and our rates / llama.cpp's."""
    record = load("contexts")
    about, *rows = record["rows"]
    heads = ("model", "tokens before", "program", "prompts, tok/s", "answers, tok/s", "prompts / answers, to llama.cpp")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        ratios = " / ".join(f"{median(found):.2f}" for found in row.get("ratios", {}).values())
        rates = f"{row['prefill_tok_s']:.0f} | {row['decode_tok_s']:.1f}"
        lines.append(f"| {row['model']} | {row['depth']:,} | {row['program']} | {rates} | {ratios} |")
    basis = f"{about['rounds']} rounds of {about['steps']} steps. `benchmarks/contexts.py` on {machine(record)}."
    return "\n".join([*lines, "", basis])


def mixed() -> str:
    """Return the table of servers under mixed load."""
    record = load("mixed")
    about, *rows = record["rows"]
    heads = ("model", "program", "output, tok/s", "first token, median", "first token, 99th percentile")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        times = f"{row['first_token_median_s']:.2f} s | {row['first_token_p99_s']:.2f} s"
        lines.append(f"| {row['model']} | {row['program']} | {row['output_tok_s']:.0f} | {times} |")
    ratios = rows[0]["ratios"]["output_tok_s"]
    spread = f"output {median(ratios):.2f} times vLLM's ({min(ratios):.2f} to {max(ratios):.2f})"
    basis = f"{about['rounds']} rounds of {about['seconds']} s in turn, {spread}. `benchmarks/mixed.py` on "
    return "\n".join([*lines, "", f"{basis}{machine(record)}."])


def releases() -> str:
    """Return the table of the last two releases."""
    return history.table(*history.read()[-2:])


def take_clients(folder: Path) -> None:
    """Put what the clients' scripts have printed into results/clients.json, in place of what they printed before."""
    found = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in folder.glob("*.jsonl")}
    kept = load("clients")["rows"] if (RESULTS / "clients.json").is_file() else []
    rows = [row for row in kept if row["script"] not in found]
    rows += [{"script": script, **row} for script, lines in found.items() for row in lines]
    save_results("clients", sorted(rows, key=lambda row: str(row["client"]).lower()))


def clients() -> str:
    """Return the table of clients, a line for each program that measures, and one for each failure."""
    record = load("clients")
    known: dict[str, dict[str, bool]] = {}
    for row in record["rows"]:
        known.setdefault(f"{row['client']} | {row['version']}", {})[row["capability"]] = row["ok"]
    signs = {True: "yes", False: "no", None: ""}
    lines = [f"| client | version | {' | '.join(CAPABILITIES)} |", "|---" * (len(CAPABILITIES) + 2) + "|"]
    others = []
    for name, works in known.items():
        if set(works) <= set(CAPABILITIES):
            lines.append(f"| {name} | {' | '.join(signs[works.get(capability)] for capability in CAPABILITIES)} |")
        else:
            does = ", ".join(capability for capability, is_ok in works.items() if is_ok)
            others.append(f"- {name.replace(' |', '')}: {does}")
    fails = [f"- {row['client']}, {row['capability']}: {row['detail']}" for row in record["rows"] if not row["ok"]]
    if fails:
        fails = ["", "What does not work:", "", *fails]
    basis = f"`make clients`, {record['date']}, commit {record['commit']}."
    return "\n".join([*lines, "", "Programs that measure:", "", *others, *fails, "", basis])


def translated(text: str) -> str:
    """Return what Chinese pages show of a filled place."""
    for english, chinese in CHINESE.items():
        text = text.replace(english, chinese)
    return text


def fill(text: str, *, is_chinese: bool = False) -> str:
    """Return a page with every marked place filled."""
    for name, render in (
        ("demo", demo),
        ("versus", versus),
        ("native", native),
        ("sizes", sizes),
        ("start", start),
        ("contexts", contexts),
        ("mixed", mixed),
        ("clients", clients),
        ("accuracy", accuracy),
        ("readers", readers),
        ("history", releases),
    ):
        pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if pattern.search(text):
            filled = translated(render()) if is_chinese else render()
            text = pattern.sub(lambda match, filled=filled: f"{match[1]}{filled}\n{match[2]}", text)
    return text


def main() -> int:
    """Fill every marked place."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, help="rows to take over into results/demo.json")
    parser.add_argument("--clients", type=Path, metavar="DIR", help="lines to take over into results/clients.json")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.demo is not None:
        save_results("demo", json.loads(args.demo.read_text()))
    if args.clients is not None:
        take_clients(args.clients)
    made: list[tuple[Path, Callable[[str], str]]] = [(history.HISTORY, lambda _: history.written(history.today()))]
    for language, ending in (("en", ".svg"), ("zh", ".zh.svg")):
        made.append((IMAGES / f"history{ending}", lambda _, language=language: picture(history.read(), language)))
    for page in filter(Path.is_file, PAGES):
        is_chinese = page.name.endswith(".zh.md")
        made.append((page, lambda text, is_chinese=is_chinese: fill(text, is_chinese=is_chinese)))
    stale = False
    for path, make in made:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if make(text) != text:
            stale = True
            print(f"{path} is not up to date" if args.check else f"{path} is made anew", file=sys.stderr)
            if not args.check:
                path.write_text(make(text), encoding="utf-8")
    return int(args.check and stale)


if __name__ == "__main__":
    sys.exit(main())
