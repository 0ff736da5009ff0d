"""Keep one line of ratios for each release, and compare two of them.

    python benchmarks/history.py                        # the last two, as a table
    python benchmarks/history.py 0.1.0 0.2.0
    python benchmarks/history.py --add 0.1.0 --rev COMMIT     # a line from results as they were at a commit

history.jsonl holds the lines. That of the release to come is written by fill_readme.py whenever results/*.json have
changed; its version is the development version in pyproject.toml. A ratio is to another program on the same machine in
the same round, or to the float model, so that a new machine changes few of them. history_picture.py draws all lines.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from measure import RESULTS

ROOT = Path(__file__).parent.parent
HISTORY = Path(__file__).parent / "history.jsonl"
PEERS = ("llama.cpp", "openvino", "vllm")
_RATES = {"prefill_tok_s": "prompts", "decode_tok_s": "answers", "output_tok_s": "all"}
# Kinds of which more is better; of all others less is.
_MORE_IS_BETTER = {*_RATES.values()}
# How much medians of the same code differ from day to day. Perplexity is that of 5,110 tokens alone.
_NOISE = {"perplexity": 0.005, "KL": 0.05, "disk": 0.01, "memory": 0.03}
_NOISE_OF_TIMES = 0.10

Line = dict[str, Any]  # version, date, cpu, threads, ratios: [[what, kind, to, median, least, most, commit], ...]
Record = dict[str, Any]  # a file of results


def ratios(records: dict[str, Record]) -> list[list[Any]]:
    """Return the ratios that a folder of results holds, by the files' names."""
    found: list[list[Any]] = []
    for name, record in sorted(records.items()):
        kind = "native" if name.startswith("native") else name
        for *what, values in _READ[kind](record["rows"]) if kind in _READ else ():
            figures = [round(value, 5) for value in (median(values), min(values), max(values))]
            found.append([*what, *figures, record["commit"]])
    return found


def _native(rows: list[Record]) -> Iterator[tuple[Any, ...]]:
    memory = {(row["model"], row["shape"], row["program"]): row["peak_rss_mib"] for row in rows[1:]}
    for row in rows[1:]:
        what = f"{row['model']}, {row['shape']}, {row['program'].removeprefix('eightfold ')}"
        for peer in PEERS:
            rates = row.get("ratios", {}).get(peer, {})
            for key in rates if len(rates) == 1 else ("prefill_tok_s", "decode_tok_s") if rates else ():
                yield what, _RATES[key], peer, rates[key]
            if rates:
                yield what, "memory", peer, [row["peak_rss_mib"] / memory[row["model"], row["shape"], peer]]


def _demo(rows: list[Record]) -> Iterator[tuple[Any, ...]]:
    exact, *made = rows
    for row in made:
        what = f"SmolLM2-135M, {row['name']}"
        yield what, "perplexity", "float", [row["ppl"] / exact["ppl"]]
        yield what, "KL", "float", [row["kl_mean"]]
        yield what, "disk", "float", [row["disk_bytes"] / exact["disk_bytes"]]


def _start(rows: list[Record]) -> Iterator[tuple[Any, ...]]:
    yield "SmolLM2-135M, first token", "time", "llama.cpp", rows[2]["ours_to_this"]


def _versus(rows: list[Record]) -> Iterator[tuple[Any, ...]]:
    for row, kind in zip(rows[1:], ("time", "memory"), strict=True):
        yield "SmolLM2-135M, quantize --scheme w8a8", kind, "msModelSlim", row["ratios"]


_READ: dict[str, Callable[[list[Record]], Iterator[tuple[Any, ...]]]] = {
    "native": _native,
    "demo": _demo,
    "start": _start,
    "versus": _versus,
}


def line_of(version: str, records: dict[str, Record]) -> Line:
    """Return a release's line: where and until when its newest figures were measured, and the ratios."""
    last = max((record for record in records.values() if "date" in record), key=lambda record: str(record["date"]))
    about = {key: last[key] for key in ("date", "cpu", "threads")}
    return {"version": version, **about, "ratios": ratios(records)}


def read() -> list[Line]:
    """Return all lines, oldest first."""
    return [json.loads(text) for text in HISTORY.read_text(encoding="utf-8").splitlines()]


def written(lines: list[Line]) -> str:
    """Return the text of history.jsonl, in the order of versions."""
    ordered = sorted(lines, key=lambda line: [int(part) for part in line["version"].split(".")])
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in ordered)


def today() -> list[Line]:
    """Return all lines with that of the release to come, made of today's results if they say anything new."""
    lines = read()
    found = re.search(r'fallback_version = "(.*)\.dev', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert found is not None
    line = line_of(found[1], {path.stem: json.loads(path.read_text("utf-8")) for path in RESULTS.glob("*.json")})
    others = [line for line in lines if line["version"] != found[1]]
    is_new = not others or others[-1]["ratios"] != line["ratios"]
    return [*others, line] if is_new else others


def at(rev: str) -> dict[str, Record]:
    """Return the results as they were at a commit."""
    folder = RESULTS.relative_to(ROOT).as_posix()

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True).stdout

    names = git("ls-tree", "--name-only", rev, f"{folder}/").split()
    return {Path(name).stem: json.loads(git("show", f"{rev}:{name}")) for name in names if name.endswith(".json")}


def verdict(kind: str, before: list[Any], after: list[Any]) -> str:
    """Say whether a ratio got better: by more than noise, and by rounds that all differ.

    Args:
        kind: what is measured.
        before: median, least, most, and the commit that was measured.
        after: the same later.
    """
    if before[3] == after[3]:
        return "not measured since"
    change = after[0] / before[0]
    noise = 1 + _NOISE.get(kind, _NOISE_OF_TIMES)
    is_apart = after[1] > before[2] or after[2] < before[1]
    if 1 / noise <= change <= noise or not is_apart:
        return "as before"
    return "better" if (change > 1) == (kind in _MORE_IS_BETTER) else "worse"


def _named(kind: str, to: str) -> str:
    return "KL to float" if kind == "KL" else f"{kind} / {to}"


def _form(kind: str) -> str:
    return {"perplexity": ".4f", "KL": ".4f"}.get(kind, ".2f")


def table(old: Line, new: Line) -> str:
    """Return a Markdown table of the ratios that both releases have."""
    before = {tuple(row[:3]): row[3:] for row in old["ratios"]}
    lines = [f"| what | ratio | {old['version']} | {new['version']} | |", "|---|---|---|---|---|"]
    unchanged = []
    for *key, middle, low, high, commit in new["ratios"]:
        what, kind, to = key
        if tuple(key) not in before:
            continue
        said = verdict(kind, before[tuple(key)], [middle, low, high, commit])
        if said == "not measured since":
            unchanged.append(f"{what}, {_named(kind, to)}")
        else:
            figures = (f"{value:{_form(kind)}}" for value in (before[tuple(key)][0], middle))
            lines.append(f"| {what} | {_named(kind, to)} | {' | '.join(figures)} | {said} |")
    since = [f"Not measured since {old['version']}: {'; '.join(unchanged)}.", ""] if unchanged else []
    return "\n".join([*lines, "", *since, f"{old['date']}, {new['date']}: {new['threads']} threads of {new['cpu']}."])


def main() -> None:
    """Print a comparison, or keep a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="two releases to compare")
    parser.add_argument("--add", metavar="VERSION", help="write this release's line, in place of one it has")
    parser.add_argument("--rev", help="the commit whose results --add takes")
    args = parser.parse_args()
    if (args.add is None) != (args.rev is None) or len(args.versions) not in (0, 2):
        parser.error("give two versions, or --add with --rev, or nothing")
    lines = read() if HISTORY.is_file() else []
    if args.add is not None:
        others = [line for line in lines if line["version"] != args.add]
        HISTORY.write_text(written([*others, line_of(args.add, at(args.rev))]), encoding="utf-8")
        return
    by_version = {line["version"]: line for line in lines}
    asked = args.versions or list(by_version)[-2:]
    unknown = [version for version in asked if version not in by_version]
    if unknown or len(asked) < 2:
        sys.exit(f"releases in {HISTORY.name}: got {', '.join(asked)}, expected two of {', '.join(by_version)}")
    print(table(*(by_version[version] for version in asked)))


if __name__ == "__main__":
    main()
