"""The output as a process sees it that helps to write it: rank 0 has the directory, its lock and its journal."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path

from eightfold.errors import OutputError
from eightfold.format.journal import WORK_NAME, Entry
from eightfold.parallel.link import process_name
from eightfold.quant.team import Team

_TOKEN_NAME = "token"  # in the work folder, so it goes with it

# A network file system may show a new file late.
SHOW_SECONDS = 5.0


@dataclass
class Notes:
    """What rank 0's journal says, and what this rank has seen finished since."""

    entries: list[Entry] = field(default_factory=list)

    @property
    def steps(self) -> dict[str, Entry]:
        """The finished steps by name."""
        return {entry["step"]: entry for entry in self.entries if "step" in entry}

    def append(self, entry: Entry) -> None:
        """Take note of a finished step."""
        self.entries.append(entry)


@dataclass
class Guest:
    """A directory that grows, and that is another process's.

    Attributes:
        path: where it grows.
        journal: what is finished.
    """

    path: Path
    journal: Notes

    @property
    def work(self) -> Path:
        """Where files lie that only a run at work needs."""
        return self.path / WORK_NAME

    def require_space(self, nbytes: int) -> None:
        """Leave that to rank 0."""


def leave_token(work: Path) -> str:
    """Write a new random word into the work folder, for the others to find; return it."""
    token = secrets.token_hex(16)
    (work / _TOKEN_NAME).write_text(token)
    return token


def require_one_directory(path: Path, token: str, team: Team) -> None:
    """Compare the directory that this process finds at `path` with rank 0's, by the word that rank 0 has left there.

    Raises:
        OutputError: in rank 0, another rank has found another directory, or none.
    """
    for rank, (is_seen, name) in enumerate(team.collect_first((_sees(path / WORK_NAME, token), process_name()))):
        if team.is_first and not is_seen:
            raise not_shared(f"output directory {path} of rank {rank} ({name})", "another one, or none")


def not_shared(what: str, got: str) -> OutputError:
    """Return the error of ranks that do not see each other's files."""
    return OutputError(
        what,
        got=got,
        expected="the directory that rank 0 writes to",
        action="OUT has to be one directory that all hosts see: put it on a file system they share.",
    )


def _sees(work: Path, token: str) -> bool:
    ends = time.monotonic() + SHOW_SECONDS
    while _read(work / _TOKEN_NAME) != token:
        if time.monotonic() > ends:
            return False
        time.sleep(0.05)
    return True


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return None
