"""The output as a process sees it that helps to write it: rank 0 has the directory, its lock and its journal."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from eightfold.format.journal import WORK_NAME, Entry


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
