"""How long work reports its steps without knowing who listens, and the bar that a terminal shows of them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


class Task:
    """A piece of work with a known number of steps; this one is shown to nobody."""

    def at(self, text: str) -> None:
        """Say what is being done now."""

    def advance(self) -> None:
        """Say that one step is done."""


# Opens a task: (title, number of steps, name of a step).
Progress = Callable[[str, int, str], AbstractContextManager[Task]]


@contextmanager
def silent(title: str, total: int, unit: str) -> Iterator[Task]:
    """Open a task that is shown to nobody."""
    yield Task()


class _BarTask(Task):
    def __init__(self, bar: RichProgress, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def at(self, text: str) -> None:
        self._bar.update(self._task, now=text)

    def advance(self) -> None:
        done = self._bar.tasks[self._task]
        self._bar.advance(self._task)
        speed = done.speed
        self._bar.update(self._task, rate=f"{speed:.1f}/s" if speed else "")


@contextmanager
def bars(title: str, total: int, unit: str, after: float = 0.0) -> Iterator[Task]:
    """Show a bar on stderr with what is being done, speed and time left; nothing where that is no terminal.

    Args:
        title: the work.
        total: number of steps.
        unit: name of a step.
        after: seconds until the bar appears: work that is done before is not worth one.
    """
    if not sys.stderr.isatty():
        yield Task()
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TextColumn(f"{unit}s  {{task.fields[rate]}}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[now]}", style="dim"),
    )
    bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
    task = _BarTask(bar, bar.add_task(title, total=total, now="", rate=""))
    starter = threading.Timer(after, bar.start)
    starter.start()
    try:
        yield task
    finally:
        starter.cancel()
        starter.join()
        bar.stop()
