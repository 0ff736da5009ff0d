"""What the machine has, and how this process asks for it."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from eightfold import __version__

# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

_PACKAGES = ("numpy", "tokenizers", "jinja2", "rich", "torch", "transformers", "gguf")

# The instruction sets that matter for int8, as Linux names them.
_ISA_FLAGS = (
    "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
    "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm", "sve",
)  # fmt: skip


def tame_malloc() -> None:
    """Keep the C heap from growing to many times what is in use.

    glibc moves its threshold for separate mappings by itself as large blocks are freed; aligned tensors then leave
    holes in the heap that the next one does not fit. Fixed thresholds end that: tensors above 16 MiB go back to the
    system at once, smaller ones are reused without new page faults. Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 16 << 20)
        mallopt(_M_TRIM_THRESHOLD, 256 << 20)


def return_freed() -> None:
    """Give back to the system what is free in the C heap, where many sizes in turn have left holes that stay empty."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def available_bytes() -> int | None:
    """Return the memory that can be used without swapping; None where the system does not say."""
    return _proc("meminfo", "MemAvailable")


def total_bytes() -> int | None:
    """Return the machine's memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def peak_resident_bytes() -> int | None:
    """Return the most memory this process has had resident, mapped files included; None where nobody counts."""
    return _proc("self/status", "VmHWM")


def resident_bytes() -> int | None:
    """Return the memory this process has resident, mapped files included; None where nobody counts."""
    return _proc("self/status", "VmRSS")


def anonymous_bytes() -> int | None:
    """Return the memory this process has resident, files left out; None where nobody counts."""
    return _proc("self/status", "RssAnon")


def _proc(name: str, key: str) -> int | None:
    """Return a size that a file of /proc gives in KiB."""
    try:
        for line in Path("/proc", name).read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def environment() -> dict[str, Any]:
    """Return versions, processor, instruction sets, threads and memory; nothing heavy is imported."""
    import platform

    model, flags = _cpuinfo()
    return {
        "eightfold": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": model,
        "isa": [flag for flag in _ISA_FLAGS if flag in flags],
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "memory_bytes": total_bytes(),
        "memory_available_bytes": available_bytes(),
    }


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpuinfo() -> tuple[str, frozenset[str]]:
    import platform

    model, flags = platform.processor() or platform.machine(), frozenset[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return model, flags
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        if key.strip() in ("flags", "Features"):
            flags = frozenset(value.split())
    return model, flags
