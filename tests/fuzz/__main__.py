"""Run readers, each in a process of its own and one on each CPU, and print what happened."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.fuzz.targets import TARGETS

MEMORY = "/dev/shm"  # where files are made and read several times as fast
START_SECONDS = 60.0  # to load a reader and what it needs, and the longest that one may be silent


def run_one(name: str, out: Path, options: list[str], seconds: float) -> dict[str, Any]:
    """Run one reader; return what its driver has noted, and how it ended if that was not as it should be."""
    out.mkdir(parents=True)
    command = [sys.executable, "-m", "tests.fuzz.driver", name, "--out", str(out), *options]
    with (out / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        started = moved = time.monotonic()
        inputs = -1
        while process.poll() is None:
            time.sleep(0.1)
            now, seen = time.monotonic(), _state(out)["inputs"]
            if seen != inputs:
                inputs, moved = seen, now
            if now - moved > START_SECONDS or (seconds and now - started > seconds + 2 * START_SECONDS):
                process.kill()
    state = _state(out)
    if process.returncode:
        left = [str(path) for path in out.glob("ended-*")]
        state["crashes"].append([f"the process ended with {process.returncode}: {_reason(out / 'log')}", *left[:1]])
    return state


def _state(out: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((out / "state").read_bytes()))
    except FileNotFoundError:
        return {"inputs": 0, "read": 0, "slowest": 0.0, "peak": 0, "crashes": []}


def _reason(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    named = [line for line in lines if "Error" in line or "ERROR" in line]
    hung = [line.strip() for line in lines if line.startswith("  File ")]  # the innermost first
    return ((named or hung[:1] or lines or [""])[-1])[:300]


def _options(args: argparse.Namespace, name: str, shares: float) -> tuple[list[str], float]:
    """Return the options of a reader's driver, and the seconds that it may take; 0 for any."""
    options, seconds = ["--seed", str(args.seed), *(["--blind"] if args.blind else [])], 0.0
    if args.replay:
        options += ["--replay", str(args.replay.resolve())]
    elif args.runs:
        options += ["--runs", str(max(round(args.runs * TARGETS[name].share / shares), 50))]
    else:
        seconds = args.seconds
        options += ["--seconds", str(seconds)]
    return options, seconds


def main(arguments: list[str] | None = None) -> int:
    """Run the readers that are asked for; return 1 if one fails on an input."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Random inputs for readers.")
    parser.add_argument("targets", nargs="*", metavar="reader", help=f"of {', '.join(TARGETS)}. Default: all.")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each reader, without loading it")
    parser.add_argument("--runs", type=int, help="inputs for all readers together, in place of --seconds")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="readers at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blind", action="store_true", help="do not use atheris")
    parser.add_argument("--out", type=Path, help="keep inputs here. Default: a temporary folder")
    parser.add_argument("--replay", type=Path, help="one input again")
    args = parser.parse_args(arguments)
    names = args.targets or list(TARGETS)
    if unknown := set(names) - TARGETS.keys():
        parser.error(f"no reader {', '.join(sorted(unknown))}")
    out = args.out or Path(tempfile.mkdtemp(prefix="fuzz-", dir=MEMORY if os.access(MEMORY, os.W_OK) else None))
    shares = sum(TARGETS[name].share for name in names)
    print(f"{'reader':20} {'inputs':>9} {'read':>9} {'slowest':>9} {'peak MiB':>9}  what failed", flush=True)
    total, failed = 0, False
    with ThreadPoolExecutor(args.jobs) as pool:
        states = pool.map(lambda name: run_one(name, out / name, *_options(args, name, shares)), names)
        for name, state in zip(names, states, strict=True):
            total += state["inputs"]
            failed |= bool(state["crashes"])
            counts = f"{state['inputs']:>9,} {state['read']:>9,} {state['slowest']:>8.2f}s {state['peak'] >> 20:>9,}"
            print(f"{name:20} {counts}  {len(state['crashes']) or 'nothing'}", flush=True)
            for crash in state["crashes"]:
                print("    " + "  ".join(crash), flush=True)
    kept = bool(args.out) or failed
    print(f"{total:,} inputs in all; {f'what was tried is in {out}' if kept else 'nothing failed'}")
    if not kept:
        shutil.rmtree(out)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
