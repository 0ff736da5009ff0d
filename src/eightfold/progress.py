"""How long work reports that it goes on, without knowing who listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """A piece of work with a known number of steps."""

    def at(self, text: str) -> None:
        """Say what is being done now."""

    def advance(self) -> None:
        """Say that one step is done."""


class SilentTask:
    """A task that nobody watches."""

    def at(self, text: str) -> None:
        """Say nothing."""

    def advance(self) -> None:
        """Say nothing."""


# Opens a task: (title, number of steps, name of a step).
Progress = Callable[[str, int, str], AbstractContextManager[Task]]


@contextmanager
def silent(title: str, total: int, unit: str) -> Iterator[Task]:
    """Open a task that nobody watches."""
    yield SilentTask()
