"""Whose a file in an output directory is: a journal names what its runs have written; all else is somebody else's.

    {"files": [names]}                      a line before they are written, so that a killed run's files are known too
    {"complete": {name: [bytes, CRC-32]}}   the closing line

Names are paths inside the directory, with "/".
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from eightfold.errors import OutputError, shortlist
from eightfold.format.checkpoint import CONFIG_NAME
from eightfold.format.journal import WORK_NAME, Entry
from eightfold.format.safetensors import checksum_of
from eightfold.format.sidecars import carried_over
from eightfold.format.writer import DIRECTORY_MODE, final_mode

REPORT_NAME = "eightfold_report.json"  # in everything that quantize has ever written


def has_written_name(name: str) -> bool:
    """Whether a file is called as only quantize calls files: weights, their index, descriptions, the report."""
    return name == REPORT_NAME or re.fullmatch(r"quant_model_(weight|description).*", name) is not None


def claimed_files(entries: Iterable[Entry]) -> set[str]:
    """Return the names of the files that the entries of a journal call written, or about to be."""
    found = {name for entry in entries for key in ("files", "complete") for name in entry.get(key, ())}
    return {name for name in found if _is_inside(name)}


def says_its_files(entries: Iterable[Entry]) -> bool:
    """Whether a journal names what its runs write before they do: those of older versions did not."""
    keys = {key for entry in entries for key in entry}
    return "tensors" not in keys or not keys.isdisjoint({"files", "complete"})


def files_called_ours(directory: Path, source: Path) -> set[str]:
    """Return the names of files that quantize has written as far as names tell, where no journal does.

    Where there is a report, what is carried over from the source is there too.
    """
    found = {entry.name for entry in os.scandir(directory) if has_written_name(entry.name) and entry.is_file()}
    return found | {CONFIG_NAME, *carried_over(source)} if REPORT_NAME in found else found


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not PurePosixPath(name).is_absolute() and ".." not in parts


def folders_of(names: Iterable[str]) -> set[str]:
    """Return the names of the folders in which files lie."""
    return {parent.as_posix() for name in names for parent in PurePosixPath(name).parents} - {"."}


def strange_entries(directory: Path, own: Collection[str], *, hidden: str) -> list[str]:
    """Return what lies in a directory beside these files and their folders; of a folder only its name.

    Args:
        hidden: how names begin of what runs leave in a mount point.
    """
    folders: set[str] = folders_of(own)
    found: list[str] = []
    for base, below, files in os.walk(directory):
        names = {name: (Path(base) / name).relative_to(directory).as_posix() for name in (*below, *files)}
        links = {name for name in below if (Path(base) / name).is_symlink()}
        known = {name for name in files if names[name] in own}
        below[:] = [name for name in below if names[name] in folders and name not in links]
        found += [names[name] for name in sorted(names.keys() - known - set(below))]
    return [name for name in found if name != WORK_NAME and not name.startswith(hidden)]


def remove_files(directory: Path, names: Iterable[str]) -> None:
    """Remove these files, and their folders if nothing else is in them."""
    names = set(names)
    for name in names:
        (directory / name).unlink(missing_ok=True)
    for name in sorted(folders_of(names), reverse=True):
        folder = directory / name
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def empty_folder(folder: Path) -> None:
    """Remove what can be removed from a folder, which stays: it may be a mount point, or other hosts know it."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def require_no_links(directory: Path, target: Path, names: Iterable[str]) -> None:
    """Refuse a directory in which what runs write could be written elsewhere.

    Raises:
        OutputError: a symbolic link is in it, or in a folder of these files.
    """
    folders = [directory, *(directory / name for name in sorted({WORK_NAME, *folders_of(names)}))]
    for folder in folders:
        if not folder.is_dir():
            continue
        links = sorted(entry.name for entry in os.scandir(folder) if entry.is_symlink())
        if links:
            raise OutputError(
                f"output directory {target}",
                got=f"symbolic links in what was begun there ({shortlist(links, 3)})",
                expected="files of its own",
                action="Remove the links, or choose another directory.",
            )


def is_its_own(directory: Path, sealed: Mapping[str, Sequence[int]]) -> bool:
    """Whether a closing line tells of the directory in which it lies: any of what only quantize writes is there."""
    return any(
        has_written_name(name) and (directory / name).is_file() and (directory / name).stat().st_size == size
        for name, (size, _) in sealed.items()
    )


def replaced_note(target: Path) -> Path:
    """Return where it is noted which files of a mount point are being replaced."""
    return target / f".{target.name}.partial-replaced.json"


def noted_files(target: Path) -> set[str]:
    """Return what a killed run has begun to replace in a mount point."""
    try:
        return claimed_files([json.loads(replaced_note(target).read_text())])
    except (OSError, ValueError, AttributeError, TypeError):
        return set()  # torn: then nothing was removed yet


def seal(path: Path, names: list[str], checksums: dict[str, int]) -> dict[str, list[int]]:
    """Give every file its mode, and see it safely on disk; return name -> size and CRC-32."""
    found = {}
    for name in names:
        entry = path / name
        entry.chmod(final_mode(entry))
        file = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            os.fsync(file)
            size = os.fstat(file).st_size
            checksum = checksums[name] if name in checksums else checksum_of(file, 0, size)
        finally:
            os.close(file)
        found[name] = [size, checksum]
    for name in folders_of(names):
        (path / name).chmod(DIRECTORY_MODE)
        _sync_directory(path / name)
    _sync_directory(path)
    return found


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def is_as_sealed(path: Path, size: int, checksum: int) -> bool:
    """Whether a file is what a closing line says of it."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return os.fstat(file).st_size == size and checksum_of(file, 0, size) == checksum
    finally:
        os.close(file)
