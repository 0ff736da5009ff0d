"""Running commands and keeping what was measured, for every script in this folder."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eightfold.machine import environment

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Finished:
    """One process that has ended well."""

    stdout: str
    seconds: float  # wall time
    peak_mib: float  # largest resident size


def run(command: list[str], env: dict[str, str] | None = None) -> Finished:
    """Run a command to its end; its failure ends the benchmark."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **(env or {})})
    assert process.stdout is not None
    stdout = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{shlex.join(command)}: exit code {process.returncode}")
    return Finished(stdout, seconds, usage.ru_maxrss / 1024)


def eightfold(*args: object) -> Finished:
    """Run an `eightfold` command."""
    return run([sys.executable, "-m", "eightfold", *map(str, args)])


def save_results(name: str, rows: list[dict[str, Any]]) -> None:
    """Write results/NAME.json: the rows, and on what machine and commit they were measured."""
    machine = environment()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = bool(subprocess.run(["git", "status", "--porcelain", "src"], capture_output=True, text=True).stdout)
    record = {
        "commit": commit + ("+changes" if dirty else ""),
        "date": time.strftime("%Y-%m-%d"),
        "cpu": machine["cpu"],
        "isa": machine["isa"],
        "threads": machine["threads"],
        "torch": machine["packages"]["torch"],
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
