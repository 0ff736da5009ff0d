"""Where an output may go: a directory that is absent, empty, or what the same command has made before."""

from __future__ import annotations

import os
import re
from pathlib import Path

from eightfold.errors import OutputError, shortlist
from eightfold.format.directory import CONFIG_NAME, carried_over
from eightfold.format.journal import JOURNAL_NAME, WORK_NAME, closing_line, read_entries

QUANTIZE = "quantize"
REPORT_NAME = "eightfold_report.json"  # in everything that quantize has ever written


def check_target(target: Path, command: str, *, source: Path | None, overwrite: bool) -> Path:
    """Refuse an output directory that can be refused without knowing what is going to be made; return its real path.

    Raises:
        OutputError: it is a link, a file or a mount point, holds or lies inside the source, is not empty (without
            `overwrite`), or holds files that `command` has not written (with it).
    """
    if target.is_symlink():
        raise OutputError(
            f"output directory {target}",
            got="a symbolic link",
            expected="a new or empty directory",
            action=f"Name the directory that it points to: {os.path.realpath(target)}",
        )
    target = Path(os.path.realpath(target))
    _require_outside(target, source)
    if target.exists() and not target.is_dir():
        action = "Name another directory, or move the file away."
        raise OutputError(
            f"output directory {target}", got="a file", expected="a new or empty directory", action=action
        )
    if _is_mount_point(target):
        raise OutputError(
            f"output directory {target}",
            got="a mount point, which cannot be renamed",
            expected="a directory",
            action=f"Choose a directory inside it, such as {target / 'model'}.",
        )
    if not has_content(target) or (not overwrite and closing_line(read_entries(target) or []) is not None):
        return target
    if not overwrite:
        raise not_empty(target)
    if strange := sorted(files_in(target) - _written_files(target, command, source)):
        raise OutputError(
            f"output directory {target}",
            got=f"files that `eightfold {command}` did not write ({shortlist(strange, 3)})",
            expected="a model and nothing else, to replace it",
            action="Move them elsewhere and run the same command again, or choose another directory.",
        )
    return target


def _require_outside(target: Path, source: Path | None) -> None:
    """Refuse a target that holds or lies inside the source."""
    if source is None:
        return
    source = Path(os.path.realpath(source))
    if target == source or source.is_relative_to(target) or (source.is_dir() and target.is_relative_to(source)):
        raise OutputError(
            f"output directory {target}",
            got=f"the source {source} in the same place",
            expected="a place outside of it",
            action="Choose another output directory.",
        )


def not_empty(target: Path) -> OutputError:
    """Return the refusal of a directory that holds something."""
    return OutputError(
        f"output directory {target}",
        got="a directory that is not empty",
        expected="a new or empty one",
        action="Choose another, or replace it with `overwrite`.",
    )


def has_content(directory: Path) -> bool:
    """Whether there is a directory that is not empty."""
    return directory.is_dir() and any(directory.iterdir())


def _is_mount_point(path: Path) -> bool:
    """Whether something is mounted here, if only another directory of the same file system."""
    if not path.is_dir():
        return False
    if os.path.ismount(path):
        return True
    try:
        return _mount_of(path) != _mount_of(path.parent)
    except OSError:
        return False  # a system that does not tell


def _mount_of(path: Path) -> list[str]:
    file = os.open(path, os.O_RDONLY)
    try:
        return re.findall(r"mnt_id:\s*(\d+)", Path(f"/proc/self/fdinfo/{file}").read_text())
    finally:
        os.close(file)


def files_in(directory: Path) -> set[str]:
    """Return the names of all files in a directory and its folders, the work folder aside."""
    found = (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    names = {path.relative_to(directory) for path in found}
    return {name.as_posix() for name in names if name.parts[0] != WORK_NAME}


def _written_files(target: Path, command: str, source: Path | None) -> set[str]:
    """Return the names of the files in a target that a command has written there, as its journal or report says."""
    entries = read_entries(target)
    if entries is None and command == QUANTIZE and (target / REPORT_NAME).is_file():
        ours = {path.name for path in target.glob("quant_model_*")}
        return {REPORT_NAME, CONFIG_NAME, *ours, *(carried_over(source) if source else ())}
    sealed = closing_line(entries or [])
    if not entries or sealed is None or entries[0].get("command", QUANTIZE) != command:
        return {JOURNAL_NAME}
    # A journal may have been copied to where somebody's own files are.
    is_its_own = any(
        name.endswith(".safetensors") and (target / name).is_file() and (target / name).stat().st_size == size
        for name, (size, _) in sealed.items()
    )
    return {JOURNAL_NAME, *(sealed if is_its_own else ())}
