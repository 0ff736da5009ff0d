"""Ask the rules of each reader what it makes of each scheme, and put the answers into results/readers.json.

    python benchmarks/readers.py build/demo/smollm2-float          # then: python benchmarks/fill_readme.py

It quantizes the float model in every scheme, asks `eightfold check --for ...` about loaders of the directory itself,
and tries `eightfold export` without `--lossy` for readers of other formats. Loaders are judged by their published
sources.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import eightfold, save_results

# Name of a column -> options of `quantize`. Four texts are enough: no number of the output matters here.
STATIC = ["--calib-limit", "4"]
VARIANTS = {
    "W8A8": ["--scheme", "w8a8", *STATIC],
    "W8A8_DYNAMIC": ["--scheme", "w8a8-dynamic", "--calib", "none"],
    "W8A8_MIX": ["--scheme", "w8a8-mix", *STATIC],
    "W8A16": ["--scheme", "w8a16"],
    "KV int8": ["--scheme", "w8a8", "--kv-int8", *STATIC],
    "FAQuant": ["--scheme", "w8a8", "--fa-quant", *STATIC],
}
LOADERS = ("mindie", "vllm-ascend", "sglang", "vllm")
EXPORTS = ("compressed-tensors", "gguf")


def outcome(*args: object) -> tuple[int, str, str]:
    """Run an `eightfold` command that may refuse; return its exit code, stdout and stderr."""
    done = subprocess.run([sys.executable, "-m", "eightfold", *map(str, args)], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def judged(directory: Path) -> dict[str, str]:
    """Return the verdict of each loader on a directory; `unchecked` where no rule looks at the cache or attention."""
    asked = [word for loader in LOADERS for word in ("--for", loader)]
    _, stdout, stderr = outcome("check", directory, *asked, "--json")
    if not stdout:
        sys.exit(stderr)
    reports = json.loads(stdout.splitlines()[-1])["reports"]
    found = {}
    for report in reports:
        is_open = report["loads"] and "not checked" in str(report["summary"])
        found[report["loader"]] = "unchecked" if is_open else report["verdict"]
    return found


def exported(directory: Path, work: Path) -> dict[str, str]:
    """Return for each format whether all of a directory goes into it: `whole`, or `lossy`."""
    found = {}
    for name in EXPORTS:
        code, _, stderr = outcome("export", directory, work / f"{directory.name}.{name}", "--to", name)
        if code and "--lossy" not in stderr:
            sys.exit(stderr)
        found[name] = "lossy" if code else "whole"
    return found


def main() -> None:
    """Make every variant, and ask about it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a float model directory of a family that every reader has")
    source = parser.parse_args().source
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, options in VARIANTS.items():
            out = Path(folder) / name.replace(" ", "-")
            eightfold("quantize", source, out, *options)
            rows.append({"scheme": name, **judged(out), **exported(out, Path(folder))})
    save_results("readers", rows)


if __name__ == "__main__":
    main()
