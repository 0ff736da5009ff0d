"""Kill `eightfold quantize` at random moments and start it again: is the output the same to the last byte?

    python benchmarks/kill_resume.py FLOAT_DIR WORK_DIR [--kills 30] [-- OPTIONS OF quantize]

An undisturbed run comes first. Then, again and again: start, SIGKILL at a moment drawn evenly from the undisturbed
run's time, start the same command again, compare every file. Work lost is what was begun and not finished when the
process was killed: the journal has the finished layers, and the run that goes on must find them all.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from eightfold.format.journal import layers_done, partial_path, read_entries
from measure import save_results

COMMAND = [sys.executable, "-m", "eightfold", "quantize"]


def start(words: list[str]) -> subprocess.Popen[str]:
    """Start a quantization."""
    return subprocess.Popen([*COMMAND, *words, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for a quantization; return what it says of itself. Its failure ends the benchmark."""
    out, err = process.communicate()
    if process.returncode:
        sys.exit(f"exit code {process.returncode}: {err}")
    document: dict[str, Any] = json.loads(out.splitlines()[-1])
    return document


def contents(directory: Path) -> dict[str, bytes]:
    """Return every file of a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def differing(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    """Return the files that are not the same, or only in one of two directories."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def kill_once(words: list[str], out: Path, after: float) -> dict[str, Any]:
    """Kill a run and let another one finish; return what became of it."""
    process = start(words)
    try:
        process.communicate(timeout=after)
        return {"killed_after_s": round(after, 2), "was_done": True}
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    journalled = layers_done(read_entries(partial_path(out)) or [])
    document = finish(start(words))
    return {
        "killed_after_s": round(after, 2),
        "was_done": False,
        "layers_journalled": journalled,
        "layers_resumed": document["layers_resumed"],
        "seconds_to_the_end": document["seconds"],
    }


def main() -> int:
    """Run from the shell."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", type=Path, metavar="FLOAT_DIR")
    parser.add_argument("work", type=Path, metavar="WORK_DIR", help="for the outputs; made, and emptied at the end")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/kill_resume.json")
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    args, options = parser.parse_args(given[:cut]), given[cut + 1 :]
    draw = random.Random(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    whole, out = args.work / "whole", args.work / "out"
    began = time.monotonic()
    undisturbed = finish(start([str(args.model), str(whole), *options]))
    seconds = time.monotonic() - began
    expected, rows = contents(whole), []
    shutil.rmtree(whole)
    while len(rows) < args.kills:
        row = kill_once([str(args.model), str(out), *options], out, draw.uniform(0.05, 1) * seconds)
        if not row["was_done"]:
            row["differing_files"] = differing(contents(out), expected)
            row["layers_lost"] = row["layers_journalled"] - row["layers_resumed"]
            rows.append(row)
            print(json.dumps(row), flush=True)
        shutil.rmtree(out)
    summary = {
        "options": options,
        "kills": len(rows),
        "identical": sum(not row["differing_files"] for row in rows),
        "finished_layers_lost": max(row["layers_lost"] for row in rows),
        "undisturbed_s": undisturbed["seconds"],
        "layers": undisturbed["layers"],
    }
    print(json.dumps(summary))
    if args.save:
        save_results("kill_resume", [summary])
    return 0 if summary["identical"] == len(rows) and summary["finished_layers_lost"] <= 0 else 1


if __name__ == "__main__":
    sys.exit(main())
