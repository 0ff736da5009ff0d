"""Run examples/demo.py in an empty folder, and draw what it prints: docs/images/demo.svg, the picture of the README.

    python docs/make_terminal.py [--folder build/picture] [--output build/demo.txt]          # `make readme` calls it

`--output FILE` draws a recorded output instead, of `make demo 2>&1 | tee FILE`. pip's warnings are about the machine's
own settings and are left out; everything else is shown as it was printed.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

DOCS = Path(__file__).parent
PICTURE = DOCS / "images" / "demo.svg"
WIDTH = 100


def run_demo(folder: Path) -> str:
    """Return what the demo prints, on both streams, when it runs in an empty folder; it also goes to this terminal."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, "-u", str(DOCS.parent / "examples" / "demo.py"), "--work", "build/demo"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    if process.wait():
        sys.exit("the demo failed")
    return "".join(lines)


def style(line: str) -> str:
    """Return the style of a line: commands stand out, notes step back."""
    if line.startswith("$ "):
        return "bold green"
    return "dim" if line.startswith(("note:", "[", "(")) else ""


def draw(text: str) -> str:
    """Return the picture of a terminal in which a text was printed."""
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text("$ make demo", "bold green"))
    for line in text.rstrip().splitlines():
        if not line.startswith("WARNING:"):
            console.print(Text(line, style(line)))
    picture = console.export_svg(title="make demo", theme=MONOKAI, unique_id="demo")
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)  # fonts that a page would fetch elsewhere
    return re.sub(r"[ \t]+$", "", picture, flags=re.MULTILINE)


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="the recorded output of a run")
    parser.add_argument("--folder", type=Path, default=Path("build/picture"), help="where the demo runs")
    args = parser.parse_args()
    text = run_demo(args.folder) if args.output is None else args.output.read_text(encoding="utf-8")
    PICTURE.write_text(draw(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
