"""The compiled extension, found or missed with a clear message, and what the user chose for it.

EIGHTFOLD_ISA forces an instruction set, EIGHTFOLD_THREADS the number of threads.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from typing import TYPE_CHECKING, Any

from eightfold.errors import ConfigError, UnsupportedError
from eightfold.format.safetensors import tell_of_mappings

ISA_VARIABLE, THREADS_VARIABLE = "EIGHTFOLD_ISA", "EIGHTFOLD_THREADS"
MAX_THREADS = 1024  # that the extension takes


def require() -> Any:
    """Import the extension module and return it.

    Raises:
        UnsupportedError: it was not built, or cannot be loaded.
    """
    try:
        return importlib.import_module("eightfold.model.native._core")
    except ImportError as error:
        raise UnsupportedError(
            "native backend",
            got=f"no compiled extension ({error})",
            expected="one built when eightfold was installed",
            action="Install a C++ compiler and reinstall eightfold, or use --backend reference.",
        ) from None


def name_cut_files() -> None:
    """Let a weight file that is cut short while it is used end the process with one line that names the file.

    Without the extension, reading it ends in the system's own message of a bus error.
    """
    with contextlib.suppress(UnsupportedError):
        tell_of_mappings(getattr(require(), "watch_mapping", None))  # an extension built before has none


def is_built() -> bool:
    """Return whether the extension can be imported."""
    try:
        require()
    except UnsupportedError:
        return False
    return True


if TYPE_CHECKING:
    from eightfold.model.native import _core

    extension = _core
else:

    class _Extension:
        """The extension module, imported at its first use."""

        def __getattr__(self, name: str) -> Any:
            return getattr(require(), name)

    extension = _Extension()


def choose_isa() -> str:
    """Return the instruction set to use: what EIGHTFOLD_ISA says, else the best of this CPU.

    Raises:
        ConfigError: unknown, or this CPU lacks it.
    """
    available = extension.available_isas()
    wanted = os.environ.get(ISA_VARIABLE, "")
    if wanted and wanted not in available:
        raise ConfigError(
            ISA_VARIABLE,
            got=wanted,
            expected=f"{' or '.join(available)}, which this CPU has",
            action="Unset it to take the best.",
        )
    return wanted or available[-1]


def choose_threads(threads: int | None = None, sharers: int = 1) -> int:
    """Return how many threads compute: as asked, as EIGHTFOLD_THREADS says, or one for each usable CPU.

    Args:
        threads: what is asked for.
        sharers: processes among which the CPUs are divided.

    Raises:
        ConfigError: not a number from 1 to MAX_THREADS.
    """
    text = os.environ.get(THREADS_VARIABLE, "") if threads is None else str(threads)
    if not text:
        usable = extension.usable_cpus()
        return max(1, min(usable // sharers, MAX_THREADS))
    if not text.isascii() or not text.isdigit() or len(text) > 4 or not 1 <= int(text) <= MAX_THREADS:
        what = THREADS_VARIABLE if threads is None else "threads"
        raise ConfigError(what, got=text, expected=f"a number from 1 to {MAX_THREADS}")
    return int(text)
