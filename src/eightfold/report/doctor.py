"""What a machine is good for: the facts of `eightfold env`, each with a judgement and the next step."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eightfold.errors import EightfoldError
from eightfold.machine import has_accelerator, package_version
from eightfold.model import native
from eightfold.values import size_text

OK, NOTE, PROBLEM = "ok", "note", "problem"

# Extra -> what it is for, and its packages with their lowest versions, as in pyproject.toml.
EXTRAS: dict[str, tuple[str, dict[str, str]]] = {
    "quantize": ("quantize, and the reference backend", {"torch": "2.4", "pyyaml": "6"}),
    "serve": (
        "serve, the chat page and structured output",
        {
            "llguidance": "1.8",
            "starlette": "0.40",
            "uvicorn": "0.30",
            "prometheus-client": "0.20",
            "markdown-it-py": "3",
        },
    ),
    "hub": ("models by their ids, and push", {"huggingface-hub": "1", "modelscope-hub": "0.4"}),
    "gguf": ("import of GGUF files", {"gguf": "0.10", "transformers": "4.49"}),
    "tokenizer": (
        "tokenizers of sentencepiece and tiktoken",
        {"transformers": "4.49", "sentencepiece": "0.2", "tiktoken": "0.7", "protobuf": "4"},
    ),
}

_GB = 10**9
_LITTLE_MEMORY, _NO_MEMORY = 4 * _GB, _GB // 2
_LITTLE_DISK, _NO_DISK = 10 * _GB, _GB // 10
_FEW_FILES = 1024

# What AVX-512 VNNI gives over an instruction set: SmolLM2 in w8a8-dynamic, 2 threads, `bench` with EIGHTFOLD_ISA.
_BETTER = {
    "avx2": "a CPU with AVX-512 VNNI reads prompts about 5 times as fast, and answers about 1.5 times as fast",
    "scalar": "a CPU with AVX2 is about 10 times as fast, one with AVX-512 VNNI more than that",
}


@dataclass(frozen=True)
class Finding:
    """A fact with a judgement."""

    subject: str
    verdict: str  # OK, NOTE (it works, but something is slower or missing) or PROBLEM
    text: str
    action: str = ""  # the next step; empty: none


def examined(facts: Mapping[str, Any], directory: Path) -> list[Finding]:
    """Return a finding for each subject.

    Args:
        facts: machine.environment()'s.
        directory: where models are going to be written.
    """
    parts = (_versions(facts), _core(), _threads(facts), _memory(facts), _huge_pages(facts), _disk(directory))
    return [finding for part in (*parts, _open_files(), _torch(facts), _extras()) for finding in part]


def _versions(facts: Mapping[str, Any]) -> Iterator[Finding]:
    yield Finding("version", OK, f"eightfold {facts['eightfold']}, Python {facts['python']}, {facts['system']}")


def _core() -> Iterator[Finding]:
    try:
        available = native.extension.available_isas()
    except EightfoldError as error:
        compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
        yield Finding(
            "core",
            PROBLEM,
            f"{str(error).partition(', expected')[0]}; run and eval are left with the slow reference backend",
            "Install eightfold again: pip install --force-reinstall --no-deps eightfold, which compiles where there is "
            "no wheel."
            if compiler
            else "Install a C++20 compiler (apt-get install g++), then eightfold again.",
        )
        return
    try:
        isa = native.choose_isa()
    except EightfoldError as error:
        yield Finding("core", PROBLEM, str(error))
        return
    if isa != available[-1]:
        action = f"Unset {native.ISA_VARIABLE}."
        yield Finding("core", NOTE, f"{isa}, by {native.ISA_VARIABLE}; this CPU has {available[-1]}", action)
    elif isa in _BETTER:
        action = "In a virtual machine, ask for the host's CPU model: it may hide instruction sets."
        yield Finding("core", NOTE, f"{isa}; {_BETTER[isa]}", action)
    else:
        yield Finding("core", OK, f"compiled; computes with {isa}")


def _threads(facts: Mapping[str, Any]) -> Iterator[Finding]:
    cpus, quota = facts["threads"], facts["cpu_quota"]
    try:
        threads = native.choose_threads() if native.is_built() else cpus
    except EightfoldError as error:
        yield Finding("threads", PROBLEM, str(error))
        return
    text = f"{threads} of {cpus} CPUs, {facts['cpu']}"
    if threads > cpus:
        yield Finding("threads", NOTE, f"{text}: more threads than CPUs wait for each other",
                      f"Unset {native.THREADS_VARIABLE}.")  # fmt: skip
    elif quota is not None and quota < cpus:
        yield Finding("threads", NOTE, f"{text}; a quota gives this container {quota:g} CPUs",
                      "Raise the quota (docker run --cpus N, resources.limits.cpu), in whole CPUs.")  # fmt: skip
    else:
        yield Finding("threads", OK, text)


def _memory(facts: Mapping[str, Any]) -> Iterator[Finding]:
    total, free, limit = (facts[f"memory{name}_bytes"] for name in ("", "_available", "_limit"))
    if total is None or free is None:
        yield Finding("memory", NOTE, "the system does not tell how much there is")
        return
    usable = free if limit is None else min(free, limit)
    text = f"{size_text(free)} of {size_text(total)} free"
    text += "" if limit is None else f"; this container may take {size_text(limit)}"
    action = "Close other programs" + ("." if limit is None else ", or raise the limit (docker run --memory SIZE).")
    if usable < _NO_MEMORY:
        yield Finding("memory", PROBLEM, f"{text}: too little for any model", action)
    elif usable < _LITTLE_MEMORY:
        yield Finding("memory", NOTE, f"{text}: enough for about {usable / 1.5e9:.1f} billion parameters in 8 bits",
                      f"{action} Weights that do not fit are read from disk: docs/scale.md.")  # fmt: skip
    else:
        yield Finding("memory", OK, text)


def _huge_pages(facts: Mapping[str, Any]) -> Iterator[Finding]:
    mode = facts["huge_pages"]
    if mode == "never":
        yield Finding("huge pages", NOTE, "never, so that the cache and copied weights lie in small pages",
                      "As root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled")  # fmt: skip
    else:
        yield Finding("huge pages", OK, mode or "the system does not tell")


def _disk(directory: Path) -> Iterator[Finding]:
    where = directory.absolute()
    try:
        free = shutil.disk_usage(where).free
    except OSError as error:
        yield Finding("disk", PROBLEM, f"{where}: {error.strerror or error}", "Give --dir a directory that exists.")
        return
    text = f"{size_text(free)} free in {where}"
    if not os.access(where, os.W_OK):
        yield Finding("disk", NOTE, f"{text}, where you may not write", "Name another directory with --dir.")
    elif free < _NO_DISK:
        yield Finding("disk", PROBLEM, f"{text}: too little for any model", "Free some space, or choose another disk.")
    elif free < _LITTLE_DISK:
        yield Finding("disk", NOTE, f"{text}: enough for about {free / 1.2e9:.1f} billion parameters in 8 bits",
                      "`eightfold quantize ... --plan` says how much a model takes.")  # fmt: skip
    else:
        yield Finding("disk", OK, text)


def _open_files() -> Iterator[Finding]:
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= limit < _FEW_FILES:
        yield Finding("open files", NOTE, f"at most {limit}, which limits the connections of serve",
                      f"ulimit -n {4 * _FEW_FILES}")  # fmt: skip
    else:
        yield Finding("open files", OK, "no limit" if limit < 0 else f"at most {limit}")


def _torch(facts: Mapping[str, Any]) -> Iterator[Finding]:
    found, cuda = facts["packages"]["torch"], facts["torch_cuda"]
    if found is None:
        return  # _extras tells
    if cuda and not has_accelerator():
        text = f"{found}, a build for GPUs (CUDA or ROCm {cuda}) on a machine without one: it takes several gigabytes"
        action = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cpu"
        yield Finding("torch", NOTE, text, action)
    else:
        yield Finding("torch", OK, f"{found}, built for {f'GPUs ({cuda})' if cuda else 'CPUs'}")


def _extras() -> Iterator[Finding]:
    for extra, (purpose, packages) in EXTRAS.items():
        versions = {name: package_version(name) for name in packages}
        missing = [name for name, found in versions.items() if found is None]
        old = [name for name, found in versions.items() if found and _numbers(found) < _numbers(packages[name])]
        shown = ", ".join(f"{name} {found}" for name, found in versions.items() if found)
        action = f"pip install --upgrade 'eightfold[{extra}]'"
        if old:
            wanted = " and ".join(f"{name} {packages[name]} or newer" for name in old)
            yield Finding(extra, PROBLEM, f"{shown}; needed: {wanted}", action)
        elif missing:
            yield Finding(extra, NOTE, f"without {', '.join(missing)}: needed for {purpose}", action)
        else:
            yield Finding(extra, OK, shown)


def _numbers(version: str) -> tuple[int, ...]:
    """Return the release numbers of a version, such as (2, 13, 0) of 2.13.0+cpu."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[^\d.]", version)[0]))
