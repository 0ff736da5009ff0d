"""What the machine has, and how this process asks for it."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path
from typing import Any

from eightfold import __version__

# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

_PACKAGES = ("numpy", "tokenizers", "jinja2", "rich", "torch", "transformers", "gguf")

_CGROUP = Path("/sys/fs/cgroup")

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


def memory_limit_bytes() -> int | None:
    """Return the memory that the container or service (cgroup) may take; None without a limit below the machine's."""
    found = [_cgroup_number(name) for name in ("memory.max", "memory/memory.limit_in_bytes")]
    limits = [limit for limit in found if limit is not None and limit < (total_bytes() or 1 << 62)]
    return min(limits, default=None)


def cpu_quota() -> float | None:
    """Return how many CPUs the container or service (cgroup) may keep busy; None without a quota."""
    try:
        quota, _, period = (_CGROUP / "cpu.max").read_text().strip().partition(" ")
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        quota_us, period_us = (_cgroup_number(f"cpu/cpu.cfs_{name}_us") for name in ("quota", "period"))
        return quota_us / period_us if quota_us and period_us and quota_us > 0 else None


def _cgroup_number(name: str) -> int | None:
    try:
        return int((_CGROUP / name).read_text())
    except (OSError, ValueError):  # "max"
        return None


def huge_pages() -> str | None:
    """Return when Linux gives transparent huge pages: always, madvise or never; None where it does not say."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return None
    return text.partition("[")[2].partition("]")[0] or None


def torch_cuda() -> str | None:
    """Return the version of CUDA (or ROCm) that the installed torch is built for; None for CPUs. Loads no torch."""
    from importlib.util import find_spec

    spec = find_spec("torch")
    try:
        text = Path(spec.origin).with_name("version.py").read_text() if spec and spec.origin else ""
    except OSError:
        return None
    found = re.search(r"""^(?:cuda|hip)\b[^=\n]*= *['"]([^'"]+)""", text, re.MULTILINE)
    return found[1] if found else None


def has_accelerator() -> bool:
    """Return whether there is a device of a GPU's or NPU's driver."""
    return any(Path("/dev", name).exists() for name in ("nvidiactl", "dxg", "kfd", "davinci_manager"))


def environment() -> dict[str, Any]:
    """Return versions, processor, instruction sets, threads and memory; nothing heavy is imported."""
    import platform

    model, flags = _cpuinfo()
    return {
        "eightfold": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: package_version(name) for name in _PACKAGES},
        "cpu": model,
        "isa": [flag for flag in _ISA_FLAGS if flag in flags],
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "memory_bytes": total_bytes(),
        "memory_available_bytes": available_bytes(),
        "memory_limit_bytes": memory_limit_bytes(),
        "cpu_quota": cpu_quota(),
        "huge_pages": huge_pages(),
        "torch_cuda": torch_cuda(),
    }


def package_version(package: str) -> str | None:
    """Return the version of an installed package; None where it is not installed. Loads nothing of it."""
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
